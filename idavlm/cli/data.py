"""``idavlm data COMMAND``: build, check, describe, show, mix, convert and split files of records."""

import argparse

from idavlm.cli import data_build, data_convert, data_mix, data_show, data_split, data_stats, data_validate

COMMANDS = {
    "build": (data_build.add_build_arguments, data_build.run_build, "build tuning data from annotations"),
    "validate": (
        data_validate.add_arguments,
        data_validate.run,
        "find faults of records and images, and leaks between training and held-out records",
    ),
    "stats": (
        data_stats.add_arguments,
        data_stats.run,
        "count identities, photos, boxes, texts, tokens and names, and plot them",
    ),
    "show": (data_show.add_arguments, data_show.run, "write a page of records with their images and boxes, to look at"),
    "mix": (data_mix.add_arguments, data_mix.run, "write a recipe of several files of records for idavlm train"),
    "convert": (data_convert.add_arguments, data_convert.run, "convert records from one format to another"),
    "split": (
        data_split.add_arguments,
        data_split.run,
        "split records by person and image, so that the parts share neither",
    ),
}
"""Name -> functions ``add_arguments(parser)`` and ``run(arguments)``, and the line of ``--help``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per tool."""
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    for name, (add, run_command, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line)
        add(command)
        command.set_defaults(run_data=run_command)


def run(arguments: argparse.Namespace) -> int | None:
    """Run the chosen subcommand."""
    return arguments.run_data(arguments)
