"""``idavlm COMMAND ...``: dispatch to the module of the command; expected errors become one line."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS: dict[str, str] = {
    "convert": "convert a released checkpoint to idavlm",
    "train": "train a model as a configuration file describes it",
    "ablate": "run the variants of a program over seeds, and write tables of the results",
    "merge": "merge a LoRA adapter into its model",
    "ask": "ask a model about images, with reference photos of named identities",
    "data": "build, check, describe, show, mix, convert and split files of records",
    "chat": "talk to a model in the terminal, about images and a cast of named identities",
    "serve": "serve a model by the OpenAI interface, with identities and named banks",
    "web": "serve a web page to ask about images of a cast",
    "film": "find out who appears when and where in a film",
    "eval": "evaluate a model or its answers (MM-ID, grounding, VQA, recognition), or compare two runs",
}
"""Name -> line of ``--help``. ``idavlm/cli/NAME.py`` defines ``add_arguments(parser)`` and ``run(arguments)``, which
returns an exit status or None."""


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Build the parser. Only the module of the chosen command is imported, so that ``--help`` needs no torch."""
    parser = argparse.ArgumentParser(prog="idavlm", description="Identity-aware vision-language models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, line in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line)
        if name == chosen:
            module = importlib.import_module(f"idavlm.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 by default, 2 for invalid arguments or data, 130 after Ctrl-C.

    An expected error is one line on stderr. Any other exception is a bug of idavlm and passes with its traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0].startswith("--local_rank="):  # of the deepspeed launcher, which sets LOCAL_RANK as well
        argv = argv[1:]
    command = argv[0] if argv else ""
    try:
        arguments = build_parser(command).parse_args(argv)
        return arguments.run(arguments) or 0
    except (ValueError, OSError) as error:
        print(f"idavlm {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:  # its message, if any, says what is kept
        print(f"idavlm {command}: interrupted. {interruption}".rstrip(), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
