"""Grounding as in RefCOCO, RefCOCO+ and RefCOCOg: predict the box of an expression; correct at IoU 0.5."""

from dataclasses import replace
from pathlib import Path

from idavlm.data.errors import DataError
from idavlm.data.schema import Box
from idavlm.evaluation.tasks.base import EvaluationTask, Item, score_items
from idavlm.evaluation.tasks.benchmark_records import field, iterate_records, question_sample


def load_grounding(data: Path, images: Path | None) -> list[Item]:
    """Load records ``{"image", "sent", "bbox"}``, the format of Qwen-VL's RefCOCO files.

    ``sent`` may be called ``expression`` or ``phrase``. ``bbox`` is ``[x1, y1, x2, y2]`` in pixels, or COCO's
    ``[x, y, width, height]`` with ``"bbox_format": "xywh"``. Optional fields: ``text`` (the question, by default "Where
    is ...?"), ``height`` and ``width`` (needed if the image file is missing), ``split`` (row of the table, by default
    the name of the file).
    """
    root = images if images is not None else data.parent
    items: dict[str, Item] = {}
    for number, (record, where) in enumerate(iterate_records(data)):
        image = field(record, ("image", "img_name"), where)
        phrase = field(record, ("sent", "expression", "phrase"), where)
        sample_id = str(record.get("id", record.get("question_id", number)))
        if sample_id in items:
            raise DataError(f"id={sample_id!r} is not unique; use a different id for every record.", where=where)
        question = {"id": sample_id, "text": record.get("text") or f"Where is {phrase}?", "image": image}
        sample = question_sample(question, where, root=root, task="location")
        sample = replace(sample, target=phrase, boxes=[Box(phrase, image, _box(record, where))])
        size = (record["height"], record["width"]) if {"height", "width"} <= record.keys() else None
        items[sample_id] = Item(sample, {"split": str(record.get("split", data.stem))}, {"size": size})
    return list(items.values())


def _box(record: dict, where: str) -> list[float]:
    box = field(record, ("bbox", "box"), where, kinds=(list,))
    if len(box) != 4 or not all(isinstance(edge, (int, float)) for edge in box):
        raise DataError(f"bbox={box} must be four numbers [x1, y1, x2, y2].", where=where)
    box_format = record.get("bbox_format", "xyxy")
    if box_format not in ("xyxy", "xywh"):
        raise DataError(f"bbox_format={box_format!r} is not known; choose 'xyxy' or 'xywh'.", where=where)
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
