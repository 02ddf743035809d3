"""Plot loss curves and scores as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from idavlm.data.schema import TASK_TYPES
from idavlm.evaluation.results import EvaluationResult, main_metric
from idavlm.utils.figures import COLOURS, INK, new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = (0, (5, 2))

LogHistory = Sequence[Mapping[str, float]]
"""``trainer.state.log_history``: one mapping per logged step, with "step" and the logged values."""


def plot_curves(path: str | Path, logs: Mapping[str, Sequence[LogHistory]]) -> Path | None:
    """Plot losses and learning rate over steps: raw values thin, smoothed values bold.

    Args:
        path: the PNG file to write.
        logs: variant -> one log history per seed. The keys ``loss_identity`` (or ``loss`` of a Trainer without separate
            sources), ``loss_general``, ``identity_map_loss`` and ``learning_rate`` are plotted.

    Returns:
        ``path``, or None if none of these keys was logged.
    """
    panels = {
        "language loss": {"identity data": "loss_identity", "general data": "loss_general"},
        "identity map loss": {"": "identity_map_loss"},
        "learning rate": {"": "learning_rate"},
    }
    histories = [history for seeds in logs.values() for history in seeds]
    if not any("loss_identity" in entry for history in histories for entry in history):
        panels["language loss"] = {"": "loss"}
    panels = {
        title: lines
        for title, lines in panels.items()
        if any(_curve(history, key)[0] for history in histories for key in lines.values())
    }
    if not panels:
        return None
    figure = new_figure(4.6 * len(panels), 3.6)
    for ax, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        tidy(ax)
        ax.set_title(title, fontsize=11, color=INK, loc="left")
        ax.set_xlabel("step", fontsize=9, color=INK)
        for number, (variant, seeds) in enumerate(logs.items()):
            colour = COLOURS[number % len(COLOURS)]
            for style, (line, key) in zip(("-", _DASHES), lines.items(), strict=False):
                label = ", ".join(part for part in (variant if len(logs) > 1 else "", line) if part)
                for steps, values in (_curve(history, key) for history in seeds):
                    if steps and key != "learning_rate":
                        ax.plot(steps, values, color=colour, lw=0.6, alpha=0.25)
                        values = _smooth(values)
                    if steps:
                        ax.plot(steps, values, color=colour, lw=1.6, ls=style, label=label or None)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        ax.set_ylim(bottom=0)
        _draw_legend(ax, ax, fontsize=8.5)
    return save(figure, path)


def plot_bars(path: str | Path, results: Mapping[str, Sequence[EvaluationResult]]) -> Path | None:
    """Plot the main metric of each task, one bar per variant: mean over seeds, whiskers from minimum to maximum.

    A dashed line across the bars of a task marks the chance level.

    Args:
        path: the PNG file to write.
        results: variant -> one result per seed.

    Returns:
        ``path``, or None if there is no score.
    """
    summaries = {variant: [result.summary for result in seeds] for variant, seeds in results.items()}
    found = [summary for seeds in summaries.values() for summary in seeds]
    rows = []  # task, metric, chance
    for task in TASK_TYPES:
        first = next((summary[task] for summary in found if task in summary), None)
        metric = first and main_metric(task, first["metrics"])
        if metric:
            rows.append((task, metric, first["chance"].get(metric)))
    if not rows:
        return None
    figure = new_figure(max(6.0, 0.8 + len(rows) * (0.34 * len(summaries) + 0.3)), 3.9)
    ax = figure.subplots()
    tidy(ax)
    width = 0.8 / len(summaries)
    for number, (variant, seeds) in enumerate(summaries.items()):
        for place, (task, metric, _) in enumerate(rows):
            values = [summary[task]["metrics"][metric] for summary in seeds if task in summary]
            if not values:
                continue
            x, mean = place - 0.4 + (number + 0.5) * width, fmean(values)
            ax.bar(x, mean, width * 0.88, color=COLOURS[number % len(COLOURS)], label=variant, zorder=2)
            if len(values) > 1:
                low, high = mean - min(values), max(values) - mean
                ax.errorbar(x, mean, [[low], [high]], color=INK, capsize=3, lw=1, zorder=4)
            ax.annotate(
                f"{mean:.2f}", (x, max(values)), (0, 4), textcoords="offset points",
                ha="center", fontsize=8, color=INK, zorder=5, bbox={"fc": "white", "ec": "none", "pad": 0.5},
            )  # fmt: skip
    for place, (_, _, chance) in enumerate(rows):
        if chance is not None:
            ends = [place - 0.45, place + 0.45]
            ax.plot(ends, [chance] * 2, color=INK, lw=1.2, ls=(0, (4, 2)), zorder=3, label="chance")
    ax.set_xticks(range(len(rows)), [f"{task}\n{metric}" for task, metric, _ in rows], fontsize=9.5, color=INK)
    ax.set_xlim(-0.6, len(rows) - 0.4)
    ax.set_ylim(0, 1.08)
    ax.tick_params(axis="x", length=0)
    _draw_legend(figure, ax, loc="outside upper center", ncols=len(summaries) + 1, fontsize=9)
    return save(figure, path)


def _curve(history: LogHistory, key: str) -> tuple[list[float], list[float]]:
    found = [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float]) -> list[float]:
    """Moving average over about 5 % of the curve, over fewer values at its ends."""
    half = len(values) // 40
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _draw_legend(owner: "Axes | Figure", ax: "Axes", **style) -> None:
    """Legend with one entry per label of ``ax``; none without labels."""
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if unique:
        owner.legend(unique.values(), unique.keys(), frameon=False, **style)
