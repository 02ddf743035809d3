"""Conversations of ``{"from", "value"}`` with one placeholder per image: LLaVA, Yi-VL and ShareGPT."""

from itertools import islice
from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.data.readers.turns import interleave, new_record, text_of, turns_of


def read_llava(record: Any, where: str) -> dict[str, Any]:
    """Read LLaVA's format: ``image`` (a path, a list of paths, or absent) and ``<image>`` in the text.

    Images keep the position of their placeholder. (LLaVA's own code moves the image to the front of the turn.)
    """
    return _read(record, where, "image", "<image>")


def read_yi_vl(record: Any, where: str) -> dict[str, Any]:
    """Read Yi-VL's format: LLaVA's with ``<image_placeholder>``."""
    return _read(record, where, "image", "<image_placeholder>")


def read_sharegpt(record: Any, where: str) -> dict[str, Any]:
    """Read ShareGPT with images: ``images`` (a list of paths), ``<image>`` in the text, optional ``system`` text."""
    return _read(record, where, "images", "<image>")


def _read(record: Any, where: str, field: str, placeholder: str) -> dict[str, Any]:
    turns = turns_of(record, "conversations", "from", "value", where)
    images = record.get(field)
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list):
        raise DataError(
            f"{field} is {type(images).__name__} {quote(images)}; expected a path or a list of paths.", where=where
        )
    if field == "images" and record.get("system"):
        turns = [("system", record["system"]), *turns]
    texts = [text_of(text, f"value of turn {number}", where) for number, (_, text) in enumerate(turns)]
    found = sum(text.count(placeholder) for text in texts)
    if found != len(images):
        raise DataError(
            f"the text has {found} {placeholder} but {field!r} has {len(images)} images; the numbers must be equal.",
            where=where,
            kind="placeholders",
        )
    remaining = iter(images)
    messages = []
    for (role, _), text in zip(turns, texts, strict=True):
        pieces = text.split(placeholder)
        messages.append({"role": role, "content": interleave(pieces, list(islice(remaining, len(pieces) - 1)))})
    return new_record(record, messages)
