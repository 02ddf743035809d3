"""What an evaluation leaves behind: one prediction a record, one summary a task."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

from idavlm.data.schema import TASK_TYPES

MAIN_METRIC = {
    "matching": "accuracy",
    "location": "acc@0.5",
    "qa_single": "accuracy",
    "caption_single": "clause_recall",
    "qa_multi": "accuracy",
    "caption_multi": "clause_recall",
}
"""The one number that stands for a task where there is room for one."""


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
    def main_score(self) -> float:
        return self.scores[MAIN_METRIC[self.type]]


@dataclass(frozen=True)
class EvaluationResult:
    """Predictions in the order of the records; summaries are computed from them."""

    predictions: list[Prediction]
    seconds: float = 0.0

    @property
    def summary(self) -> dict[str, dict]:
        """``{task: {"n", "unparsed", "metrics": {metric: mean}, "chance": {metric: mean}}}`` of the tasks there are."""
        summary = {}
        for task in TASK_TYPES:
            found = [prediction for prediction in self.predictions if prediction.type == task]
            if found:
                summary[task] = {
                    "n": len(found),
                    "unparsed": sum(not prediction.parsed for prediction in found),
                    "metrics": _means(prediction.scores for prediction in found),
                    "chance": _means(prediction.chance for prediction in found),
                }
        return summary

    @property
    def main_scores(self) -> dict[str, float]:
        """The main metric of every task there is, e.g. to watch in training."""
        return {task: row["metrics"][MAIN_METRIC[task]] for task, row in self.summary.items()}

    def save(self, path: str | Path) -> Path:
        """Write summary and predictions as JSON; :meth:`load` reads it back."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"summary": self.summary, "seconds": self.seconds, "predictions": list(map(asdict, self.predictions))}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResult":
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls([Prediction(**prediction) for prediction in content["predictions"]], content["seconds"])


def _means(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric that all records have: every record of a task has the same ones."""
    scores = list(scores)
    return {
        metric: fmean(row[metric] for row in scores) for metric in scores[0] if all(metric in row for row in scores)
    }
