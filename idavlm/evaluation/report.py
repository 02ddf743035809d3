"""The report of a training run: report.md, plots and a contact sheet in one folder."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch

from idavlm.data.schema import TASK_TYPES
from idavlm.evaluation.contact_sheet import Example, draw_contact_sheet
from idavlm.evaluation.plots import LogHistory, plot_bars, plot_curves
from idavlm.evaluation.results import EvaluationResult

_METRICS = """\
*matching*: which of the pictures shows X. *location*: the box of X, by mean intersection over union and the share of
boxes that reach 0.5; guessing is to point at one of the persons. *qa*: the answer the model finds likeliest among the
right and the false ones. *caption*: names of the description that are right (precision) and that are there (recall),
and the share of the right clauses ("Kate is waving") found word by word. Answers that cannot be read score 0."""


def write_report(
    folder: str | Path,
    results: Mapping[str, Sequence[EvaluationResult]],
    *,
    title: str,
    logs: Mapping[str, Sequence[LogHistory]] | None = None,
    examples: Sequence[Example] = (),
    settings: Mapping[str, object] | None = None,
    command: str | None = None,
    seconds: float | None = None,
    machine: str | None = None,
) -> Path:
    """Write ``report.md``, ``scores.png``, ``curves.png`` and ``examples.png``; sections without content are left out.

    Args:
        folder: where to; made if missing, files of an earlier report are replaced.
        results: variant ("ID-Former", "no references", ...) -> one result a seed, in the order of columns.
        title: heading.
        logs: variant -> ``trainer.state.log_history`` a seed.
        examples: rows of the contact sheet.
        settings: name -> value, as a table.
        command: what reproduces the run.
        seconds: what the whole run took.
        machine: where; :func:`describe_machine` if not given.

    Returns:
        The path of ``report.md``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no results.
    """
    if not any(results.values()):
        raise ValueError(f"results={dict(results)!r} holds no result; give at least one variant with one result.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"command": command and f"`{command}`", "time": seconds and format_seconds(seconds)}
    facts["machine"] = machine or describe_machine()
    parts = [f"# {title}", "  \n".join(f"{name}: {value}" for name, value in facts.items() if value)]
    parts += ["## Scores on identities never trained on", score_table(results), _spread(results), _METRICS]
    if plot_bars(folder / "scores.png", results):
        parts.append("![main score of every task](scores.png)")
    if examples:
        draw_contact_sheet(folder / "examples.png", examples)
        parts += ["## Examples", "![references, scenes, answers, identity attention](examples.png)"]
    if logs and plot_curves(folder / "curves.png", logs):
        parts += ["## Training", "![losses over steps](curves.png)"]
    if settings:
        parts += [
            "## Settings",
            markdown_table(["setting", "value"], [[f"`{name}`", value] for name, value in settings.items()]),
        ]
    path = folder / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def score_table(results: Mapping[str, Sequence[EvaluationResult]]) -> str:
    """Markdown: a row a metric of a task, a column a variant, then what guessing would score."""
    summaries = {variant: [result.summary for result in seeds] for variant, seeds in results.items()}
    rows = []
    for task in TASK_TYPES:
        found = [summary[task] for seeds in summaries.values() for summary in seeds if task in summary]
        for number, metric in enumerate(found[0]["metrics"] if found else ()):
            cells = [
                [summary[task]["metrics"][metric] for summary in seeds if task in summary]
                for seeds in summaries.values()
            ]
            chance = found[0]["chance"].get(metric)
            records = found[0]["n"] if number == 0 else ""
            rows.append([task if number == 0 else "", metric, records, *map(_range, cells), _range(chance)])
        if any(summary["unparsed"] for summary in found):
            cells = [[s[task]["unparsed"] / s[task]["n"] for s in seeds if task in s] for seeds in summaries.values()]
            rows.append(["", "not readable", "", *map(_range, cells), "-"])
    return markdown_table(["task", "metric", "records", *summaries, "guessing"], rows)


def describe_machine() -> str:
    """Processor or GPU, threads and versions."""
    name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions}"


def format_seconds(seconds: float) -> str:
    """``"45 s"``, ``"7 min 5 s"``, ``"1 h 2 min"``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _spread(results: Mapping[str, Sequence[EvaluationResult]]) -> str:
    seeds = sorted({len(found) for found in results.values() if found})
    many = f"up to {seeds[-1]}" if len(seeds) > 1 else seeds[-1]
    return f"Mean of {many} seeds (lowest to highest)." if seeds[-1] > 1 else ""


def _range(values: Sequence[float] | float | None) -> str:
    if isinstance(values, float):
        return f"{values:.2f}"
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; bars and line ends in cells are made harmless."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
