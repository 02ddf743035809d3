"""Ask a model every question: batches of like length, kept on disk as they are answered."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from idavlm.data.schema import TASK_TYPES, Message, Part, Sample
from idavlm.evaluation.answers import Answer, AnswerFile, candidates, question_text
from idavlm.evaluation.baselines import Person, with_wrong_references, without_references
from idavlm.utils import check_choice, check_positive

REFERENCES = ("right", "none", "wrong")
CHOICE_TASKS = ("qa_single", "qa_multi")
"""Tasks whose answer is chosen among the right and the false ones; the others are written freely."""

# Inputs of training: neither generation nor likelihoods want a loss.
_FOR_TRAINING = ("labels", "boxes", "box_image", "box_identity", "source", "sample_source")


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
    person: Person | None = None,
    settings: dict | None = None,
    progress: bool = False,
) -> list[Answer]:
    """Answer all samples, greedily.

    Questions with false answers are multiple choice: the log-likelihood (sum over tokens) of every candidate.

    Args:
        model: has ``generate``, ``forward`` with ``logits``, and ``device``; in evaluation mode meanwhile.
        processor: has ``encode(sample, add_generation_prompt=False)``, ``collate(encoded, padding_side=...)`` and
            ``tokenizer``.
        samples: evaluation samples, their ids all different.
        path: a ``.jsonl`` file for the answers; those that are there already are not asked again.
        batch_size: rows at once.
        max_new_tokens: longest answer.
        references: what the model is shown: the ``"right"`` photos, ``"none"``, or the ``"wrong"`` ones, of other
            persons.
        write_choices: let the model write its answer to questions with choices too, for a judge to read.
        person: for wrong references, see :func:`with_wrong_references`.
        settings: what else the answers depend on (the model's name ...), kept beside ``path``.
        progress: show a progress bar.

    Returns:
        Answers in the order of ``samples``.

    Raises:
        ValueError: a training sample, two samples of one id, or answers at ``path`` that were made otherwise.
    """
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
    check_choice("references", references, REFERENCES)
    samples = list(samples)
    _check(samples, write_choices)
    made_with = {"references": references, "max_new_tokens": max_new_tokens, "write_choices": write_choices}
    file = AnswerFile(path, made_with | (settings or {})) if path is not None else None
    answers: dict[str, Answer] = {} if file is None else file.answers
    shown = samples
    if references == "none":
        shown = [without_references(sample) for sample in samples]
    elif references == "wrong":
        shown = with_wrong_references(samples, person=person)
    waiting = [number for number in _by_length(samples) if samples[number].id not in answers]
    with evaluating(model), _bar(len(samples), len(samples) - len(waiting), progress) as bar:
        for chunk in _chunks(waiting, samples, batch_size):
            asked = [shown[number] for number in chunk]
            found = _answer(model, processor, asked, batch_size, max_new_tokens, write_choices)
            answers.update({answer.id: answer for answer in found})
            if file is not None:
                file.add(found)
            bar.update(len(chunk))
    return [answers[sample.id] for sample in samples]


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


def generate_texts(
    model: nn.Module, processor, samples: Sequence[Sample], max_new_tokens: int
) -> list[tuple[str, tuple[int, int] | None]]:
    """What the model writes to each sample, in one batch, and height and width of its last picture."""
    encoded = [processor.encode(sample, add_generation_prompt=True) for sample in samples]
    inputs = _look_once(model, model_inputs(model, processor.collate(encoded, padding_side="left")), samples)
    prompt = inputs["input_ids"]
    stops = getattr(getattr(model, "generation_config", None), "stop_strings", None) or []
    stopping = {"tokenizer": processor.tokenizer} if stops else {}
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **stopping)
    # Some models return the new tokens alone.
    if ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
        ids = ids[:, prompt.shape[1] :]
    texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    texts = [cut_at(text, stops) for text in texts]
    sizes = [sample["image_sizes"].tolist() for sample in encoded]
    return [(text.strip(), tuple(size[-1]) if size else None) for text, size in zip(texts, sizes, strict=True)]


def cut_at(text: str, stops: str | Sequence[str]) -> str:
    """``text`` up to the first of ``stops`` (a text, or several) that is in it."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0]
    return text


def answer_likelihoods(model: nn.Module, processor, samples: Sequence[Sample], texts: Sequence[str]) -> list[float]:
    """Log-likelihood of each text as the answer to its sample, in one batch.

    Earlier answers of a conversation count too; they are the same for all candidates of a sample.
    """
    answered = [
        replace(sample, messages=[*sample.messages, Message("assistant", [Part("text", text=text)])])
        for sample, text in zip(samples, texts, strict=True)
    ]
    batch = processor.collate([processor.encode(sample) for sample in answered], padding_side="right")
    logits = model(**_look_once(model, model_inputs(model, batch), answered)).logits[:, :-1]
    labels = batch["labels"].to(logits.device)[:, 1:]
    labelled = labels != -100
    losses = torch.zeros(labels.shape, device=logits.device)
    losses[labelled] = nn.functional.cross_entropy(logits[labelled].float(), labels[labelled], reduction="none")
    return (-losses.sum(1)).tolist()


def _look_once(model: nn.Module, inputs: dict[str, Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Let the vision tower see a picture once a batch, as the candidates of a question show the same ones."""
    paths = [(sample.image_root, path) for sample in samples for path in sample.images]
    first = {path: number for number, path in reversed(list(enumerate(paths)))}
    if len(first) == len(paths) or "pixel_values" not in inputs or not hasattr(model, "image_features"):
        return inputs
    different = sorted(first.values())
    features, grid_size = model.image_features(inputs["pixel_values"][different])
    if grid_size is not None and grid_size[0] != grid_size[1]:
        return inputs  # the model could not tell how its patches stand
    place = {number: row for row, number in enumerate(different)}
    rows = torch.tensor([place[first[path]] for path in paths], device=features.device)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    return rest | {"image_features": features[rows]}


def _answer(
    model: nn.Module, processor, asked: list[Sample], batch_size: int, max_new_tokens: int, write_choices: bool
) -> list[Answer]:
    """Answers to samples of one task."""
    choose = asked[0].task in CHOICE_TASKS
    written: list = [(None, None)] * len(asked)
    if not choose or write_choices:
        written = generate_texts(model, processor, asked, max_new_tokens)
    pairs = [(sample, text) for sample in asked for text in candidates(sample)] if choose else []
    likelihoods: list[float] = []
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        likelihoods += answer_likelihoods(model, processor, *map(list, zip(*some, strict=True)))
    found = iter(likelihoods)
    return [
        Answer(
            id=sample.id,
            prediction=text,
            question=question_text(sample),
            image_size=size,
            likelihoods=tuple(next(found) for _ in candidates(sample)) if choose else None,
        )
        for sample, (text, size) in zip(asked, written, strict=True)
    ]


def _by_length(samples: list[Sample]) -> list[int]:
    """Task by task, as their answers are of like length; the longest prompts first, that memory runs out at once."""

    def key(number: int) -> tuple:
        sample = samples[number]
        letters = sum(len(part.text) for message in sample.messages for part in message.content)
        return _task(sample), -len(sample.images), -letters

    return sorted(range(len(samples)), key=key)


def _chunks(numbers: list[int], samples: list[Sample], size: int) -> Iterator[list[int]]:
    """Batches of one task."""
    start = 0
    while start < len(numbers):
        task = samples[numbers[start]].task
        chunk = [number for number in numbers[start : start + size] if samples[number].task == task]
        yield chunk
        start += len(chunk)


def _task(sample: Sample) -> int:
    return TASK_TYPES.index(sample.task) if sample.task in TASK_TYPES else len(TASK_TYPES)


def _bar(total: int, done: int, progress: bool):
    from tqdm import tqdm  # transformers brings it

    return tqdm(total=total, initial=done, desc="answers", unit="sample", disable=not progress)


def _check(samples: Sequence[Sample], write_choices: bool) -> None:
    seen: set[str] = set()
    for sample in samples:
        place = sample.where or sample.id
        if sample.task is None:
            raise ValueError(f"samples: {place} is a training sample; evaluation samples have type and answer.")
        if sample.id in seen:
            raise ValueError(f"samples: {place} has id={sample.id!r}, as one before it; ids tell answers apart.")
        seen.add(sample.id)
        if sample.task in CHOICE_TASKS and not sample.false_answers and not write_choices:
            raise ValueError(
                f"samples: {place} of type {sample.task!r} has no false_answers to choose among; add some."
            )
