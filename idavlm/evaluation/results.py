"""Results of an evaluation: one prediction per record, one summary per task."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from idavlm.data.errors import quote, shorten
from idavlm.data.schema import TASK_TYPES
from idavlm.utils import read_json_object, write_text

MAIN_METRICS = {
    "matching": ("accuracy",),
    "location": ("acc@0.5", "not_here"),
    "qa_single": ("accuracy", "closest_accuracy"),
    "caption_single": ("clause_recall", "name_f1"),
    "qa_multi": ("accuracy", "closest_accuracy"),
    "caption_multi": ("clause_recall", "name_f1"),
}
"""The metric that represents a task in plots and comparisons: the first of these that was computed."""

PROBLEMS = ("refused", "other box format")
"""Values of :attr:`Prediction.problem` that summaries count."""


def main_metric(task: str, metrics: Iterable[str]) -> str | None:
    """The main metric of ``task`` among ``metrics``; for other tasks the first one; None if there is none."""
    metrics = list(metrics)
    found = [metric for metric in MAIN_METRICS.get(task, metrics) if metric in metrics]
    return found[0] if found else None


@dataclass(frozen=True)
class Prediction:
    """The scored answer to one record.

    Attributes:
        id: id of the record.
        task: one of :data:`idavlm.data.schema.TASK_TYPES`, or a task of another benchmark.
        text: generated text; for multiple choice without generated text, the most likely candidate.
        answer: the right answer; "" for location.
        scores: metric -> value in 0..1. An answer that cannot be parsed scores 0.
        chance: metric -> expected value of random guessing, for the metrics where it is defined.
        box: the predicted box in pixels of the original image; None if there is none. Location only.
        gold_box: the right box. Location only.
        parsed: whether the answer could be parsed.
        problem: ``"refused"`` if the answer declines or says that it does not know, ``"other box format"`` if its
            numbers cannot be of the box format of the model; otherwise "".
        item: what was asked, see :func:`idavlm.evaluation.fingerprints.item_fingerprint`; {} if unknown.
    """

    id: str
    task: str
    text: str
    answer: str
    scores: dict[str, float]
    chance: dict[str, float] = field(default_factory=dict)
    box: list[float] | None = None
    gold_box: list[float] | None = None
    parsed: bool = True
    problem: str = ""
    item: dict[str, str] = field(default_factory=dict)

    @property
    def main_score(self) -> float | None:
        """Value of the main metric of the task, see :data:`MAIN_METRICS`."""
        metric = main_metric(self.task, self.scores)
        return None if metric is None else self.scores[metric]


@dataclass(frozen=True)
class EvaluationResult:
    """Predictions in the order of the records; summaries are computed from them.

    Attributes:
        predictions: one per record.
        seconds: duration of the evaluation.
    """

    predictions: list[Prediction]
    seconds: float = 0.0

    @property
    def summary(self) -> dict[str, dict]:
        """``{task: {"n", "unparsed", "refused", ...}}``, see :func:`summarize`."""
        return {task: summarize(found, fmean) for task, found in self.by_task.items()}

    @property
    def by_task(self) -> dict[str, list[Prediction]]:
        """Predictions of each task; the tasks of the schema come first, in their order."""
        tasks = dict.fromkeys(prediction.task for prediction in self.predictions)
        order = [task for task in TASK_TYPES if task in tasks] + [task for task in tasks if task not in TASK_TYPES]
        return {task: [found for found in self.predictions if found.task == task] for task in order}

    @property
    def main_scores(self) -> dict[str, float]:
        """Mean of the main metric of each task that has one, for example to log during training."""
        metrics = {task: row["metrics"] for task, row in self.summary.items()}
        main = {task: main_metric(task, found) for task, found in metrics.items()}
        return {task: metrics[task][metric] for task, metric in main.items() if metric}

    def to_dict(self) -> dict:
        """Summary, duration and predictions as plain JSON types."""
        predictions = [asdict(prediction) for prediction in self.predictions]
        return {"summary": self.summary, "seconds": self.seconds, "predictions": predictions}

    @classmethod
    def from_dict(cls, content: Mapping) -> "EvaluationResult":
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: ``content`` does not have the form of :meth:`to_dict`, with the first field that differs.
        """
        predictions, seconds = content.get("predictions"), content.get("seconds")
        if not isinstance(predictions, list):
            raise ValueError("'predictions' is not a list; expected the scores that idavlm wrote.")
        if not _is_number(seconds):
            raise ValueError(f"seconds={quote(seconds)} is not a number; expected the scores that idavlm wrote.")
        return cls([_prediction(entry, f"predictions[{i}]") for i, entry in enumerate(predictions)], seconds)

    def save(self, path: str | Path, **facts: object) -> Path:
        """Write :meth:`to_dict` and ``facts`` as JSON; :meth:`load` reads it back."""
        return write_text(path, json.dumps({**facts, **self.to_dict()}, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResult":
        """Read a file that :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: with the path, for a file of another form.
        """
        content = read_json_object(path)
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def metrics_of(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """All metrics of ``rows`` in order of first appearance."""
    return list(dict.fromkeys(metric for row in rows for metric in row))


def summarize(predictions: Sequence[Prediction], mean: Callable[[list[float]], Any]) -> dict[str, Any]:
    """Summary of the predictions of a task.

    Returns:
        ``n``, ``unparsed``, and the problems ``refused`` and ``other box format``, which are numbers of predictions;
        ``metrics``: metric -> ``mean(values)``; ``chance``: metric -> mean. Refusals and boxes of another format are
        among the unparsed predictions too, where an answer is parsed. Each metric is computed from the predictions that
        have it.
    """
    scores, chance = [found.scores for found in predictions], [found.chance for found in predictions]
    return {
        "n": len(predictions),
        "unparsed": sum(not prediction.parsed for prediction in predictions),
        **{problem: sum(found.problem == problem for found in predictions) for problem in PROBLEMS},
        "metrics": {name: mean([row[name] for row in scores if name in row]) for name in metrics_of(scores)},
        "chance": {name: fmean(row[name] for row in chance if name in row) for name in metrics_of(chance)},
    }


def _prediction(entry: object, where: str) -> Prediction:
    """Check a stored prediction."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {type(entry).__name__}, expected an object.")
    names = {known.name for known in fields(Prediction)}
    wrong = [name for name in ("id", "task", "text", "answer") if not isinstance(entry.get(name), str)]
    wrong += [name for name in ("scores", "chance") if not _are_numbers(entry.get(name, {}))]
    wrong += [name for name in ("box", "gold_box") if not _is_box(entry.get(name))]
    wrong += [] if isinstance(entry.get("parsed", True), bool) else ["parsed"]
    wrong += [] if entry.get("problem", "") in ("", *PROBLEMS) else ["problem"]
    item = entry.get("item", {})
    is_item = isinstance(item, dict) and all(isinstance(part, str) for part in item.values())
    wrong += [] if is_item else ["item"]
    wrong += [] if "scores" in entry else ["scores"]
    wrong += sorted(entry.keys() - names)
    if wrong:
        raise ValueError(
            f"{where}.{shorten(wrong[0])}={quote(entry.get(wrong[0]))} is not a field of a prediction, or has another "
            "type; expected the scores that idavlm wrote."
        )
    return Prediction(**entry)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_box(value: object) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)))
