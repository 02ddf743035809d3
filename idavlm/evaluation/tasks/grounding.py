"""Grounding as in RefCOCO, RefCOCO+ and RefCOCOg: predict the box of an expression; correct at IoU 0.5."""

from dataclasses import replace
from pathlib import Path

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.scoring import MAX_EDGE
from idavlm.evaluation.tasks.base import EvaluationTask, Item, score_items
from idavlm.evaluation.tasks.benchmark_records import (
    field,
    iterate_records,
    optional_field,
    question_sample,
)


def load_grounding(data: Path, images: Path | None) -> list[Item]:
    """Load records ``{"image", "sent", "bbox"}``, the format of Qwen-VL's RefCOCO files.

    ``sent`` may be called ``expression`` or ``phrase``. ``bbox`` is ``[x1, y1, x2, y2]`` in pixels, or COCO's
    ``[x, y, width, height]`` with ``"bbox_format": "xywh"``; ``[]`` if nothing in the image is meant. Optional fields:
    ``text`` (the question, by default "Where is ...?"), ``height`` and ``width`` (needed if the image file is missing),
    ``split`` (row of the table, by default the name of the file).
    """
    root = images if images is not None else data.parent
    items = []
    for number, (record, where) in enumerate(iterate_records(data)):
        image = field(record, ("image", "img_name"), where)
        phrase = field(record, ("sent", "expression", "phrase"), where)
        sample_id = optional_field(record, ("id", "question_id"), where, kinds=(str, int))
        text = optional_field(record, ("text",), where) or f"Where is {phrase}?"
        question = {"id": number if sample_id is None else sample_id, "text": text, "image": image}
        box = _box(record, where)
        question["boxes"] = [{"name": phrase, "image": image, "box": box}] if box else []
        answer = "" if box else "not here"
        sample = replace(question_sample(question, where, root=root, task="location", answer=answer), target=phrase)
        split = optional_field(record, ("split",), where) or data.stem
        items.append(Item(sample, {"split": split}, {"size": _size(record, where)}))
    return items


def _size(record: dict, where: str) -> tuple[int, int] | None:
    """Height and width of the image, if the record has them."""
    size = [optional_field(record, (name,), where, kinds=(int,)) for name in ("height", "width")]
    if size == [None, None]:
        return None
    if None in size or not all(1 <= side <= MAX_EDGE for side in size):
        height, width = map(quote, size)
        raise DataError(f"height={height} and width={width} must both be pixels, from 1 to {MAX_EDGE}.", where=where)
    return size[0], size[1]


def _box(record: dict, where: str) -> list[float]:
    box = field(record, ("bbox", "box"), where, kinds=(list,))
    if not box:
        return box
    numbers = [edge for edge in box if isinstance(edge, (int, float)) and not isinstance(edge, bool)]
    if len(box) != 4 or len(numbers) != 4 or not all(abs(edge) <= MAX_EDGE for edge in numbers):
        raise DataError(f"bbox={quote(box)} must be four numbers [x1, y1, x2, y2] in pixels.", where=where)
    box_format = optional_field(record, ("bbox_format",), where) or "xyxy"
    if box_format not in ("xyxy", "xywh"):
        raise DataError(f"bbox_format={quote(box_format)} is not known; choose 'xyxy' or 'xywh'.", where=where)
    if box_format == "xywh":
        box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    if not (box[0] < box[2] and box[1] < box[3]):
        raise DataError(f"bbox={box} is empty; set 'bbox_format': 'xywh' if it is [x, y, width, height].", where=where)
    return box


GROUNDING = EvaluationTask(
    name="grounding",
    description="grounding as in RefCOCO: the box of an expression, accuracy at IoU 0.5",
    load=load_grounding,
    score=score_items,
    boxes=True,
)
