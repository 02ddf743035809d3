"""Figures of a study: scores of the variants, or scores over an option with numbers as values."""

import textwrap
from pathlib import Path

from idavlm.ablation.summary import Summary, VariantSummary
from idavlm.ablation.tables import label
from idavlm.utils.figures import COLOURS, INK, new_figure, save, tidy

MAX_PANELS = 8
TITLE_WIDTH = 44
"""Characters in a line of the title of a panel."""


def plot_study(path: str | Path, summary: Summary) -> Path | None:
    """Plot one panel per metric; each point is a seed, and bars or lines are means.

    If the options of ``grid`` have numbers as values, the first one is the horizontal axis and the others give one line
    each. Otherwise every variant has a bar.

    Args:
        path: the PNG file to write.
        summary: the results. The first :data:`MAX_PANELS` metrics are plotted.

    Returns:
        ``path``, or None if there is no score.

    Raises:
        ImportError: matplotlib is not installed.
    """
    metrics = [name for name in summary.metrics if any(name in variant.scores for variant in summary.variants)]
    metrics = metrics[:MAX_PANELS]
    if not metrics:
        return None
    option = _numeric_option(summary)
    columns = min(len(metrics), 4)
    rows = -(-len(metrics) // columns)
    titles = [textwrap.fill(label(metric, summary.metrics), TITLE_WIDTH) for metric in metrics]
    height = 3.2 if option else 0.9 + 0.32 * len(summary.variants)
    height += 0.17 * max(title.count("\n") for title in titles)
    figure = new_figure(4.2 * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=option is None).flatten()
    for metric, title, ax in zip(metrics, titles, axes, strict=False):
        tidy(ax)
        ax.set_title(title, fontsize=10, color=INK, loc="left")
        if option:
            _draw_lines(ax, summary, metric, option)
        else:
            _draw_bars(ax, summary, metric)
    for ax in axes[len(metrics) :]:
        ax.set_visible(False)
    return save(figure, path)


def _numeric_option(summary: Summary) -> str | None:
    """The first option of the grid, if its values are numbers and the study has no named variants."""
    grid = summary.study.grid
    if summary.study.variants or not grid:
        return None
    option, values = next(iter(grid.items()))
    are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return option if are_numbers and len(values) > 1 else None


def _draw_lines(ax, summary: Summary, metric: str, option: str) -> None:
    lines: dict[str, list[tuple[float, VariantSummary]]] = {}
    values = summary.study.grid[option]
    others = len(summary.variants) // len(values)
    for number, variant in enumerate(summary.variants):  # the first option of a grid changes slowest
        if metric in variant.scores:
            rest = variant.name.partition(", ")[2] if others > 1 else ""
            lines.setdefault(rest, []).append((values[number // others], variant))
    for number, (rest, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points.sort(key=lambda point: point[0])
        ax.plot(
            [x for x, _ in points],
            [variant.scores[metric].mean for _, variant in points],
            color=colour,
            marker="o",
            ms=4,
            lw=1.6,
            label=rest or None,
        )
        for x, variant in points:
            seeds = variant.scores[metric].values
            ax.plot([x] * len(seeds), seeds, color=colour, marker="o", ms=3, ls="", alpha=0.4)
    if min(values) > 0 and max(values) / min(values) >= 30:
        ax.set_xscale("log")
    ax.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    ax.minorticks_off()
    ax.set_xlabel(option, fontsize=9, color=INK)
    if any(lines):
        ax.legend(frameon=False, fontsize=8)


def _draw_bars(ax, summary: Summary, metric: str) -> None:
    names = [variant.name for variant in summary.variants]
    for place, variant in enumerate(summary.variants):
        score = variant.scores.get(metric)
        if score is None:
            continue
        colour = COLOURS[0] if variant is not summary.baseline else COLOURS[1]
        ax.barh(place, score.mean, height=0.62, color=colour, alpha=0.85, zorder=2)
        if len(score.values) > 1:
            ax.plot(score.values, [place] * len(score.values), color=INK, marker="o", ms=3, ls="", zorder=3)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", lw=0.7, alpha=0.5)
