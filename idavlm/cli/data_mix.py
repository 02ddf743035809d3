"""``idavlm data mix``: write a recipe of several files of records, which ``idavlm train`` reads."""

import argparse
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from idavlm.cli.arguments import path
from idavlm.cli.data_arguments import RECIPE_SUFFIXES, source_of_recipe_file
from idavlm.data.errors import DataError
from idavlm.data.json_records import JsonRecords
from idavlm.data.mixing import MODES
from idavlm.data.table_records import TableRecords, is_table_path
from idavlm.utils import markdown_table, write_text

if TYPE_CHECKING:
    from idavlm.training.config import RecordFile

KEYS = ("train_data", "general_data", "eval_data", "task_data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = (
        "FILE is a path, or PATH,OPTION=VALUE,... with options of a file of records in a configuration, for example "
        "data/vcr/train.jsonl,max_records=30000 or llava.json,reader=llava,image_root=coco."
    )
    file = {"nargs": "+", "metavar": "FILE", "default": []}
    parser.add_argument("train", **{**file, "nargs": "*"}, help="identity records, or all records")
    parser.add_argument("--general", **file, help="general data, mixed in by the mixing ratio")
    parser.add_argument("--eval", **file, help="records whose losses are logged")
    parser.add_argument("--task", **file, help="evaluation records that the model answers at every evaluation")
    parser.add_argument("--out", type=path, required=True, help="the .yaml file to write")
    parser.add_argument("--mixing-mode", choices=MODES, help="how general data is mixed in; by default extra")
    parser.add_argument(
        "--mixing-ratio",
        type=float,
        help="by default such that an epoch reads as many general records as there are (0 to 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of max_records records of a file")


def run(arguments: argparse.Namespace) -> None:
    """Write the recipe, and print how many records of each file it uses."""
    from idavlm.training.config import read_data_recipe  # takes seconds, as it imports transformers

    if arguments.out.suffix not in RECIPE_SUFFIXES:
        raise ValueError(f"--out {arguments.out} must end with .yaml.")
    if not arguments.train:
        raise ValueError("pass at least one file of training records.")
    if not arguments.general and (arguments.mixing_ratio is not None or arguments.mixing_mode is not None):
        raise ValueError("--mixing-mode and --mixing-ratio have no effect without --general; leave them out.")
    given = (arguments.train, arguments.general, arguments.eval, arguments.task)
    recipe: dict[str, Any] = {}
    rows, used = [], {}
    for key, texts in zip(KEYS, given, strict=True):
        files = [_read(text, arguments.seed) for text in texts]
        counts = [_count(file) for file in files]
        used[key] = sum(min(count, file.max_records or count) for file, count in zip(files, counts, strict=True))
        for file, count in zip(files, counts, strict=True):
            chosen = min(count, file.max_records or count)
            rows.append([key, file.path, f"{count:,}", f"{chosen:,}", f"{chosen / used[key]:.1%}"])
        if files:
            recipe[key] = [_without_defaults(file) for file in files]
    if arguments.general:
        ratio = arguments.mixing_ratio
        recipe["mixing_mode"] = mode = arguments.mixing_mode or "extra"
        if mode != "joint":
            recipe["mixing_ratio"] = _default_ratio(used, mode) if ratio is None else ratio
        elif ratio is not None:
            raise ValueError(f"--mixing-ratio {ratio} has no effect with --mixing-mode joint; leave it out.")
    write_text(arguments.out, recipe_text(recipe, _command(arguments)))
    read_data_recipe(arguments.out)  # what was written is valid
    print(markdown_table(["key", "file", "records", "used", "share"], rows))
    for key in recipe.keys() & set(KEYS):
        print(f"{key}: {used[key]:,} records")
    print(f"{arguments.out}\nTrain with: idavlm train CONFIG.yaml data={arguments.out}")


def _command(arguments: argparse.Namespace) -> str:
    """The command that writes the recipe again."""
    words = ["idavlm", "data", "mix", *arguments.train]
    for name in ("general", "eval", "task"):
        files = getattr(arguments, name)
        words += [f"--{name}", *files] if files else []
    for name in ("mixing_mode", "mixing_ratio"):
        value = getattr(arguments, name)
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    return shlex.join([*words, "--seed", str(arguments.seed), "--out", str(arguments.out)])


def recipe_text(recipe: dict[str, Any], command: str) -> str:
    """The text of a recipe: one line for each file of records."""
    lines = [
        "# Data of a training run; paths are relative to the current folder. `idavlm train` reads it by the key data."
    ]
    lines.append(f"# Written by: {command}")
    for key, value in recipe.items():
        if key in KEYS:
            lines.append(f"{key}:")
            for file in value:
                flow = yaml.safe_dump(file, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
                lines.append(f"  - {flow.strip()}")
        else:
            lines.append(f"{key}: {value}")
    return "\n".join(lines) + "\n"


def _read(text: str, seed: int) -> "RecordFile":
    """A file of records from ``PATH,OPTION=VALUE,...``."""
    from idavlm.training.config import RecordFile
    from idavlm.training.config_file import CoreLoader

    file, *options = text.split(",")
    values: dict[str, Any] = {"path": file}
    for option in options:
        name, equals, value = option.partition("=")
        known = [field.name for field in fields(RecordFile)]
        if not equals or name not in known:
            raise ValueError(f"{text!r}: {option!r} is not OPTION=VALUE with an option of {', '.join(known[1:])}.")
        values[name] = yaml.load(value, CoreLoader)  # a subclass of SafeLoader
    if values.get("max_records") is not None:
        values.setdefault("seed", seed)
    try:
        return RecordFile(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{text!r}: {error}") from None


def _count(file: "RecordFile") -> int:
    """Number of records; the first of them must be readable, and there must be enough."""
    count = len(TableRecords(file.path) if is_table_path(Path(file.path)) else JsonRecords(file.path))
    first = next(iter(source_of_recipe_file(file)), None)
    if first is None:
        raise ValueError(f"{file.path} has no records; leave it out.")
    if isinstance(first.sample, DataError):
        raise first.sample
    if file.max_records is not None and file.max_records > count:
        raise ValueError(
            f"{file.path} has {count} records, fewer than max_records={file.max_records}; lower it, or leave it out."
        )
    return count


def _without_defaults(file: "RecordFile") -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(file)}
    return {name: value for name, value in asdict(file).items() if value != defaults[name]}


def _default_ratio(used: dict[str, int], mode: str) -> float:
    """The ratio at which an epoch reads each general record once, if all batches have the same size."""
    general, identity = used["general_data"], used["train_data"]
    share = general / identity if mode == "extra" else general / (general + identity)
    return round(min(share, 1.0), 4)
