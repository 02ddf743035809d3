"""Convert records of other benchmarks to samples, with checks whose errors name file and line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.data.json_records import JsonRecords
from idavlm.data.parsing import parse_sample
from idavlm.data.schema import Sample
from idavlm.utils import read_json_object

_TYPE_NAMES = {bool: "true or false", str: "a text", int: "an integer", float: "a number", list: "a list"}


def iterate_records(path: Path) -> Iterator[tuple[dict, str]]:
    """Records of a ``.jsonl`` file or a JSON list, each with its file and line for error messages.

    Raises:
        DataError: the file cannot be read, or a record is not a JSON object of valid Unicode.
    """
    records = JsonRecords(path)
    for number, record in enumerate(records.decode_all()):
        where = records.where(number)
        if isinstance(record, DataError):
            raise record
        if not isinstance(record, dict):
            raise DataError(f"{quote(record)} is not a record; expected a JSON object.", where=where)
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except RecursionError:
            raise DataError("the record is nested too deeply; simplify it.", where=where) from None
        except UnicodeEncodeError:
            message = "the record holds half a surrogate pair, which no file can store; repair its text."
            raise DataError(message, where=where) from None
        yield record, where


def read_object(path: Path, *, remedy: str = "pass the folder of the release") -> dict[str, Any]:
    """The JSON object in a file of a benchmark.

    Raises:
        DataError: the file is missing, with the ``remedy``, or holds something else.
    """
    try:
        return read_json_object(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {remedy}.") from None
    except ValueError as error:
        raise DataError(str(error)) from None


def field(record: dict, names: Sequence[str], where: str, *, kinds: tuple[type, ...] = (str,)) -> Any:
    """Value of the field of ``names`` that the record has; null is no value, and a text must not be blank.

    Raises:
        DataError: the record has none of the fields or several, or the value is not an instance of one of ``kinds``.
    """
    value = optional_field(record, names, where, kinds=kinds)
    if value is None:
        raise DataError(f"the record has no {' or '.join(map(repr, names))}.", where=where)
    return value


def optional_field(record: dict, names: Sequence[str], where: str, *, kinds: tuple[type, ...] = (str,)) -> Any:
    """As :func:`field`, but None if the record has none of the fields."""
    present = [name for name in names if record.get(name) is not None]
    if not present:
        return None
    if len(present) > 1:
        raise DataError(
            f"the record has {' and '.join(map(repr, present))}, which mean the same; keep one.", where=where
        )
    name, value = present[0], record[present[0]]
    # In Python, True is an integer.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(_TYPE_NAMES[kind] for kind in kinds)
        raise DataError(f"{name}={quote(value)} must be {expected}.", where=where)
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{name}={quote(value)} is blank; write a text, or remove the field.", where=where)
    return value


def question_sample(record: dict, where: str, *, root: Path, task: str, answer: str = "") -> Sample:
    """A sample with one question, checked by :func:`idavlm.data.parse_sample`.

    Args:
        record: ``{"id", "text"}`` (or ``question_id``, ``question``), and optionally ``image`` (or ``images``; a path
            or a list of paths), ``identities`` and ``boxes``, as in the schema. Images are placed before the text, or
            at its ``<image>`` placeholders if it has any.
        where: file and line, for error messages.
        root: folder that the paths are relative to.
        task: task of the sample; need not be one of the schema.
        answer: the right answer.

    Raises:
        DataError: a field is missing or of another type, or the number of placeholders is not that of the images.
    """
    sample_id = str(field(record, ("question_id", "id"), where, kinds=(str, int)))
    text = field(record, ("text", "question"), where)
    images = optional_field(record, ("image", "images"), where, kinds=(str, list))
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not all(isinstance(image, str) for image in images):
        raise DataError(f"image={quote(images)} must be a path or a list of paths.", where=where)
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
    valid["boxes"] = record.get("boxes", [])
    valid["messages"] = [{"role": "user", "content": content}]
    return replace(parse_sample(valid, where=where, image_root=root), task=task, answer=answer)
