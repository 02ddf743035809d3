"""What an evaluation leaves behind: one prediction a record, one summary a task."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from idavlm.data.schema import TASK_TYPES

MAIN_METRICS = {
    "matching": ("accuracy",),
    "location": ("acc@0.5",),
    "qa_single": ("accuracy", "closest_accuracy"),
    "caption_single": ("clause_recall", "name_f1"),
    "qa_multi": ("accuracy", "closest_accuracy"),
    "caption_multi": ("clause_recall", "name_f1"),
}
"""The one number that stands for a task where there is room for one: the first of these that there is."""


def main_metric(task: str, metrics: Iterable[str]) -> str | None:
    """The main one of ``metrics``; of tasks beyond the six the first, and None where there is none."""
    metrics = list(metrics)
    found = [metric for metric in MAIN_METRICS.get(task, metrics) if metric in metrics]
    return found[0] if found else None


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one record.

    Attributes:
        id: the record's.
        type: one of :data:`idavlm.data.schema.TASK_TYPES`.
        text: what the model wrote, or for questions with choices, what it found likeliest.
        answer: the right text; "" for location.
        box: what ``text`` points at, pixels of the original image; location only, None where it cannot be read.
        gold_box: the right box; location only.
        scores: metric -> 0..1. An answer that cannot be read scores 0.
        chance: metric -> what guessing would score here; metrics without an entry have no such number.
        parsed: whether the answer could be read.
    """

    id: str
    type: str
    text: str
    answer: str
    scores: dict[str, float]
    chance: dict[str, float] = field(default_factory=dict)
    box: list[float] | None = None
    gold_box: list[float] | None = None
    parsed: bool = True

    @property
    def main_score(self) -> float | None:
        metric = main_metric(self.task, self.scores)
        return None if metric is None else self.scores[metric]


@dataclass(frozen=True)
class EvaluationResult:
    """Predictions in the order of the records; summaries are computed from them."""

    predictions: list[Prediction]
    seconds: float = 0.0

    @property
    def summary(self) -> dict[str, dict]:
        """``{task: {"n", "unparsed", "metrics": {metric: mean}, "chance": {metric: mean}}}`` of the tasks there are."""
        summary = {}
        for task, found in self.by_task.items():
            summary[task] = {
                "n": len(found),
                "unparsed": sum(not prediction.parsed for prediction in found),
                "metrics": _means(prediction.scores for prediction in found),
                "chance": _means(prediction.chance for prediction in found),
            }
        return summary

    @property
    def by_task(self) -> dict[str, list[Prediction]]:
        """Predictions of every task there is: the six in their order, then others as they come."""
        tasks = dict.fromkeys(prediction.task for prediction in self.predictions)
        order = [task for task in TASK_TYPES if task in tasks] + [task for task in tasks if task not in TASK_TYPES]
        return {task: [one for one in self.predictions if one.task == task] for task in order}

    @property
    def main_scores(self) -> dict[str, float]:
        """The main metric of every task that has one, e.g. to watch in training."""
        metrics = {task: row["metrics"] for task, row in self.summary.items()}
        main = {task: main_metric(task, found) for task, found in metrics.items()}
        return {task: metrics[task][metric] for task, metric in main.items() if metric}

    def save(self, path: str | Path, **facts: object) -> Path:
        """Write summary and predictions as JSON, with ``facts`` beside them; :meth:`load` reads it back."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**facts, "summary": self.summary, "seconds": self.seconds}
        content["predictions"] = [asdict(prediction) for prediction in self.predictions]
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResult":
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls([Prediction(**prediction) for prediction in content["predictions"]], content["seconds"])


def _means(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the records that have it."""
    rows = list(scores)
    return {metric: fmean(row[metric] for row in rows if metric in row) for metric in metrics_of(rows)}


def metrics_of(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """All metrics of some records, in the order they come."""
    return list(dict.fromkeys(metric for row in rows for metric in row))
