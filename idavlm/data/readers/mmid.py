"""MM-ID, the benchmark of IDA-VLM, in its released format (``benchmark_mmid.json``)."""

import json
import re
from typing import Any

from idavlm.data.errors import DataError, quote, shorten
from idavlm.data.readers.qwen_vl import read_qwen_vl
from idavlm.data.readers.turns import Fields, text_of

MMID_TYPES = {
    "matching": "matching",
    "location": "location",
    "QA_singleimage": "qa_single",
    "caption_singleimage": "caption_single",
    "QA_multiimage": "qa_multi",
    "caption_multiimage": "caption_multi",
}
"""Types of MM-ID and the corresponding tasks of the schema."""

_IMAGE = re.compile(r"<img>\s*+(image_\d++)\s*+</img>")
_SLASH = re.compile(r"(?<!\d)/(?!\d)")


def read_mmid(record: Any, where: str) -> dict[str, Any]:
    """Convert an item of MM-ID to an evaluation record of the schema.

    ``NAME is <img>image_N</img>`` introduces an identity, as in Qwen-VL's format. All other images keep their position.
    The ``answer`` of a ``location`` item is a box in pixels of the last image, for the identity ``ground_target``. A
    ``matching`` item asks for the first identity.
    ``false answers`` are separated by slashes, with or without spaces (the file has both). They are optional, because
    one item has none.

    Raises:
        DataError: the type is unknown, the question names an image that the item lacks, or the answer is invalid.
    """
    if not isinstance(record, dict) or "question" not in record or "type" not in record:
        raise DataError("not an item of MM-ID: 'question' or 'type' is missing; use another reader.", where=where)
    fields = Fields(record, where)
    target = fields.take("ground_target")  # of location items
    fields.take("reference_target")  # of matching items: the name of the identity, cut off in one item
    kind = fields.take("type")
    if not isinstance(kind, str) or kind not in MMID_TYPES:
        raise DataError(f"type={quote(kind)} is not known; MM-ID has {', '.join(map(repr, MMID_TYPES))}.", where=where)
    question = text_of(fields.take("question"), "question", where)
    answer = text_of(fields.take("answer"), "answer", where).strip()

    def fill(match: re.Match) -> str:
        if match[1] not in record:
            raise DataError(
                f"question names {shorten(match[1])}, but the item has no such field; add its path.", where=where
            )
        return f"<img>{text_of(fields.take(match[1]), shorten(match[1]), where)}</img>"

    turn = {"from": "user", "value": _IMAGE.sub(fill, question)}
    optional = {name: record[name] for name in ("identities", "boxes") if record.get(name) is not None}
    converted = read_qwen_vl({"id": record.get("id"), "conversations": [turn], **optional}, where)
    converted |= {"type": MMID_TYPES[kind], "answer": answer}
    if kind == "location":
        images = [part["image"] for part in converted["messages"][-1]["content"] if part["type"] == "image"]
        if not images:
            raise DataError("a location item has no scene, only reference photos; add a scene.", where=where)
        target = text_of(target, "ground_target", where).strip()
        converted |= {"answer": "", "target": target}
        try:
            box = json.loads(answer)
        except (ValueError, RecursionError):
            raise DataError(
                f"answer={quote(answer)} of a location item is not [x1, y1, x2, y2].", where=where
            ) from None
        converted["boxes"] = [*converted.get("boxes", []), {"name": target, "image": images[-1], "box": box}]
    elif kind == "matching":
        numbers = range(1, sum(part["type"] == "image" for part in converted["messages"][-1]["content"]) + 1)
        names = [f"Image {number}" for number in numbers]
        if answer not in names:
            choices = shorten(", ".join(names))
            raise DataError(f"answer={quote(answer)} of a matching item; expected one of {choices}.", where=where)
        converted["false_answers"] = [name for name in names if name != answer]
        converted["target"] = converted["identities"][0]["name"] if converted["identities"] else None
    elif "false answers" in record:
        false = text_of(fields.take("false answers"), "false answers", where)
        converted["false_answers"] = [text.strip() for text in _SLASH.split(false) if text.strip()]
    return converted | fields.unused()
