"""Generate the answers of a model to evaluation samples, in batches of similar length, with resumption."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from idavlm.data.schema import TASK_TYPES, Message, Part, Sample
from idavlm.evaluation.answers import Answer, AnswerFile, question_text
from idavlm.evaluation.baselines import IdentityKey, with_wrong_references, without_references
from idavlm.evaluation.choices import CHOICE_TASKS, candidates
from idavlm.evaluation.fingerprints import item_fingerprint, model_fingerprint
from idavlm.utils import IGNORE_INDEX, check_choice, check_positive, lock_file
from idavlm.utils.sharding import is_partitioned

REFERENCES = ("right", "none", "wrong")

# Batch fields that only training uses; generation and likelihoods compute no loss.
_TRAINING_FIELDS = ("labels", "boxes", "box_image", "box_identity", "source", "sample_source", "sample_ids")


def generate_answers(
    model: nn.Module,
    processor,
    samples: Sequence[Sample],
    *,
    path: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    references: str = "right",
    write_choices: bool = False,
    identity_key: IdentityKey | None = None,
    settings: dict | None = None,
    progress: bool = False,
) -> list[Answer]:
    """Generate answers to all samples with greedy decoding.

    Questions with false answers are multiple choice: the log-likelihood (sum over tokens) of each candidate is
    computed instead.

    Args:
        model: has ``generate`` of transformers, ``forward`` with ``logits``, and ``device``; set to evaluation mode
            during the call.
        processor: has ``encode(sample, add_generation_prompt=False)``, ``collate(encoded, padding_side=...)`` and
            ``tokenizer``.
        samples: evaluation samples with unique ids.
        path: a ``.jsonl`` file to which answers are appended. Samples that it already answers are skipped, provided
            that model, processor, options and the items (questions, choices and content of the images) are the same.
        batch_size: samples per batch.
        max_new_tokens: maximum length of an answer.
        references: references that the model receives: ``"right"``, ``"none"``, or ``"wrong"`` (of other identities).
        write_choices: also generate text for multiple-choice questions, for example for a judge.
        identity_key: for wrong references, see :func:`with_wrong_references`.
        settings: further settings the answers depend on, stored next to ``path``.
        progress: show a progress bar.

    Returns:
        Answers in the order of ``samples``.

    Raises:
        ValueError: a training sample, a repeated id, a question without false answers, too few identities for wrong
            references; answers at ``path`` by another model, with other settings or to items that have changed since;
            another process that writes to ``path``; logits that are NaN or infinite, with the sample.
    """
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
    check_choice("references", references, REFERENCES)
    samples = list(samples)
    _check_samples(samples, write_choices)
    shown = samples
    if references == "none":
        shown = [without_references(sample) for sample in samples]
    elif references == "wrong":
        shown = with_wrong_references(samples, identity_key=identity_key)
    options = {"references": references, "max_new_tokens": max_new_tokens, "write_choices": write_choices}
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = nullcontext() if path is None else lock_file(path.with_name(f"{path.name}.lock"), path)
    with lock:
        file = None
        if path is not None:
            items = {
                sample.id: item_fingerprint(sample, received) for sample, received in zip(samples, shown, strict=True)
            }
            file = AnswerFile(path, options | model_fingerprint(model, processor) | (settings or {}), items)
        answers: dict[str, Answer] = {} if file is None else file.answers
        waiting = sorted((sample for sample in shown if sample.id not in answers), key=_batch_order)
        bar = tqdm(total=len(samples), initial=len(samples) - len(waiting), desc="answers", disable=not progress)
        with evaluating(model), bar:
            for _, of_task in groupby(waiting, key=lambda sample: sample.task):
                remaining = list(of_task)
                while remaining:
                    batch, remaining = remaining[:batch_size], remaining[batch_size:]
                    found = _answer(model, processor, batch, batch_size, max_new_tokens, write_choices)
                    answers.update({answer.id: answer for answer in found})
                    if file is not None:
                        file.add(found)
                    bar.update(len(batch))
    return [answers[sample.id] for sample in samples]


class RequireFinite(LogitsProcessor):
    """Raises ``ValueError`` for logits that are NaN or infinite; greedy decoding would return some token silently.

    Args:
        samples: the sample of each row.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.amax(-1).isfinite()  # NaN if any is NaN; other logits processors may set some to -inf
        if not finite.all():
            _refuse_sample(self.samples[int((~finite).nonzero()[0])], "logits")
        return scores


