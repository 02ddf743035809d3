"""``idavlm data stats``: count identities, photos, boxes, texts, tokens and names, and plot them."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from idavlm.cli.arguments import path
from idavlm.cli.data_arguments import (
    add_processor_argument,
    add_source_arguments,
    load_processor,
    progress_bar,
    sources_of,
)
from idavlm.data.errors import DataError
from idavlm.data.record_statistics import Distribution, RecordStatistics, record_statistics
from idavlm.data.schema import Sample
from idavlm.utils import markdown_table, write_text
from idavlm.utils.figures import COLOURS, INK, new_figure, save, tidy

_COLUMNS = ("n", "mean", "min", "p5", "median", "p95", "max")
_MOST_BARS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_source_arguments(parser)
    parser.add_argument("--out", type=path, help="folder for stats.json and stats.png")
    parser.add_argument("--no-images", action="store_true", help="do not read the sizes of images, for those of boxes")
    add_processor_argument(parser, "count tokens with the processor of this model")


def run(arguments: argparse.Namespace) -> None:
    """Print the statistics, and write them with a figure."""
    train, held_out = sources_of(arguments)
    processor = load_processor(arguments.processor)
    num_tokens = None if processor is None else processor.num_tokens
    with progress_bar() as progress:

        def samples() -> Iterator[Sample | DataError]:
            for source in (*train, *held_out):
                for read in source:
                    progress(1)
                    yield read.sample

        found = record_statistics(samples(), num_tokens=num_tokens, box_sizes=not arguments.no_images)
    print(_text(found))
    if arguments.out is not None:
        write_text(arguments.out / "stats.json", json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")
        print(_plot(found, arguments.out / "stats.png"))


def _text(found: RecordStatistics) -> str:
    values = found.to_dict()
    parts = [markdown_table(["records", "number"], values["records"].items())]
    rows = [[name, *(summary.get(column, "") for column in _COLUMNS)] for name, summary in values["summaries"].items()]
    parts.append(markdown_table(["", *_COLUMNS], rows))
    if found.names:
        names = ", ".join(f"{name} {count}" for name, count in found.names.most_common(10))
        parts.append(f"{len(found.names)} names; the most frequent: {names}")
    if found.persons:
        parts.append(f"{len(found.persons)} persons (meta.people)")
    parts += [f"{count} {what} cannot be read" for what, count in found.unreadable.items()]
    return "\n\n".join(parts)


def _plot(found: RecordStatistics, file: Path) -> Path:
    panels = {name: values for name, values in found.distributions.items() if values.counts}
    columns = min(3, len(panels) + 1)
    rows = -(-(len(panels) + 1) // columns)
    figure = new_figure(4.2 * columns, 2.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (name, values) in zip(axes, panels.items(), strict=False):
        labels, heights = _bars(values)
        ax.bar(range(len(labels)), heights, color=COLOURS[0], zorder=2)
        step = max(1, len(labels) // 8)
        ax.set_xlim(-1, max(2, len(labels)))
        ax.set_xticks(range(0, len(labels), step), labels[::step], fontsize=8, color=INK)
        ax.set_title(name, fontsize=10, color=INK, loc="left")
        tidy(ax)
    ax = axes[len(panels)]
    top = found.names.most_common(12)
    ax.barh([name[:18] for name, _ in top][::-1], [count for _, count in top][::-1], color=COLOURS[1], zorder=2)
    ax.set_title(f"records per name, {len(found.names)} names", fontsize=10, color=INK, loc="left", parse_math=False)
    tidy(ax)
    ax.tick_params(axis="y", labelsize=8)
    for unused in axes[len(panels) + 1 :]:
        unused.set_axis_off()
    return save(figure, file)


def _bars(values: Distribution) -> tuple[list[str], list[int]]:
    """Labels and heights of bars: one for each number, or for ranges of equal width if there are many."""
    low, high = min(values.counts), max(values.counts)
    width = max(1, -(-(high - low + 1) // _MOST_BARS))
    starts = range(low, high + 1, width)
    heights = [sum(values.counts[start + step] for step in range(width)) for start in starts]
    return [str(start) for start in starts], heights
