"""Tables that a paper can cite: every metric of every group with its confidence interval, as JSON and Markdown."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from statistics import fmean

from idavlm.evaluation.intervals import bootstrap_mean
from idavlm.evaluation.report import markdown_table
from idavlm.evaluation.results import EvaluationResult, Prediction, metrics_of

Label = Callable[[Prediction], str]


def interval_summary(result: EvaluationResult, label: Label) -> dict[str, dict]:
    """``{group: {"n", "unparsed", "metrics": {metric: {"mean", "low", "high", "n"}}, "chance": {metric: mean}}}``.

    Args:
        result: scored predictions.
        label: the group of a prediction; "" leaves it out. Groups come in the order of the tasks, then as they come.
    """
    groups: dict[str, list[Prediction]] = {}
    for predictions in result.by_task.values():
        for prediction in predictions:
            if name := label(prediction):
                groups.setdefault(name, []).append(prediction)
    return {name: _summarise(found) for name, found in groups.items()}


def interval_table(results: Mapping[str, EvaluationResult], label: Label, *, first: str = "task") -> str:
    """Markdown: a row a metric of a group, a column a variant ("0.52 [0.44, 0.61]"), then what guessing would score.

    ``n`` counts the items that have the metric. Items whose answer could not be read have scored 0; their share is a
    row of its own.
    """
    summaries = {variant: interval_summary(result, label) for variant, result in results.items()}
    rows = []
    for name in dict.fromkeys(name for summary in summaries.values() for name in summary):
        found = [summary[name] for summary in summaries.values() if name in summary]
        head = name
        for metric in metrics_of([group["metrics"] for group in found]):
            cells = [_cell(summary.get(name, {}).get("metrics", {}).get(metric)) for summary in summaries.values()]
            known = [group["metrics"][metric]["n"] for group in found if metric in group["metrics"]]
            chance = next((group["chance"][metric] for group in found if metric in group["chance"]), None)
            rows.append([head, metric, max(known), *cells, "-" if chance is None else f"{chance:.2f}"])
            head = ""
        if any(group["unparsed"] for group in found):
            shares = [summary.get(name) for summary in summaries.values()]
            cells = ["-" if one is None else f"{one['unparsed'] / one['n']:.3f}" for one in shares]
            rows.append([head, "not readable", max(group["n"] for group in found), *cells, "-"])
    return markdown_table([first, "metric", "n", *summaries, "guessing"], rows)


def _summarise(predictions: list[Prediction]) -> dict:
    metrics = metrics_of([prediction.scores for prediction in predictions])
    values = {
        metric: [prediction.scores[metric] for prediction in predictions if metric in prediction.scores]
        for metric in metrics
    }
    chance = {
        metric: [prediction.chance[metric] for prediction in predictions if metric in prediction.chance]
        for metric in metrics
    }
    return {
        "n": len(predictions),
        "unparsed": sum(not prediction.parsed for prediction in predictions),
        "metrics": {metric: asdict(bootstrap_mean(found)) for metric, found in values.items()},
        "chance": {metric: fmean(found) for metric, found in chance.items() if found},
    }


def _cell(interval: dict | None) -> str:
    if interval is None:
        return "-"
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
