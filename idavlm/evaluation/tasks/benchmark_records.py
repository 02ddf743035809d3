"""Convert records of other benchmarks to samples, with checks whose errors name file and line."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from idavlm.data.dataset import JsonRecords
from idavlm.data.errors import DataError
from idavlm.data.parsing import parse_sample
from idavlm.data.schema import Sample


def iterate_records(path: Path) -> Iterator[tuple[dict, str]]:
    """Records of a ``.jsonl`` file or a JSON list, each with its file and line for error messages."""
    records = JsonRecords(path)
    for number, record in enumerate(records.decode_all()):
        where = records.where(number)
        if isinstance(record, DataError):
            raise record
        if not isinstance(record, dict):
            raise DataError(f"{str(record)[:80]} is not a record; expected a JSON object.", where=where)
        yield record, where


def field(record: dict, names: Sequence[str], where: str, *, kinds: tuple[type, ...] = (str,)) -> Any:
    """Value of the first field of ``names`` that the record has.

    Raises:
        DataError: none of the fields exists, or the value is not an instance of one of ``kinds``.
    """
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        raise DataError(f"the record has no {' or '.join(map(repr, names))}.", where=where)
    if not isinstance(record[name], kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(
            f"{name}={str(record[name])[:80]!r} has type {type(record[name]).__name__}; expected {expected}.",
            where=where,
        )
    return record[name]


def question_sample(record: dict, where: str, *, root: Path, task: str, answer: str = "") -> Sample:
    """A sample with one question, checked by :func:`idavlm.data.parse_sample`.

    Args:
        record: ``{"id", "text"}`` (or ``question_id``, ``question``), and optionally ``image`` (or ``images``; a path
            or a list of paths) and ``identities``, as in the schema. Images are placed before the text, or at its
            ``<image>`` placeholders if it has any.
        where: file and line, for error messages.
        root: folder that the paths are relative to.
        task: task of the sample; need not be one of the schema.
        answer: the right answer.

    Raises:
        DataError: a field is missing or of another type, or the number of placeholders is not that of the images.
    """
    sample_id = str(field(record, ("question_id", "id"), where, kinds=(str, int)))
    text = field(record, ("text", "question"), where)
    images = record.get("image", record.get("images"))
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"image={str(images)[:80]} must be a path or a list of paths.", where=where)
    parts = text.split("<image>")
    if len(parts) == 1:
        parts = [""] * len(images) + [f"\n{text}" if images else text]
    if len(parts) != len(images) + 1:
        raise DataError(f"the text has {len(parts) - 1} <image> placeholders for {len(images)} images.", where=where)
    content = [{"type": "text", "text": parts[0]}] if parts[0] else []
    for image, after in zip(images, parts[1:], strict=True):
        content.append({"type": "image", "image": image})
        if after:
            content.append({"type": "text", "text": after})
    # The schema knows six tasks; ``task`` and ``answer`` are set after its checks.
    valid = {"id": sample_id, "type": "caption_single", "answer": "-", "identities": record.get("identities", [])}
    valid["messages"] = [{"role": "user", "content": content}]
    return replace(parse_sample(valid, where=where, image_root=root), task=task, answer=answer)
