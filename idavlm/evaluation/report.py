"""Reports of a training run and the tables they consist of: means over seeds, or means with confidence intervals."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from idavlm.data.schema import TASK_TYPES
from idavlm.evaluation.bootstrap import bootstrap_mean
from idavlm.evaluation.contact_sheet import Example, draw_contact_sheet
from idavlm.evaluation.plots import LogHistory, plot_bars, plot_curves
from idavlm.evaluation.results import PROBLEMS, EvaluationResult, Prediction, metrics_of, summarize
from idavlm.utils import describe_machine, markdown_table

Label = Callable[[Prediction], str]


_METRICS = """\
*matching*: accuracy of the chosen image. *location*: mean IoU of the predicted box, and the share of boxes with an IoU
of at least 0.5; chance is a random choice among the annotated boxes of the image. *qa*: accuracy of the most likely
candidate among the right and the false answers. *caption*: precision and recall of names, and the share of the clauses
of the right description ("Kate is waving") that are reproduced literally. Answers that cannot be parsed score 0.
*refused*: share of answers that decline or say that they do not know. *other box format*: share of boxes whose numbers
cannot be of the box format that was chosen for the model."""


def write_report(
    folder: str | Path,
    results: Mapping[str, Sequence[EvaluationResult]],
    *,
    model: str,
    data: str,
    logs: Mapping[str, Sequence[LogHistory]] | None = None,
    examples: Sequence[Example] = (),
    settings: Mapping[str, object] | None = None,
    command: str | None = None,
    seconds: float | None = None,
    machine: str | None = None,
) -> Path:
    """Write ``report.md``, ``results.json``, ``scores.png``, ``examples.png`` and ``curves.png``.

    The title is made from ``model``, ``data``, the number of records and the number of seeds. Sections without content
    are left out. The results and a report without figures are written first; then each figure is drawn on its own. If
    some figures fail, the report contains the error in their place, the other figures are kept, and an error is raised
    at the end.

    Args:
        folder: folder of the report; created if missing. Files of an earlier report are replaced.
        results: variant ("ID-Former", "no references", ...) -> one result per seed. Variants become columns.
        model: what was evaluated, for the title.
        data: the data set it was evaluated on, for the title.
        logs: variant -> one ``trainer.state.log_history`` per seed.
        examples: rows of the contact sheet.
        settings: name -> value, printed as a table.
        command: the command that reproduces the run.
        seconds: duration of the whole run.
        machine: description of the hardware; by default :func:`idavlm.utils.describe_machine`.

    Returns:
        The path of ``report.md``.

    Raises:
        ValueError: ``results`` is empty. Nothing is written then.
        RuntimeError: figures that could not be drawn, for example without matplotlib. The report is written.
    """
    if not any(results.values()):
        raise ValueError(f"results={dict(results)!r} is empty; pass at least one variant with one result.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {variant: [result.to_dict() for result in seeds] for variant, seeds in results.items()}
    (folder / "results.json").write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    facts = {
        "command": command and f"`{command}`",
        "time": None if seconds is None else format_seconds(seconds),
        "machine": machine or describe_machine(),
    }
    counts = sorted({len(seeds) for seeds in results.values() if seeds})
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else count_of(counts[0], "seed")
    records = max(len(result.predictions) for variant in results.values() for result in variant)
    parts = [f"# {model} on {data}: {count_of(records, 'record')}, {seeds}"]
    parts += ["  \n".join(f"{name}: {value}" for name, value in facts.items() if value)]
    parts += ["## Scores", score_table(results)]
    parts += [f"Mean of {seeds} (lowest to highest)." if counts[-1] > 1 else "", _METRICS]
    last = []
    if settings:
        rows = [[f"`{name}`", value] for name, value in settings.items()]
        last = ["## Settings", markdown_table(["setting", "value"], rows)]
    path = folder / "report.md"
    _write_parts(path, [*parts, *last])

    figures = [
        ("scores.png", "", "Main score of each task", plot_bars, results),
        ("examples.png", "## Examples", "Answers and identity maps", draw_contact_sheet, examples),
        ("curves.png", "## Training", "Losses over steps", plot_curves, logs),
    ]
    errors: dict[str, Exception] = {}
    for name, heading, caption, draw, content in figures:
        (folder / name).unlink(missing_ok=True)
        try:
            if content and draw(folder / name, content):
                parts += [heading, f"![{caption}]({name})"]
        except Exception as error:
            (folder / name).unlink(missing_ok=True)
            errors[f"{name}: {type(error).__name__}: {error}"] = error
            parts += [heading, f"**Could not be drawn:** {name}: {type(error).__name__}: {error}"]
        _write_parts(path, [*parts, *last])
    if errors:
        first = next(iter(errors.values()))
        messages = "; ".join(errors)
        raise RuntimeError(f"{path} is written, but {len(errors)} of its figures are missing ({messages}).") from first
    return path


def score_table(results: Mapping[str, Sequence[EvaluationResult]]) -> str:
    """Markdown table of means over seeds: one row per metric of a task, one column per variant, then chance.

    Args:
        results: variant -> one result per seed.
    """
    summaries = {variant: [result.summary for result in seeds] for variant, seeds in results.items()}
    rows = []
    for task in TASK_TYPES:
        found = [summary[task] for seeds in summaries.values() for summary in seeds if task in summary]
        for number, metric in enumerate(found[0]["metrics"] if found else ()):
            cells = [[s[task]["metrics"][metric] for s in seeds if task in s] for seeds in summaries.values()]
            chance = [found[0]["chance"][metric]] if metric in found[0]["chance"] else []
            first = [task, metric, found[0]["n"]] if number == 0 else ["", metric, ""]
            rows.append([*first, *map(format_range, cells), format_range(chance)])
        for problem in _problems(found):
            cells = [[s[task][problem] / s[task]["n"] for s in seeds if task in s] for seeds in summaries.values()]
            rows.append(["", problem, "", *map(format_range, cells), "-"])
    return markdown_table(["task", "metric", "records", *summaries, "chance"], rows)


def interval_summary(result: EvaluationResult, label: Label) -> dict[str, dict]:
    """Means with 95 % bootstrap intervals of each group of predictions.

    Args:
        result: scored predictions.
        label: returns the group of a prediction; "" excludes it. Groups follow the order of the tasks, then the order
            of first appearance.

    Returns:
        ``{group: summary}``, see :func:`idavlm.evaluation.results.summarize`; each metric is
        ``{"mean", "low", "high", "n"}``.
    """
    groups: dict[str, list[Prediction]] = {}
    for predictions in result.by_task.values():
        for prediction in predictions:
            if name := label(prediction):
                groups.setdefault(name, []).append(prediction)
    return {name: summarize(found, lambda values: asdict(bootstrap_mean(values))) for name, found in groups.items()}


def interval_table(results: Mapping[str, EvaluationResult], label: Label, *, first: str = "task") -> str:
    """Markdown table of :func:`interval_summary`: one row per metric of a group, one column per variant, then chance.

    ``n`` counts the items that have the metric. The share of refusals is a row of its own, and so are the shares of
    answers that could not be parsed and of boxes of another format, if there are any.

    Args:
        results: variant -> result.
        label: see :func:`interval_summary`.
        first: title of the first column.
    """
    summaries = {variant: interval_summary(result, label) for variant, result in results.items()}
    rows = []
    for name in dict.fromkeys(name for summary in summaries.values() for name in summary):
        found = [summary[name] for summary in summaries.values() if name in summary]
        head = name
        for metric in metrics_of([group["metrics"] for group in found]):
            cells = [
                _format_interval(summary.get(name, {}).get("metrics", {}).get(metric)) for summary in summaries.values()
            ]
            counts = [group["metrics"][metric]["n"] for group in found if metric in group["metrics"]]
            chance = next((group["chance"][metric] for group in found if metric in group["chance"]), None)
            rows.append([head, metric, max(counts), *cells, "-" if chance is None else f"{chance:.2f}"])
            head = ""
        for problem in _problems(found):
            groups = [summary.get(name) for summary in summaries.values()]
            cells = ["-" if group is None else f"{group[problem] / group['n']:.3f}" for group in groups]
            rows.append([head, problem, max(group["n"] for group in found), *cells, "-"])
            head = ""
    return markdown_table([first, "metric", "n", *summaries, "chance"], rows)


def _problems(summaries: Sequence[Mapping]) -> list[str]:
    """Shares that a table shows: that of refusals always, the others if they are not zero."""
    names = ["refused"] if summaries else []
    return names + [
        name for name in ("unparsed", *PROBLEMS) if name != "refused" and any(found[name] for found in summaries)
    ]


def format_seconds(seconds: float) -> str:
    """``"45 s"``, ``"7 min 5 s"``, ``"1 h 2 min"``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _write_parts(path: Path, parts: Sequence[str]) -> None:
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def count_of(number: int, noun: str) -> str:
    """``"1 seed"``, ``"2 seeds"``."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def format_range(values: Sequence[float]) -> str:
    """``"0.91"``; of several values the mean and the range, ``"0.91 (0.89 to 0.93)"``."""
    if not values:
        return "-"
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{spread}"


def _format_interval(interval: dict | None) -> str:
    if interval is None:
        return "-"
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
