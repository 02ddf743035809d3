"""Evaluation records in the schema of idavlm: the six tasks on own data."""

from collections.abc import Sequence
from pathlib import Path

from idavlm.data import RecordDataset
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ParseBox, score_answers
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.image_files import image_size


def load_records(data: Path, images: Path | None) -> list[Item]:
    """Load a ``.jsonl`` file. Paths are relative to ``images``, by default the folder ``images`` next to the file."""
    return [Item(sample, {"task": sample.task or ""}) for sample in RecordDataset(data, images)]


def score_records(items: Sequence[Item], answers: Sequence[Answer], parse_box: ParseBox | None) -> EvaluationResult:
    """Compute the scores of :func:`idavlm.evaluation.evaluate`."""
    samples = [item.sample for item in items]
    return score_answers(samples, answers, parse_box=parse_box, image_size=image_size)


RECORDS = EvaluationTask(
    name="records",
    description="evaluation records in the schema of idavlm (test.jsonl)",
    load=load_records,
    score=score_records,
    boxes=True,
    judged=("caption_single", "caption_multi"),
)
