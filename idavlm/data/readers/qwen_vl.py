"""Qwen-VL's inline images, ``<img>path</img>``. The line ``Kate is <img>path</img>`` introduces Kate (IDA-VLM)."""

import re
from itertools import pairwise
from typing import Any

from idavlm.data.errors import DataError
from idavlm.data.readers.turns import interleave, new_record, text_of, turns_of

_TAG = re.compile(r"(</?img>)")
_LINE = re.compile(r"[^\n]*+\n?")
_NO_NAME = re.compile(
    r"it|this|that|here|there|he|she|who|what|which|where|"
    r"((the|this|that) )?(image|picture|photo|figure|scene)( ?\d+)?",
    re.IGNORECASE,
)

# Names such as <sks>, but no tag of Qwen-VL.
_NAME = re.compile(r"(?:[^<>]|<(?!(?:ref|box|quad|img)>)[\w-]+>)*")


def reads_as_name(text: str) -> bool:
    """Whether the line "text is <image>" introduces an identity. "This", "Here" and "The image" do not."""
    return bool(text.strip()) and not _NO_NAME.fullmatch(text.strip())


def read_qwen_vl(record: Any, where: str) -> dict[str, Any]:
    """Read ``conversations`` of ``{"from": "user" | "assistant", "value"}``.

    A line of a user turn that consists of ``NAME is <img>path</img>`` is removed from the text, and its image becomes
    a reference photo of the identity NAME. All other images keep their position: they are scenes if the record
    introduces identities, and general images otherwise. Lines like "This is", "Here is" and "The image is" do not
    introduce an identity. ``<ref>`` and ``<box>`` remain text; other words in angle brackets (``<sks>``) may be names.
    """
    identities: dict[str, list[str]] = {}
    messages = []
    for number, (role, value) in enumerate(turns_of(record, "conversations", "from", "value", where)):
        text = text_of(value, f"value of turn {number}", where)
        _check_tags(text, number, where)
        if role == "user":
            text = "".join(line for line in _LINE.findall(text) if not _introduces(line, identities))
        pieces = _TAG.split(text)[::2]  # text, image, text, image, ..., text
        content = interleave(pieces[::2], [image.strip() for image in pieces[1::2]])
        messages.append({"role": role, "content": content})
    return new_record(record, messages, [{"name": name, "images": images} for name, images in identities.items()])


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


def _introduces(line: str, identities: dict[str, list[str]]) -> bool:
    """Whether ``line`` is ``NAME is <img>path</img>``. The photo is added to the identity NAME."""
    name, is_found, rest = line.partition(" is <img>")
    image, is_closed, end = rest.partition("</img>")
    name, end = name.lstrip(" \t"), end.strip(" \t\r\n")
    if not (is_found and is_closed and name) or name[-1].isspace() or "<" in image or ">" in image:
        return False
    if end not in ("", ".", ",", ";") or not reads_as_name(name) or not _NAME.fullmatch(name):
        return False
    identities.setdefault(name, []).append(image.strip())
    return True
