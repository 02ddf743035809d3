"""Ask a model every question of an evaluation set and score what it answers."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from idavlm.data.schema import TASK_TYPES, Message, Part, Sample
from idavlm.evaluation.baselines import with_wrong_references, without_references
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import CHOICE_TASKS, score_answer
from idavlm.utils import check_choice, check_positive

# Inputs of training: neither generation nor likelihoods want a loss.
_FOR_TRAINING = ("labels", "boxes", "box_image", "box_identity", "source", "sample_source")


def evaluate(
    model: nn.Module,
    processor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    references: str = "right",
) -> EvaluationResult:
    """Answer all samples, greedily, and score the answers.

    Matching, location and descriptions are generated. Questions with false answers are multiple choice: the answer is
    the candidate of highest likelihood (sum over its tokens), and a tie is wrong.

    Args:
        model: has ``generate``, ``forward`` with ``logits``, and ``device``; in evaluation mode meanwhile.
        processor: has ``encode(sample, add_generation_prompt=False)``, ``collate(encoded, padding_side=...)``,
            ``parse_box(text, image_size)`` and ``tokenizer``.
        samples: evaluation samples: a list, or a :class:`idavlm.data.RecordDataset`.
        batch_size: rows at once.
        max_new_tokens: longest answer.
        references: what the model is shown: the ``"right"`` photos, ``"none"``, or the ``"wrong"`` ones, of other
            persons. Scored is always by ``samples``.

    Returns:
        Predictions in the order of ``samples``.

    Raises:
        ValueError: a training sample, or a question without false answers.
    """
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
    check_choice("references", references, ("right", "none", "wrong"))
    samples = list(samples)
    _check(samples)
    start = time.perf_counter()
    shown = samples
    if references == "none":
        shown = [without_references(sample) for sample in samples]
    elif references == "wrong":
        shown = with_wrong_references(samples)
    # Task by task: prompts and answers of a batch are of like length.
    numbers = sorted(range(len(samples)), key=lambda number: TASK_TYPES.index(samples[number].type))
    written = [number for number in numbers if samples[number].type not in CHOICE_TASKS]
    chosen = [number for number in numbers if samples[number].type in CHOICE_TASKS]
    names = sorted({identity.name for sample in samples for identity in sample.identities})
    predictions: dict[int, Prediction] = {}

    def keep(number: int, text: str, image_size: tuple[int, int]) -> None:
        predictions[number] = score_answer(
            samples[number], text, image_size=image_size, parse_box=processor.parse_box, names=names
        )

    with evaluating(model):
        for chunk in _chunks(written, batch_size):
            answers = _generate(model, processor, [shown[number] for number in chunk], max_new_tokens)
            for number, answer in zip(chunk, answers, strict=True):
                keep(number, *answer)
        candidates = [(number, text) for number in chosen for text in _candidates(samples[number])]
        likelihoods: list[float] = []
        for chunk in _chunks(candidates, batch_size):
            answered = [_with_answer(shown[number], text) for number, text in chunk]
            likelihoods += _likelihoods(model, processor, answered)
    found = iter(likelihoods)
    for number in chosen:
        texts = _candidates(samples[number])
        scores = [next(found) for _ in texts]
        keep(number, texts[scores.index(max(scores))], (0, 0))
    return EvaluationResult([predictions[number] for number in range(len(samples))], time.perf_counter() - start)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module, frozen parts too, comes back in the mode it was in.

    Not ``inference_mode``: a processor may keep the images it prepares here, and training reads them again.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def model_inputs(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    """``batch`` on the model's device, without what only training needs."""
    kept = {name: value for name, value in batch.items() if name not in _FOR_TRAINING}
    return {name: value.to(model.device) for name, value in kept.items() if isinstance(value, Tensor)}


def _generate(
    model: nn.Module, processor, samples: Sequence[Sample], max_new_tokens: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    """The answer to each sample, and height and width of its last picture."""
    encoded = [processor.encode(sample, add_generation_prompt=True) for sample in samples]
    inputs = model_inputs(model, processor.collate(encoded, padding_side="left"))
    prompt = inputs["input_ids"]
    stops = getattr(getattr(model, "generation_config", None), "stop_strings", None) or []
    stopping = {"tokenizer": processor.tokenizer} if stops else {}
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **stopping)
    # Some models return the new tokens alone.
    if ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
        ids = ids[:, prompt.shape[1] :]
    texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    for text, sample in zip(texts, encoded, strict=True):
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.partition(stop)[0]
        sizes = sample["image_sizes"].tolist()
        yield text.strip(), tuple(sizes[-1]) if sizes else (0, 0)


def _likelihoods(model: nn.Module, processor, samples: Sequence[Sample]) -> list[float]:
    """Log-likelihood of the labels of each sample; earlier answers of a conversation are equal for all candidates."""
    batch = processor.collate([processor.encode(sample) for sample in samples], padding_side="right")
    logits = model(**model_inputs(model, batch)).logits[:, :-1]
    labels = batch["labels"].to(logits.device)[:, 1:]
    labelled = labels != -100
    losses = torch.zeros(labels.shape, device=logits.device)
    losses[labelled] = nn.functional.cross_entropy(logits[labelled].float(), labels[labelled], reduction="none")
    return (-losses.sum(1)).tolist()


def _candidates(sample: Sample) -> list[str]:
    """The right answer comes last: the first of equals is chosen, so that a tie is wrong."""
    return [*sample.false_answers, sample.answer]


def _with_answer(sample: Sample, text: str) -> Sample:
    return replace(sample, messages=[*sample.messages, Message("assistant", [Part("text", text=text)])])


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _check(samples: Sequence[Sample]) -> None:
    for sample in samples:
        place = sample.where or sample.id
        if sample.type is None:
            raise ValueError(f"samples: {place} is a training sample; evaluation samples have type and answer.")
        if sample.type in CHOICE_TASKS and not sample.false_answers:
            raise ValueError(
                f"samples: {place} of type {sample.type!r} has no false_answers to choose among; add some."
            )
