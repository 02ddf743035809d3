"""Evaluation records of the schema: the six tasks on data of one's own, as the example's held-out characters."""

from collections.abc import Sequence
from pathlib import Path

from idavlm.data import RecordDataset
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ParseBox, score_answers
from idavlm.evaluation.tasks.images import image_size
from idavlm.evaluation.tasks.task import EvaluationTask, Item


def load_records(data: Path, images: Path | None) -> list[Item]:
    """Records of a ``.jsonl`` file; pictures below ``images``, or the folder ``images`` beside the file."""
    return [Item(sample, {"type": sample.task or ""}) for sample in RecordDataset(data, images)]


def score_records(items: Sequence[Item], answers: Sequence[Answer], parse_box: ParseBox | None) -> EvaluationResult:
    """Scores of :func:`idavlm.evaluation.evaluate`."""
    samples = [item.sample for item in items]
    return score_answers(samples, answers, parse_box=parse_box, image_size=image_size)


RECORDS = EvaluationTask(
    name="records",
    about="evaluation records of idavlm's own schema (test.jsonl)",
    load=load_records,
    score=score_records,
    boxes=True,
    judged=("caption_single", "caption_multi"),
)
