"""Qwen-VL's inline images, ``<img>path</img>``. The line ``Kate is <img>path</img>`` introduces Kate (IDA-VLM)."""

import re
from itertools import pairwise
from typing import Any

from idavlm.data.errors import DataError
from idavlm.data.introductions import read_introduction
from idavlm.data.readers.turns import Fields, interleave, text_of

_TAG = re.compile(r"(</?img>)")
_LINE = re.compile(r"[^\n]*+\n?")


def read_qwen_vl(record: Any, where: str) -> dict[str, Any]:
    """Read ``conversations`` of ``{"from": "user" | "assistant", "value"}``.

    A line of a user turn that consists of introductions, ``NAME is <img>path</img>``, is removed from the text, and its
    images become reference photos of the identities NAME; see :func:`idavlm.data.introductions.read_introduction`. All
    other images keep their position: they are scenes if the record introduces identities, and general images
    otherwise. ``<ref>`` and ``<box>`` remain text; other words in angle brackets (``<sks>``) may be names.
    """
    fields = Fields(record if isinstance(record, dict) else {}, where)
    identities: dict[str, list[str]] = {}
    messages = []
    for number, (role, value) in enumerate(fields.turns("conversations", "from", "value")):
        text = text_of(value, f"value of turn {number}", where)
        _check_tags(text, number, where)
        if role == "user":
            text = "".join(_without_introduction(line, identities) for line in _LINE.findall(text))
        pieces = _TAG.split(text)[::2]  # text, image, text, image, ..., text
        content = interleave(pieces[::2], [image.strip() for image in pieces[1::2]])
        messages.append({"role": role, "content": content})
    return fields.new_record(messages, [{"name": name, "images": images} for name, images in identities.items()])


def _check_tags(text: str, number: int, where: str) -> None:
    """Check that ``<img>`` and ``</img>`` alternate."""
    tags = _TAG.findall(text)
    opened, closed = tags.count("<img>"), tags.count("</img>")
    pairs = sum(pair == ("<img>", "</img>") for pair in pairwise(tags))
    if not opened == closed == pairs:
        raise DataError(
            f"turn {number} has {opened} <img> but {closed} </img>, {pairs} complete pairs; close every <img>.",
            where=where,
            kind="placeholders",
        )


def _without_introduction(line: str, identities: dict[str, list[str]]) -> str:
    """Return what is left of a line without the introductions, whose photos are added to ``identities``."""
    pieces = _TAG.split(line)
    tags = pieces[1::2]
    if not tags or tags != ["<img>", "</img>"] * (len(tags) // 2):  # an image may be broken over lines
        return line
    texts, images = pieces[::4], pieces[2::4]
    if any("<" in image or ">" in image for image in images):
        return line
    found = read_introduction(texts)
    if found is None:
        return line
    for name, image in zip(found.names, images, strict=True):
        identities.setdefault(name, []).append(image.strip())
    end = line[len(line.rstrip("\r\n")) :]
    return found.rest + end if found.rest else ""
