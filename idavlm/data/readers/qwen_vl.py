"""Qwen-VL's inline images, ``<img>path</img>``. The line ``Kate is <img>path</img>`` introduces Kate (IDA-VLM)."""

import re
from typing import Any

from idavlm.data.errors import DataError
from idavlm.data.readers.turns import interleave, new_record, text_of, turns_of

_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_REFERENCE = re.compile(
    r"^[ \t]*(?P<name>[^\n<>]*?\S) is <img>(?P<image>[^\n<>]*)</img>[ \t]*[.,;]?[ \t]*(?:\n|\Z)", re.M
)
_NO_NAME = re.compile(
    r"it|this|that|here|there|he|she|who|what|which|where|"
    r"((the|this|that) )?(image|picture|photo|figure|scene)( ?\d+)?",
    re.IGNORECASE,
)


def read_qwen_vl(record: Any, where: str) -> dict[str, Any]:
    """Read ``conversations`` of ``{"from": "user" | "assistant", "value"}``.

    A line of a user turn that consists of ``NAME is <img>path</img>`` is removed from the text, and its image becomes
    a reference photo of the identity NAME. All other images keep their position: they are scenes if the record
    introduces identities, and general images otherwise. Lines like "This is", "Here is" and "The image is" do not
    introduce an identity. ``<ref>`` and ``<box>`` remain text.
    """
    identities: dict[str, list[str]] = {}

    def introduce(match: re.Match) -> str:
        if _NO_NAME.fullmatch(match["name"]):
            return match[0]
        identities.setdefault(match["name"], []).append(match["image"].strip())
        return ""

    messages = []
    for number, (role, value) in enumerate(turns_of(record, "conversations", "from", "value", where)):
        text = text_of(value, f"value of turn {number}", where)
        opened, closed, pairs = text.count("<img>"), text.count("</img>"), len(_IMAGE.findall(text))
        if not opened == closed == pairs:
            raise DataError(
                f"turn {number} has {opened} <img> but {closed} </img>, {pairs} complete pairs; close every <img>.",
                where=where,
                kind="placeholders",
            )
        if role == "user":
            text = _REFERENCE.sub(introduce, text)
        pieces = _IMAGE.split(text)
        content = interleave(pieces[::2], [image.strip() for image in pieces[1::2]])
        messages.append({"role": role, "content": content})
    return new_record(record, messages, [{"name": name, "images": images} for name, images in identities.items()])
