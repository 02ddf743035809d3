"""``idavlm data COMMAND``: check, describe, show, mix, convert and split files of records."""

import argparse

from idavlm.cli import data_convert, data_mix, data_show, data_split, data_stats, data_validate

COMMANDS = {
    "validate": (data_validate, "find faults of records and images, and leaks between training and held-out records"),
    "stats": (data_stats, "count identities, photos, boxes, texts, tokens and names, and plot them"),
    "show": (data_show, "write a page of records with their images and boxes, to look at"),
    "mix": (data_mix, "write a recipe of several files of records for idavlm train"),
    "convert": (data_convert, "convert records from one format to another"),
    "split": (data_split, "split records by person and image, so that the parts share neither"),
}
"""Name -> module with ``add_arguments(parser)`` and ``run(arguments)``, and the line of ``--help``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per tool."""
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line)
        module.add_arguments(command)
        command.set_defaults(run_data=module.run)


def run(arguments: argparse.Namespace) -> int | None:
    """Run the chosen subcommand."""
    return arguments.run_data(arguments)
