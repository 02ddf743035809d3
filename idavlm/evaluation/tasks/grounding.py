"""Grounding as in RefCOCO, RefCOCO+ and RefCOCOg: predict the box of an expression; correct at IoU 0.5."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from idavlm.data.errors import DataError
from idavlm.data.schema import Box
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ParseBox, score_answers
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import field, iterate_records, question_sample
from idavlm.evaluation.tasks.image_files import image_size


def load_grounding(data: Path, images: Path | None) -> list[Item]:
    """Load records ``{"image", "sent", "bbox"}``, the format of Qwen-VL's RefCOCO files.

    ``sent`` may be called ``expression`` or ``phrase``. ``bbox`` is ``[x1, y1, x2, y2]`` in pixels, or COCO's
    ``[x, y, width, height]`` with ``"bbox_format": "xywh"``. Optional fields: ``text`` (the question, by default "Where
    is ...?"), ``height`` and ``width`` (needed if the image file is missing), ``split`` (row of the table, by default
    the name of the file).
    """
    root = images if images is not None else data.parent
    items, ids = [], set()
    for number, (record, where) in enumerate(iterate_records(data)):
        image = field(record, ("image", "img_name"), where)
        phrase = field(record, ("sent", "expression", "phrase"), where)
        sample_id = str(record.get("id", record.get("question_id", number)))
        if sample_id in ids:
            raise DataError(f"id={sample_id!r} is not unique; use a different id for every record.", where=where)
        ids.add(sample_id)
        text = record.get("text") or f"Where is {phrase}?"
        sample = question_sample(sample_id, text, [image], task="location", where=where, root=root)
        box = Box(phrase, image, _box(record, where))
        size = (record["height"], record["width"]) if {"height", "width"} <= record.keys() else None
        group = {"split": str(record.get("split", data.stem))}
        items.append(Item(replace(sample, target=phrase, boxes=[box]), group, {"size": size}))
    return items


def score_grounding(items: Sequence[Item], answers: Sequence[Answer], parse_box: ParseBox | None) -> EvaluationResult:
    """Score ``acc@0.5`` and ``mean_iou``."""
    sizes = {item.sample.id: item.extra["size"] for item in items}
    samples = [item.sample for item in items]
    return score_answers(
        samples,
        answers,
        parse_box=parse_box,
        image_size=lambda sample: sizes[sample.id] or image_size(sample),
    )


def _box(record: dict, where: str) -> list[float]:
    box = field(record, ("bbox", "box"), where, kind=list)
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
    score=score_grounding,
    boxes=True,
)
