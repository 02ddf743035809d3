"""Arguments that the commands of ``idavlm data`` share: which records are read, and how."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from idavlm.cli.arguments import name, path
from idavlm.data.readers import READERS
from idavlm.data.validation import RecordSource

if TYPE_CHECKING:
    from idavlm.training.config import RecordFile

RECIPE_SUFFIXES = (".yaml", ".yml")


def add_source_arguments(parser: argparse.ArgumentParser, *, many: bool = True) -> None:
    """Add ``records`` and how they are read."""
    text = "file of records (.jsonl, .json, .parquet) or folder of parquet files"
    if many:
        parser.add_argument("records", type=path, nargs="+", help=f"{text}; a .yaml recipe of `idavlm data mix`")
    else:
        parser.add_argument("records", type=path, help=text)
    parser.add_argument("--reader", choices=sorted(READERS), default="idavlm", help="format of the records")
    parser.add_argument(
        "--images", type=path, help="folder that image paths are relative to; by default images/ beside"
    )
    parser.add_argument(
        "--unused-fields",
        choices=("raise", "warn"),
        default="raise",
        help="whether a field that the reader does not use is an error",
    )
    parser.add_argument("--allow-urls", action="store_true", help="images may be URLs")


def add_processor_argument(parser: argparse.ArgumentParser, help: str) -> None:
    """Add ``--processor``."""
    parser.add_argument("--processor", type=name, metavar="MODEL", help=help)


def load_processor(model: str | None):
    """The processor of a model of idavlm or of transformers; None without ``--processor``."""
    if model is None:
        return None
    from transformers import AutoConfig

    from idavlm.models import IDAVLMProcessor, IdentityProcessor

    is_own = AutoConfig.from_pretrained(model).model_type == "idavlm"
    return (IDAVLMProcessor if is_own else IdentityProcessor).from_pretrained(model)


def sources_of(arguments: argparse.Namespace) -> tuple[list[RecordSource], list[RecordSource]]:
    """The sources of the arguments: training records, and held-out ones of recipes."""
    return read_sources(arguments.records, arguments)


def read_sources(files: Sequence[Path], arguments: argparse.Namespace) -> tuple[list[RecordSource], list[RecordSource]]:
    """Sources of files, by the options of the command line, and of recipes, by their own."""
    train, held_out = [], []
    for file in files:
        if file.suffix in RECIPE_SUFFIXES:
            from idavlm.training.config import read_data_recipe  # takes seconds, as it imports transformers

            data = read_data_recipe(file)
            train += map(source_of_recipe_file, [*data.train_data, *data.general_data])
            held_out += map(source_of_recipe_file, [*data.eval_data, *data.task_data])
        else:
            train.append(source_of(file, arguments))
    return train, held_out


def source_of(file: Path, arguments: argparse.Namespace) -> RecordSource:
    """The source of one file, by the options of the command line."""
    return RecordSource(
        str(file),
        None if arguments.images is None else str(arguments.images),
        arguments.reader,
        arguments.unused_fields,
        arguments.allow_urls,
    )


def source_of_recipe_file(file: "RecordFile") -> RecordSource:
    """The source of a file of a recipe, by its own options."""
    return RecordSource(file.path, file.image_root, file.reader, file.unused_fields, file.allow_urls)


@contextmanager
def progress_bar(unit: str = " records") -> Iterator:
    """A bar on stderr, if that is a terminal; called with the number of steps."""
    from tqdm import tqdm

    with tqdm(unit=unit, disable=not sys.stderr.isatty()) as bar:
        yield bar.update
