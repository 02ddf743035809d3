"""How one answer is generated: its length, how tokens are chosen, and where it stops."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STOP_STRINGS = 16
"""Largest number of strings that end an answer."""


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one answer, with the names of the OpenAI interface where it has them.

    Args:
        max_new_tokens: largest number of tokens of the answer.
        temperature: 0 for greedy decoding, otherwise the temperature of sampling.
        top_p: sample from the most likely tokens whose probabilities sum to at least this number.
        presence_penalty: subtracted from the logit of every token that the answer holds already.
        frequency_penalty: subtracted from the logit of a token once for each time that the answer holds it.
        seed: seed of sampling. An answer with a seed does not depend on the other answers of its batch, apart from the
            rounding of sums. None for another answer every time.
        stop: strings that end the answer. They are not part of it.
        workflow: workflow of a model with inner adaptors; None for the active one.

    Raises:
        ValueError: an option out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    workflow: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be an integer of at least 1.")
        ranges = {
            "temperature": (0.0, 2.0),
            "top_p": (0.0, 1.0),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                raise ValueError(f"{name}={value} must be between {low:g} and {high:g}.")
        if self.top_p == 0:
            raise ValueError("top_p=0 leaves no token to choose; use temperature=0 for greedy decoding.")
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise ValueError(f"stop={self.stop!r} must be at most {MAX_STOP_STRINGS} strings that are not empty.")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is chosen at every step, without a look at the tokens before it."""
        return self.temperature == 0 and not self.presence_penalty and not self.frequency_penalty

    def new_generator(self) -> torch.Generator:
        """The random numbers of one answer. They are drawn on the CPU, so that they are the same on every device."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def choose_token(scores: Tensor, options: GenerationOptions, answer: list[int], generator: torch.Generator) -> int:
    """Choose the next token of one answer.

    Args:
        scores: ``[V]`` logits.
        options: options of the answer.
        answer: the tokens of the answer so far.
        generator: its random numbers, from :meth:`GenerationOptions.new_generator`.
    """
    scores = scores.float().cpu()
    if answer and (options.presence_penalty or options.frequency_penalty):
        tokens, counts = torch.tensor(answer).unique(return_counts=True)
        scores = scores.clone()
        scores[tokens] -= options.presence_penalty + options.frequency_penalty * counts
    if options.temperature == 0:
        return int(scores.argmax())
    probabilities = (scores / options.temperature).softmax(-1)
    if options.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered * (before < options.top_p))
    return int(torch.multinomial(probabilities, 1, generator=generator))