def _refuse_sample(sample: Sample, what: str) -> None:
    raise ValueError(
        f"{sample.where or sample.id}: the model computes {what} that are NaN or infinite. Check its weights, and that "
        "its dtype suffices (float16 overflows earlier than bfloat16)."
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule returns to its previous mode.

    Uses ``no_grad`` instead of ``inference_mode`` because the processor may cache images that training uses later.
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
    """The tensors of ``batch`` on the device of the model, without fields that only training uses."""
    kept = {name: value for name, value in batch.items() if name not in _TRAINING_FIELDS}
    return {name: value.to(model.device) for name, value in kept.items() if isinstance(value, Tensor)}


def generate_texts(
    model: nn.Module, processor, samples: Sequence[Sample], max_new_tokens: int
) -> list[tuple[str, tuple[int, int] | None]]:
    """Generate one batch; returns for each sample the text, and height and width of its last image.

    Raises:
        ValueError: logits that are NaN or infinite, with the sample.
    """
    check_positive(max_new_tokens=max_new_tokens)
    encoded = [processor.encode(sample, add_generation_prompt=True) for sample in samples]
    inputs = _encode_images_once(model, model_inputs(model, processor.collate(encoded, padding_side="left")), samples)
    prompt = inputs["input_ids"]
    stop_strings = getattr(getattr(model, "generation_config", None), "stop_strings", None) or []
    options = {"tokenizer": processor.tokenizer} if stop_strings else {}  # transformers needs it to find stop strings
    options |= {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    ids = model.generate(**inputs, **options, logits_processor=LogitsProcessorList([RequireFinite(samples)]))
    # Some models return the prompt and the new tokens, others the new tokens only.
    if ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
        ids = ids[:, prompt.shape[1] :]
    texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    texts = [truncate_at(text, stop_strings).strip() for text in texts]
    # Some models of transformers have an input image_sizes of their own.
    sizes = [sample.get("original_image_sizes", sample.get("image_sizes")).tolist() for sample in encoded]
    return [(text, tuple(size[-1]) if size else None) for text, size in zip(texts, sizes, strict=True)]


def truncate_at(text: str, stop_strings: str | Sequence[str]) -> str:
    """``text`` up to the first occurrence of any of ``stop_strings``."""
    for stop in [stop_strings] if isinstance(stop_strings, str) else stop_strings:
        text = text.partition(stop)[0]
    return text


def answer_likelihoods(model: nn.Module, processor, samples: Sequence[Sample], texts: Sequence[str]) -> list[float]:
    """Log-likelihood of each text as the answer to its sample, in one batch.

    Earlier answers of a conversation are included; they contribute equally to all candidates of a sample.

    Raises:
        ValueError: a likelihood that is NaN or infinite, with the sample.
    """
    answered = [
        replace(sample, messages=[*sample.messages, Message("assistant", [Part("text", text=text)])])
        for sample, text in zip(samples, texts, strict=True)
    ]
    batch = processor.collate([processor.encode(sample) for sample in answered], padding_side="right")
    logits = model(**_encode_images_once(model, model_inputs(model, batch), answered)).logits[:, :-1]
    labels = batch["labels"].to(logits.device)[:, 1:]
    supervised = labels != IGNORE_INDEX
    losses = torch.zeros(labels.shape, device=logits.device)
    losses[supervised] = nn.functional.cross_entropy(logits[supervised].float(), labels[supervised], reduction="none")
    likelihoods = (-losses.sum(1)).tolist()
    for sample, likelihood in zip(samples, likelihoods, strict=True):
        if not math.isfinite(likelihood):
            _refuse_sample(sample, "likelihoods")
    return likelihoods


def _encode_images_once(model: nn.Module, inputs: dict[str, Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Run the vision tower once per distinct image of the batch; the candidates of a question share their images.

    FSDP gathers parameters in ``forward`` only, so the tower of a model that is sharded encodes every image there.
    """
    parameter = next(model.parameters(), None)
    if parameter is not None and is_partitioned(parameter):
        return inputs
    paths = [(sample.image_root, path) for sample in samples for path in sample.images]
    first = {path: number for number, path in reversed(list(enumerate(paths)))}
    if len(first) == len(paths) or "pixel_values" not in inputs or not hasattr(model, "image_features"):
        return inputs
    distinct = sorted(first.values())
    features, grid_size = model.image_features(inputs["pixel_values"][distinct])
    if grid_size is not None and grid_size[0] != grid_size[1]:
        return inputs  # from features alone, the model would assume a square grid
    row_of = {number: row for row, number in enumerate(distinct)}
    rows = torch.tensor([row_of[first[path]] for path in paths], device=features.device)
    others = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return others | {"image_features": features[rows]}


def _answer(
    model: nn.Module, processor, samples: list[Sample], batch_size: int, max_new_tokens: int, write_choices: bool
) -> list[Answer]:
    """Answers to samples of one task."""
    is_choice = samples[0].task in CHOICE_TASKS
    generated: list = [(None, None)] * len(samples)
    if not is_choice or write_choices:
        generated = generate_texts(model, processor, samples, max_new_tokens)
    pairs = [(sample, text) for sample in samples for text in candidates(sample)] if is_choice else []
    likelihoods: list[float] = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        likelihoods += answer_likelihoods(model, processor, *zip(*batch, strict=True))
    answers = []
    for sample, (text, size) in zip(samples, generated, strict=True):
        count = len(candidates(sample))
        of_sample, likelihoods = tuple(likelihoods[:count]), likelihoods[count:]
        answers.append(Answer(sample.id, text, question_text(sample), size, of_sample if is_choice else None))
    return answers


def _batch_order(sample: Sample) -> tuple:
    """Sort by task, whose answers have similar length; longest prompts first to fail early on memory."""
    length = sum(len(part.text) for message in sample.messages for part in message.content)
    task_number = TASK_TYPES.index(sample.task) if sample.task in TASK_TYPES else len(TASK_TYPES)
    return task_number, sample.task, -len(sample.images), -length


def _check_samples(samples: Sequence[Sample], write_choices: bool) -> None:
    ids: set[str] = set()
    for sample in samples:
        place = sample.where or sample.id
        if sample.answer is None:
            raise ValueError(f"samples: {place} is a training sample; pass samples with 'type' and 'answer'.")
        if sample.id in ids:
            raise ValueError(
                f"samples: id={sample.id!r} of {place} is not unique; use a different id for every sample."
            )
        ids.add(sample.id)
        if sample.task in CHOICE_TASKS and not sample.false_answers and not write_choices:
            raise ValueError(
                f"samples: {place} of type {sample.task!r} has no false_answers to choose among; add false_answers."
            )
