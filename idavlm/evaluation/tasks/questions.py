"""Questions of other benchmarks as samples: fields of a record, checked, with file and line in errors."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from idavlm.data.errors import DataError
from idavlm.data.json_records import JsonRecords
from idavlm.data.parsing import parse_sample
from idavlm.data.schema import Sample


def records_of(path: Path) -> Iterator[tuple[dict, str]]:
    """Records of a ``.jsonl`` file or a JSON list, each with its place."""
    records = JsonRecords(path)
    for number, record in enumerate(records.decode_all()):
        where = records.where(number)
        if isinstance(record, DataError):
            raise record
        if not isinstance(record, dict):
            raise DataError(f"{str(record)[:80]} is no record; expected a JSON object.", where=where)
        yield record, where


def field(record: dict, names: Sequence[str], where: str, *, kind: type | tuple[type, ...] = str) -> Any:
    """The first of the fields ``names`` that the record has; a DataError without one, or of another kind."""
    for name in names:
        if record.get(name) is not None:
            if not isinstance(record[name], kind):
                raise DataError(f"{name}={str(record[name])[:80]!r} is of the wrong kind.", where=where)
            return record[name]
    raise DataError(f"the record has no {' or '.join(map(repr, names))}.", where=where)


def question(
    name: str,
    text: str,
    images: Sequence[str],
    *,
    type: str,
    where: str,
    root: Path,
    answer: str = "",
    identities: Sequence[dict] = (),
) -> Sample:
    """A sample of one question, its pictures before the text, on the checks of :func:`idavlm.data.parse_sample`.

    ``<image>`` in ``text`` puts a picture there instead; there must be as many as pictures then.
    """
    parts = text.split("<image>")
    if len(parts) > 1 and len(parts) != len(images) + 1:
        raise DataError(f"the text holds {len(parts) - 1} <image> but there are {len(images)} pictures.", where=where)
    shown = [{"type": "image", "image": image} for image in images]
    if len(parts) == 1:
        content = [*shown, {"type": "text", "text": f"\n{text}" if shown else text}]
    else:
        content = [{"type": "text", "text": parts[0]}]
        for picture, after in zip(shown, parts[1:], strict=True):
            content += [picture, {"type": "text", "text": after}]
    record = {"id": name, "type": "caption_single", "answer": "-", "identities": list(identities)}
    record["messages"] = [{"role": "user", "content": content}]
    return replace(parse_sample(record, where=where, image_root=root), type=type, answer=answer)


def images_of(record: dict, where: str) -> list[str]:
    """``image`` (a path or several) or ``images``; none is allowed."""
    images = record.get("image", record.get("images"))
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"image={str(images)[:80]} must be a path or a list of paths.", where=where)
    return images
