"""``idavlm data COMMAND``: build, check, describe, show, mix, convert and split files of records."""

import argparse
import importlib
from typing import Any

COMMANDS: dict[str, str] = {
    "build": "build tuning data from annotations",
    "validate": "find faults of records and images, and leaks between training and held-out records",
    "stats": "count identities, photos, boxes, texts, tokens and names, and plot them",
    "show": "write a page of records with their images and boxes, to look at",
    "mix": "write a recipe of several files of records for idavlm train",
    "convert": "convert records from one format to another",
    "split": "split records by person and image, so that the parts share neither",
}
"""Name -> line of ``--help``. ``idavlm/cli/data_NAME.py`` defines ``add_arguments(parser)`` and ``run(arguments)``."""


class _CommandParser(argparse.ArgumentParser):
    """Imports the module of its command when the command is chosen, so that ``idavlm data --help`` needs no torch."""

    def __init__(self, *, module: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._module = module  # None for the parsers of further subcommands

    def parse_known_args(self, args=None, namespace=None):
        if self._module is not None:
            module, self._module = importlib.import_module(self._module), None
            module.add_arguments(self)
            self.set_defaults(run_data=module.run)
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per tool."""
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True, parser_class=_CommandParser)
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line, description=line, module=f"idavlm.cli.data_{name}")


def run(arguments: argparse.Namespace) -> int | None:
    """Run the chosen subcommand."""
    return arguments.run_data(arguments)
