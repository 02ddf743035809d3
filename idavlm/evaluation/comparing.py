"""Two runs on the same items: paired bootstrap, wins and losses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from idavlm.evaluation.intervals import RESAMPLES, Interval, resample_counts
from idavlm.evaluation.report import markdown_table
from idavlm.evaluation.results import EvaluationResult, Prediction, main_metric, metrics_of

Pair = tuple[Prediction, Prediction]


@dataclass(frozen=True)
class Comparison:
    """One metric of one task, A against B.

    Attributes:
        task, metric: what is compared.
        a, b: means over the common items.
        difference: B minus A, with the 95 % interval of a paired bootstrap.
        p_value: two-sided: how often a resample's difference falls on the other side of zero, twice.
        wins: items where B scores higher.
        losses: items where A does.
        ties: the others.
    """

    task: str
    metric: str
    a: float
    b: float
    difference: Interval
    p_value: float
    wins: int
    losses: int
    ties: int


def pair_predictions(a: EvaluationResult, b: EvaluationResult) -> list[Pair]:
    """Predictions to the same items, in A's order.

    Raises:
        ValueError: no item is common, or one id is of different types.
    """
    known = {prediction.id: prediction for prediction in b.predictions}
    pairs = [(one, known[one.id]) for one in a.predictions if one.id in known]
    if not pairs:
        raise ValueError("a and b have no item in common; compare runs of the same data.")
    for one, other in pairs:
        if (one.task, one.answer, one.gold_box) != (other.task, other.answer, other.gold_box):
            raise ValueError(f"item {one.id!r} is not the same in a and b; compare runs of the same data.")
    return pairs


def compare_scores(pairs: Sequence[Pair]) -> list[Comparison]:
    """Every metric that both have, task by task; the last row of several tasks is all their main scores together."""
    tasks: dict[str, list[Pair]] = {}
    for pair in pairs:
        tasks.setdefault(pair[0].task, []).append(pair)
    rows = [
        _compare(task, metric, [(a.scores[metric], b.scores[metric]) for a, b in found if _both(a, b, metric)])
        for task, found in tasks.items()
        for metric in metrics_of([a.scores for a, _ in found])
        if any(_both(a, b, metric) for a, b in found)
    ]
    if len(tasks) > 1:
        main = [scores for pair in pairs if (scores := main_scores(pair)) is not None]
        rows += [_compare("all", "main scores", main)] if main else []
    return rows


def main_scores(pair: Pair) -> tuple[float, float] | None:
    """The main score of both, by the metric that both have; None where there is none."""
    a, b = pair
    metric = main_metric(a.task, [one for one in a.scores if one in b.scores])
    return None if metric is None else (a.scores[metric], b.scores[metric])


def comparison_cells(rows: Sequence[Comparison], a: str, b: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table: means, difference with its interval, p, items that B wins and loses."""
    header = ["task", "metric", "n", a, b, "difference", "p", f"{b} wins", "loses", "ties"]
    cells = []
    for row in rows:
        difference = f"{row.difference.mean:+.3f} [{row.difference.low:+.3f}, {row.difference.high:+.3f}]"
        p_value = f"{row.p_value:.3f}" if row.p_value >= 0.001 else "< 0.001"
        cells.append([row.task, row.metric, str(row.difference.n), f"{row.a:.3f}", f"{row.b:.3f}", difference, p_value])
        cells[-1] += [str(row.wins), str(row.losses), str(row.ties)]
    return header, cells


def comparison_table(rows: Sequence[Comparison], a: str, b: str) -> str:
    """:func:`comparison_cells` in Markdown."""
    return markdown_table(*comparison_cells(rows, a, b))


def _both(a: Prediction, b: Prediction, metric: str) -> bool:
    return metric in a.scores and metric in b.scores


def _compare(task: str, metric: str, scores: Sequence[tuple[float, float]]) -> Comparison:
    a, b = np.asarray(scores, np.float64).T
    differences = b - a
    means = resample_counts(len(differences), RESAMPLES, 0) @ differences / len(differences)
    low, high = np.percentile(means, [2.5, 97.5])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return Comparison(
        task=task,
        metric=metric,
        a=float(a.mean()),
        b=float(b.mean()),
        difference=Interval(float(differences.mean()), float(low), float(high), len(differences)),
        p_value=float(min(1.0, max(2 * tail, 1 / RESAMPLES))),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        ties=int((differences == 0).sum()),
    )
