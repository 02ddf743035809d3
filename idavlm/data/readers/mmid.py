"""MM-ID, the benchmark of IDA-VLM: ``benchmark_mmid.json`` as it was released."""

import json
import re
from typing import Any

from idavlm.data.errors import DataError
from idavlm.data.readers.qwen_inline import read_qwen_vl
from idavlm.data.readers.turns import text_of

MMID_TYPES = {
    "matching": "matching",
    "location": "location",
    "QA_singleimage": "qa_single",
    "caption_singleimage": "caption_single",
    "QA_multiimage": "qa_multi",
    "caption_multiimage": "caption_multi",
}
"""Types as the file names them, and the schema's."""

_IMAGE = re.compile(r"<img>\s*(image_\d+)\s*</img>")
_SLASH = re.compile(r"(?<!\d)\s*/\s*(?!\d)|\s+/\s+")


def read_mmid(record: Any, where: str) -> dict[str, Any]:
    """An item of MM-ID as an evaluation record of the schema.

    ``NAME is <img>image_N</img>`` introduces a person, as in Qwen-VL's records; the other pictures stay where they are.
    ``answer`` of ``location`` is a box in pixels of the last picture, that of ``ground_target``. ``false answers`` are
    parted at slashes, with or without spaces around (the file has both); none is allowed, one item has none.

    Raises:
        DataError: an unknown type, a picture that the question names but the item lacks, an answer that does not fit.
    """
    if not isinstance(record, dict) or "question" not in record or "type" not in record:
        raise DataError("no item of MM-ID: it lacks 'question' or 'type'; is it of another format?", where=where)
    kind = record["type"]
    if kind not in MMID_TYPES:
        raise DataError(f"type={kind!r} is not known; MM-ID has {', '.join(map(repr, MMID_TYPES))}.", where=where)
    question = text_of(record["question"], "question", where)
    answer = text_of(record.get("answer"), "answer", where).strip()

    def fill(match: re.Match) -> str:
        if match[1] not in record:
            raise DataError(f"question names {match[1]}, but the item has no such field; add its path.", where=where)
        return f"<img>{text_of(record[match[1]], match[1], where)}</img>"

    turn = {"from": "user", "value": _IMAGE.sub(fill, question)}
    read = read_qwen_vl({"id": record.get("id"), "conversations": [turn]}, where)
    read |= {"type": MMID_TYPES[kind], "answer": answer}
    if kind == "location":
        images = [part["image"] for part in read["messages"][-1]["content"] if part["type"] == "image"]
        if not images:
            raise DataError("a location item without a scene: every picture introduces somebody.", where=where)
        target = text_of(record.get("ground_target"), "ground_target", where).strip()
        read |= {"answer": "", "target": target}
        read["boxes"] = [{"name": target, "image": images[-1], "box": _box(answer, where)}]
    elif kind == "matching":
        numbers = range(1, sum(part["type"] == "image" for part in read["messages"][-1]["content"]) + 1)
        names = [f"Image {number}" for number in numbers]
        if answer not in names:
            raise DataError(f"answer={answer!r} of a matching item; expected one of {', '.join(names)}.", where=where)
        read["false_answers"] = [name for name in names if name != answer]
        read["target"] = read["identities"][0]["name"] if read["identities"] else None
    elif "false answers" in record:
        false = text_of(record["false answers"], "false answers", where)
        read["false_answers"] = [one.strip() for one in _SLASH.split(false) if one.strip()]
    return read


def _box(answer: str, where: str) -> list[float]:
    try:
        return json.loads(answer)
    except ValueError:
        raise DataError(f"answer={answer!r} of a location item is no [x1, y1, x2, y2].", where=where) from None
