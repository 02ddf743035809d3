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


def field(record: dict, names: Sequence[str], where: str, *, kind: type | tuple[type, ...] = str) -> Any:
    """Value of the first field of ``names`` that the record has.

    Raises:
        DataError: none of the fields exists, or the value is not an instance of ``kind``.
    """
    for name in names:
        if record.get(name) is not None:
            if not isinstance(record[name], kind):
                raise DataError(
                    f"{name}={str(record[name])[:80]!r} has type {type(record[name]).__name__}; expected "
                    f"{_type_names(kind)}.",
                    where=where,
                )
            return record[name]
    raise DataError(f"the record has no {' or '.join(map(repr, names))}.", where=where)


def question_sample(
    sample_id: str,
    text: str,
    images: Sequence[str],
    *,
    task: str,
    where: str,
    root: Path,
    answer: str = "",
    identities: Sequence[dict] = (),
) -> Sample:
    """A sample with one question, checked by :func:`idavlm.data.parse_sample`.

    Args:
        sample_id: id of the sample.
        text: the question. Images are placed before it, or at its ``<image>`` placeholders if it has any.
        images: paths of the images.
        task: task of the sample; need not be one of the schema.
        where: file and line, for error messages.
        root: folder that the paths are relative to.
        answer: the right answer.
        identities: as in the schema.

    Raises:
        DataError: the number of placeholders differs from the number of images.
    """
    parts = text.split("<image>")
    if len(parts) > 1 and len(parts) != len(images) + 1:
        raise DataError(f"the text has {len(parts) - 1} <image> placeholders for {len(images)} images.", where=where)
    image_parts = [{"type": "image", "image": image} for image in images]
    if len(parts) == 1:
        content = [*image_parts, {"type": "text", "text": f"\n{text}" if image_parts else text}]
    else:
        content = [{"type": "text", "text": parts[0]}]
        for image_part, after in zip(image_parts, parts[1:], strict=True):
            content += [image_part, {"type": "text", "text": after}]
    record = {"id": sample_id, "type": "caption_single", "answer": "-", "identities": list(identities)}
    record["messages"] = [{"role": "user", "content": content}]
    return replace(parse_sample(record, where=where, image_root=root), task=task, answer=answer)


def images_of(record: dict, where: str) -> list[str]:
    """Image paths of a record: ``image`` (a path or a list) or ``images``; [] if it has neither."""
    images = record.get("image", record.get("images"))
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"image={str(images)[:80]} must be a path or a list of paths.", where=where)
    return images


def _type_names(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
