"""``idavlm data show``: a page of records with their images and boxes, to look at."""

import argparse
from collections import defaultdict
from pathlib import Path
from random import Random

from idavlm.cli.arguments import name, path, positive_int
from idavlm.cli.data_arguments import add_source_arguments, sources_of
from idavlm.data.errors import DataError
from idavlm.data.record_page import write_record_page
from idavlm.data.schema import Sample
from idavlm.utils import read_json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_source_arguments(parser)
    parser.add_argument("--out", type=path, required=True, help="the .html file to write")
    parser.add_argument("--count", type=positive_int, default=30, help="number of records, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice")
    parser.add_argument("--ids", type=name, nargs="+", help="show these records")
    parser.add_argument("--report", type=path, help="show records with problems, from `idavlm data validate --json`")


def run(arguments: argparse.Namespace) -> None:
    """Write the page."""
    if arguments.out.suffix != ".html":
        raise ValueError(f"--out {arguments.out} must end with .html.")
    train, held_out = sources_of(arguments)
    problems = _problems(arguments.report)
    chosen: list[tuple[float, int, Sample]] = []
    rng, total = Random(f"{arguments.seed} show"), 0
    for source in (*train, *held_out):
        for read in source:
            total += 1
            if isinstance(read.sample, DataError):
                continue
            if arguments.ids is not None and read.sample.id not in arguments.ids:
                continue
            if problems is not None and read.where not in problems:
                continue
            chosen.append((rng.random(), total, read.sample))
            if len(chosen) > 2 * arguments.count and arguments.ids is None:
                chosen = sorted(chosen, key=lambda entry: entry[:2])[: arguments.count]
    if not chosen:
        raise ValueError(f"none of the {total} records can be shown; check --ids, --report and --reader.")
    chosen = sorted(chosen, key=lambda entry: entry[:2])[: None if arguments.ids else arguments.count]
    samples = [sample for _, _, sample in sorted(chosen, key=lambda entry: entry[1])]
    title = ", ".join(str(file) for file in arguments.records)
    count = write_record_page(arguments.out, samples, title=title, total=total, problems=problems)
    print(f"{count} of {total} records: {arguments.out}")


def _problems(report: Path | None) -> dict[str, list[tuple[str, str]]] | None:
    """Level and text of the problems of each record, by its file and line."""
    if report is None:
        return None
    found = defaultdict(list)
    for problem in read_json_object(report).get("problems", []):
        found[problem["where"]].append((problem["level"], f"{problem['check']}: {problem['message']}"))
    return found
