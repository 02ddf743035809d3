"""HumanRef: boxes of all people that an expression describes, or none (RexSeek, arXiv 2503.08507)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import MAX_EDGE
from idavlm.evaluation.tasks.base import EvaluationTask, Item, ReadBoxes
from idavlm.evaluation.tasks.benchmark_records import field, iterate_records, optional_field, question_sample
from idavlm.evaluation.tasks.constant_answers import constant_answer_table
from idavlm.models.boxes import BoxFormat, box_iou
from idavlm.utils.answer_parsing import is_refusal, says_absent

QUESTION = "Please detect {} in this image. Write a box for each, or none if there is none."

THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]
"""IoU from which a box counts; scores are means over them. Computed as in the released scorer, in binary floats."""


def load_human_ref(data: Path, images: Path | None) -> list[Item]:
    """Load ``annotations.jsonl``, or the folder of the release. Images are in the folder ``images`` next to the file.

    Records are ``{"id", "image_name", "referring", "domain", "sub_domain", "candidate_boxes", "answer_boxes"}``, boxes
    in pixels. Records of the domain ``rejection`` have no answer, all others at least one. ``answer_segmentations``,
    for models that answer with points, are not used.
    """
    data = data / "annotations.jsonl" if data.is_dir() else data
    root = images if images is not None else data.parent / "images"
    items = []
    for record, where in iterate_records(data):
        domain = field(record, ("domain",), where)
        sub_domain = optional_field(record, ("sub_domain",), where) or domain
        referring = field(record, ("referring",), where)
        right, everybody = (_boxes(record, name, where) for name in ("answer_boxes", "candidate_boxes"))
        if (domain == "rejection") == bool(right):
            raise DataError(
                f"domain={quote(domain)} with {len(right)} answer_boxes; records of the domain 'rejection' have none, "
                "all others at least one.",
                where=where,
            )
        question = {"id": field(record, ("id",), where, kinds=(str, int)), "text": QUESTION.format(referring)}
        question["image"] = field(record, ("image_name",), where)
        sample = question_sample(question, where, root=root, task="human_ref")
        groups = {"domain": domain, "sub_domain": sub_domain, "people": _people(len(right))}
        items.append(Item(sample, groups, {"boxes": right, "candidates": everybody}))
    return items


def _boxes(record: dict, name: str, where: str) -> list[list[float]]:
    boxes = optional_field(record, (name,), where, kinds=(list,))
    if boxes is None:
        raise DataError(f"the record has no {name!r}; write [] if there is none.", where=where)
    for box in boxes:
        numbers = [edge for edge in box if type(edge) in (int, float)] if isinstance(box, list) else []
        is_box = len(numbers) == 4 == len(box) and all(abs(edge) <= MAX_EDGE for edge in numbers)
        if not is_box or not (box[0] < box[2] and box[1] < box[3]):
            raise DataError(f"{name} holds {quote(box)}; expected [x1, y1, x2, y2] in pixels.", where=where)
    return boxes


def _people(count: int) -> str:
    return "none" if count == 0 else "1" if count == 1 else "2-5" if count <= 5 else "6-10" if count <= 10 else ">10"


def score_human_ref(items: Sequence[Item], answers: Sequence[Answer], read_boxes: ReadBoxes | None) -> EvaluationResult:
    """Score ``density_f1``, ``recall`` and ``precision``, means over :data:`THRESHOLDS`, or ``rejection``.

    ``rejection`` is for expressions that describe nobody. ``density_f1`` is F1, times the number of right boxes over
    that of written boxes if more are written. Every metric has a twin ``released_...`` with the value of the released
    scorer, which

    - matches every right box in turn with its best written box, which may take that of a later one; here the number of
      matches is the largest possible;
    - counts everything that holds no box as a correct rejection: an empty answer, a refusal, numbers of another box
      format. ``rejection`` needs an answer that says that there is nobody;
    - gives ``density_f1`` 0 to a record without candidate boxes.
    """
    if read_boxes is None:
        raise ValueError("read_box=None, but HumanRef asks for boxes; pass BoxFormat(kind).read_boxes.")
    predictions = []
    for item, answer in zip(items, answers, strict=True):
        text, right = answer.prediction or "", item.extra["boxes"]
        boxes, reason = read_boxes(text, answer.image_size or item.image_size())
        boxes = [box for box in boxes if all(abs(edge) < MAX_EDGE for edge in box)]
        refused = reason == "none" and is_refusal(text)
        says_nobody = reason == "none" and not refused and says_absent(text)
        if right:
            scores = {**_scores(right, boxes, _most_matches)}
            released = _scores(right, boxes, _released_matches)
            if not item.extra["candidates"]:
                released["density_f1"] = 0.0
            scores |= {f"released_{name}": value for name, value in released.items()}
        else:
            scores = {"rejection": float(says_nobody), "released_rejection": float(not boxes)}
        problem = "refused" if refused else "other box format" if reason == "convention" else ""
        parsed = bool(boxes) or says_nobody
        task = "human_ref" if right else "rejection"
        predictions.append(Prediction(item.sample.id, task, text, "", scores, parsed=parsed, problem=problem))
    return EvaluationResult(predictions)


def _scores(right: list[list[float]], boxes: list[list[float]], count_matches) -> dict[str, float]:
    rows: dict[str, list[float]] = {"density_f1": [], "recall": [], "precision": []}
    for threshold in THRESHOLDS:
        matches = count_matches(right, boxes, threshold)
        recall, precision = matches / len(right), matches / len(boxes) if boxes else 0.0
        f1 = 2 * recall * precision / (recall + precision) if matches else 0.0
        rows["density_f1"].append(f1 * min(1.0, len(right) / max(1, len(boxes))))
        rows["recall"].append(recall)
        rows["precision"].append(precision)
    return {name: fmean(values) for name, values in rows.items()}


def _released_matches(right: list[list[float]], boxes: list[list[float]], threshold: float) -> int:
    """Matches of each right box in turn with the unused box of the largest IoU."""
    used: set[int] = set()
    for gold in right:
        ious = [(box_iou(gold, box), -number) for number, box in enumerate(boxes) if number not in used]
        best, number = max(ious, default=(0.0, 0))
        if best >= threshold:
            used.add(-number)
    return len(used)


def _most_matches(right: list[list[float]], boxes: list[list[float]], threshold: float) -> int:
    """The largest number of pairs of a right box and a written one, by augmenting paths."""
    fits = [[number for number, box in enumerate(boxes) if box_iou(gold, box) >= threshold] for gold in right]
    gold_of: dict[int, int] = {}
    for start in range(len(right)):
        # A breadth-first search; ``reached[box]`` is the right box from which it was reached.
        reached: dict[int, int] = {}
        queue, free = [start], None
        while queue and free is None:
            gold = queue.pop(0)
            for number in fits[gold]:
                if number in reached:
                    continue
                reached[number] = gold
                if number not in gold_of:
                    free = number
                    break
                queue.append(gold_of[number])
        while free is not None:
            gold = reached[free]
            before = next((number for number, other in gold_of.items() if other == gold), None)
            if before is not None:
                del gold_of[before]
            gold_of[free] = gold
            free = before
    return len(gold_of)


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    counts = sum(prediction.scores.get("released_rejection", 0.0) for prediction in result.predictions)
    text = f"Rejection score of the released scorer, a number of records: {counts:.0f}."
    constants = {"no box": "[]", "all candidates": lambda item: str(item.extra["candidates"])}
    read_boxes = BoxFormat("pixels").read_boxes
    table = constant_answer_table(items, lambda items, answers: score_human_ref(items, answers, read_boxes), constants)
    return f"{text}\n\n{table}"


HUMAN_REF = EvaluationTask(
    name="human_ref",
    description="HumanRef: boxes of all people that an expression describes, or none (folder of the release)",
    load=load_human_ref,
    score=score_human_ref,
    boxes=True,
    several_boxes=True,
    summary=_summary,
    max_new_tokens=512,
)
