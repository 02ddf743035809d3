"""``idavlm data validate``: find faults of records and images, and leaks between training and held-out records."""

import argparse
import json

from idavlm.cli.arguments import path, positive_int
from idavlm.cli.data_arguments import (
    add_processor_argument,
    add_source_arguments,
    load_processor,
    progress_bar,
    read_sources,
    sources_of,
)
from idavlm.data.validation import CHECKS, validate_records
from idavlm.data.validation.problems import MAX_PROBLEMS
from idavlm.utils import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    width = max(map(len, CHECKS))
    checks = "\n".join(f"  {check:{width}}  {level:7}  {text}" for check, (level, text) in CHECKS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"exit status: 0 without errors, 1 with errors (with --strict also with warnings)\n\nchecks:\n{checks}"
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--test",
        type=path,
        nargs="+",
        default=[],
        metavar="RECORDS",
        help="held-out records, which must share no person, image or shot with the others",
    )
    parser.add_argument("--json", type=path, help="write the report to this file")
    parser.add_argument("--no-images", action="store_true", help="do not open images")
    parser.add_argument("--no-crops", action="store_true", help="do not search for references cut out of the scenes")
    parser.add_argument("--names-are-people", action="store_true", help="one name is one person in all records")
    parser.add_argument("--strict", action="store_true", help="warnings count as errors")
    parser.add_argument("--workers", type=positive_int, help="processes that open images; by default one per core")
    parser.add_argument("--most", type=positive_int, default=20, help="problems of one check that are printed")
    parser.add_argument(
        "--max-problems", type=positive_int, default=MAX_PROBLEMS, help="problems of one check in the JSON report"
    )
    add_processor_argument(parser, "also find records that the processor of this model cannot encode")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns 1 if there are errors."""
    train, held_out = sources_of(arguments)
    test, others = read_sources(arguments.test, arguments)
    processor = load_processor(arguments.processor)
    with progress_bar() as progress:
        report = validate_records(
            train,
            [*held_out, *test, *others],
            images=not arguments.no_images,
            crops=not arguments.no_crops,
            names_are_people=arguments.names_are_people,
            num_tokens=None if processor is None else processor.num_tokens,
            num_workers=arguments.workers,
            max_problems=arguments.max_problems,
            progress=progress,
        )
    print(report.describe(most=arguments.most))
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return int(report.num_errors > 0 or (arguments.strict and report.num_warnings > 0))
