"""Conversations of ``{"from", "value"}`` with a placeholder for every picture: LLaVA, Yi-VL, ShareGPT."""

from typing import Any

from idavlm.data.errors import DataError
from idavlm.data.readers.turns import new_record, text_of, text_part, turns_of


def read_llava(record: Any, where: str) -> dict[str, Any]:
    """LLaVA's JSON: ``image`` (a path, a list of paths, or none) and ``<image>`` in the text.

    Pictures stand where their placeholders do; LLaVA itself moves a turn's picture to the front.
    """
    return _read(record, where, "image", "<image>")


def read_yi_vl(record: Any, where: str) -> dict[str, Any]:
    """Yi-VL's JSON: as LLaVA's, with ``<image_placeholder>``."""
    return _read(record, where, "image", "<image_placeholder>")


def read_sharegpt(record: Any, where: str) -> dict[str, Any]:
    """ShareGPT with pictures: ``images`` (a list of paths), ``<image>`` in the text, perhaps a ``system`` string."""
    return _read(record, where, "images", "<image>")


def _read(record: Any, where: str, field: str, placeholder: str) -> dict[str, Any]:
    turns = turns_of(record, "conversations", "from", "value", where)
    images = record.get(field)
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list):
        raise DataError(f"{field} is {type(images).__name__} {str(images)[:80]!r}; expected paths.", where=where)
    if field == "images" and record.get("system"):
        turns = [("system", record["system"]), *turns]
    texts = [text_of(text, f"value of turn {number}", where) for number, (_, text) in enumerate(turns)]
    found = sum(text.count(placeholder) for text in texts)
    if found != len(images):
        raise DataError(
            f"the text holds {found} {placeholder} but {field!r} has {len(images)} pictures; make them equal.",
            where=where,
            kind="placeholders",
        )
    waiting = iter(images)
    messages = []
    for (role, _), text in zip(turns, texts, strict=True):
        first, *others = text.split(placeholder)
        content = text_part(first)
        for other in others:
            content += [{"type": "image", "image": next(waiting)}, *text_part(other)]
        messages.append({"role": role, "content": content})
    return new_record(record, messages)
