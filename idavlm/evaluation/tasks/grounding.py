"""Grounding as in RefCOCO, RefCOCO+ and RefCOCOg: a box for an expression, right at IoU 0.5."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from idavlm.data.errors import DataError
from idavlm.data.schema import Box
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ParseBox, score_answers
from idavlm.evaluation.tasks.images import image_size
from idavlm.evaluation.tasks.questions import field, question, records_of
from idavlm.evaluation.tasks.task import EvaluationTask, Item


def load_grounding(data: Path, images: Path | None) -> list[Item]:
    """Records ``{"image", "sent", "bbox"}``, as Qwen-VL's files of RefCOCO.

    ``sent`` may be called ``expression`` or ``phrase``. ``bbox`` is ``[x1, y1, x2, y2]`` in pixels, or with
    ``"bbox_format": "xywh"`` COCO's ``[x, y, width, height]``. ``text`` is the question, if not "Where is ...?";
    ``height`` and ``width`` serve where the picture is not there; ``split`` names the row of the table, if not the
    file.
    """
    root = images if images is not None else data.parent
    items, seen = [], set()
    for number, (record, where) in enumerate(records_of(data)):
        image, phrase = (
            field(record, ("image", "img_name"), where),
            field(record, ("sent", "expression", "phrase"), where),
        )
        name = str(record.get("id", record.get("question_id", number)))
        if name in seen:
            raise DataError(f"id={name!r} is there twice.", where=where)
        seen.add(name)
        text = record.get("text") or f"Where is {phrase}?"
        asked = question(name, text, [image], type="location", where=where, root=root)
        box = Box(phrase, image, _box(record, where))
        size = (record["height"], record["width"]) if {"height", "width"} <= record.keys() else None
        group = {"split": str(record.get("split", data.stem))}
        items.append(Item(replace(asked, target=phrase, boxes=[box]), group, {"size": size}))
    return items


def score_grounding(items: Sequence[Item], answers: Sequence[Answer], parse_box: ParseBox | None) -> EvaluationResult:
    """``acc@0.5`` and ``mean_iou``."""
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
        raise DataError(f"bbox={box} must be four numbers.", where=where)
    form = record.get("bbox_format", "xyxy")
    if form not in ("xyxy", "xywh"):
        raise DataError(f"bbox_format={form!r} is not known; choose 'xyxy' or 'xywh'.", where=where)
    if form == "xywh":
        box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    if not (box[0] < box[2] and box[1] < box[3]):
        raise DataError(f"bbox={box} is empty; is it of 'bbox_format': 'xywh'?", where=where)
    return box


GROUNDING = EvaluationTask(
    name="grounding",
    about="a box for an expression, as RefCOCO: accuracy at IoU 0.5",
    load=load_grounding,
    score=score_grounding,
    boxes=True,
)
