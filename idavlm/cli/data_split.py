"""``idavlm data split``: divide records by person and image, so that the parts share neither."""

import argparse
import hashlib
import json
from collections.abc import Hashable
from contextlib import ExitStack

from idavlm.cli.arguments import name, path, positive_int
from idavlm.cli.data_arguments import add_source_arguments, progress_bar, source_of
from idavlm.data.errors import DataError
from idavlm.data.images import RecordImages
from idavlm.data.record_meta import meta_of, people_of, shots_of
from idavlm.data.record_splits import TOLERANCE, split_records
from idavlm.data.schema import Sample
from idavlm.data.table_records import SUFFIX, TableRecords, is_table_path
from idavlm.data.validation.image_facts import (
    ImageFacts,
    ImageKey,
    facts_of_all,
    image_key,
    num_cores,
    parallel_map,
    root_of_image,
)
from idavlm.utils import markdown_table

COMPARE = ("pixels", "paths")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_source_arguments(parser, many=False)
    parser.add_argument("--out", type=path, required=True, help="folder for one file for each split")
    parser.add_argument(
        "--shares",
        type=name,
        nargs="+",
        default=["train=0.9", "test=0.1"],
        metavar="NAME=SHARE",
        help="splits and their shares; by default train=0.9 test=0.1",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest difference between a share and the one reached"
    )
    parser.add_argument(
        "--compare", choices=COMPARE, default="pixels", help="what makes images the same; pixels opens each image once"
    )
    parser.add_argument("--names-are-people", action="store_true", help="one name is one person in all records")
    parser.add_argument("--workers", type=positive_int, help="processes that open images; by default one per core")


def run(arguments: argparse.Namespace) -> None:
    """Write the splits, and print their sizes."""
    shares = _shares(arguments.shares)
    source = source_of(arguments.records, arguments)
    reads: list[list[Hashable]] = []
    jobs: dict[ImageKey, tuple] = {}
    without_people = 0
    with progress_bar() as progress:
        for read in source:
            if isinstance(read.sample, DataError):
                raise read.sample
            keys, unknown = _keys(read.sample, jobs, names_are_people=arguments.names_are_people)
            reads.append(keys)
            without_people += unknown
            progress(1)
    if arguments.compare == "pixels":
        digest_of = _digests(jobs, arguments.workers)
        reads = [[digest_of.get(key, key) for key in keys] for keys in reads]
    split = split_records(reads, shares, seed=arguments.seed, tolerance=arguments.tolerance)
    _write(arguments, split, shares)
    rows = [[part, split.count(part), f"{split.count(part) / len(split):.1%}"] for part in shares]
    print(markdown_table(["split", "records", "share"], rows))
    print(f"Image paths are relative to {source.image_root or arguments.records.parent / 'images'}, as before.")
    if without_people:
        print(
            f"{without_people} records with identities have no meta.people: their persons are told apart by their "
            "reference photos only."
        )


def _shares(texts: list[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in texts:
        part, equals, share = text.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not equals or not part.isidentifier() or part in shares or not value > 0:
            raise ValueError(f"--shares {text!r} must be NAME=SHARE, with a new name and a positive number.")
        shares[part] = value
    return shares


def _keys(sample: Sample, jobs: dict, *, names_are_people: bool) -> tuple[list[Hashable], bool]:
    """Keys of the persons, shots and images of a record, and whether a person is not known."""
    people = people_of(sample)
    names = [identity.name for identity in sample.identities]
    known = names if names_are_people else [people[each] for each in names if each in people]
    keys: list[Hashable] = [("person", person) for person in known]
    keys += [("shot", shot) for shot in shots_of(sample).values()]
    keys += [("image", str(key)) for key in meta_of(sample, "images")]
    held = sample.image_root.images if isinstance(sample.image_root, RecordImages) else {}
    for image in sample.images:
        if image in held:  # of a table: its bytes are not kept
            keys.append(("bytes", hashlib.blake2b(held[image], digest_size=16).digest()))
            continue
        key = image_key(sample, image)
        jobs.setdefault(key, (root_of_image(sample, image), image))
        keys.append(key)
    return keys, len(known) < len(names)


def _digests(jobs: dict[ImageKey, tuple], workers: int | None) -> dict[ImageKey, bytes]:
    """Hash of the pixels of each image.

    Raises:
        DataError: an image is missing or damaged.
    """
    found = {}
    with parallel_map(workers or num_cores()) as mapped, progress_bar(" images") as progress:
        for key, facts in zip(jobs, facts_of_all(list(jobs.values()), mapped), strict=True):
            if not isinstance(facts, ImageFacts):
                raise DataError(f"{facts.message} Repair it, or pass --compare paths.", kind="image")
            found[key] = facts.digest
            progress(1)
    return found


def _write(arguments: argparse.Namespace, split: list[str], shares: dict[str, float]) -> None:
    """Write the records of each split as they are in the file."""
    source, out = arguments.records, arguments.out
    is_table = is_table_path(source)
    files = {part: out / f"{part}{SUFFIX if is_table else '.jsonl'}" for part in shares}
    for file in files.values():
        if file.resolve() == source.resolve():
            raise ValueError(f"--out {out}: {file} is the file that is read; write to another folder.")
    out.mkdir(parents=True, exist_ok=True)
    if is_table:
        records = TableRecords(source)
        for part, file in files.items():
            records.write(file, [number for number, of_record in enumerate(split) if of_record == part])
        return
    unfinished = {part: file.with_name(f"{file.name}.part") for part, file in files.items()}
    with ExitStack() as stack:
        streams = {part: stack.enter_context(path.open("w", encoding="utf-8")) for part, path in unfinished.items()}
        for read, part in zip(source_of(source, arguments), split, strict=True):
            streams[part].write(json.dumps(read.record, ensure_ascii=False) + "\n")
    for part, file in files.items():
        unfinished[part].replace(file)
