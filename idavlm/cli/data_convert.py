"""``idavlm data convert``: records from one format to another."""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from idavlm.cli.arguments import name, path
from idavlm.cli.data_arguments import add_source_arguments, progress_bar, source_of
from idavlm.data.errors import DataError, ErrorLog
from idavlm.data.images import ImageStore
from idavlm.data.schema import Box, Message, Part, Sample
from idavlm.data.table_records import SUFFIX
from idavlm.data.writers import WRITERS, BoxText, Losses
from idavlm.data.writers.table import TableWriter

BOX_FORMATS = {"llava": "unit", "qwen_vl": "qwen"}
"""Box formats that formats of records imply."""

OWN = "idavlm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_source_arguments(parser, many=False)
    parser.add_argument("--to", choices=sorted(WRITERS), default=OWN, help="format to write; by default the schema")
    parser.add_argument("--out", type=path, required=True, help=".jsonl, .json (a list), or .parquet (the schema only)")
    parser.add_argument(
        "--box-format",
        type=name,
        help="text of boxes in formats without boxes, a box format such as norm1000; by default unit for llava, qwen "
        "for qwen_vl",
    )
    parser.add_argument("--image-prefix", type=name, help="folder that is put before the image paths that are written")
    parser.add_argument("--embed-images", action="store_true", help="store the images in the parquet file")
    parser.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise", help="whether invalid records are left out"
    )


def run(arguments: argparse.Namespace) -> None:
    """Convert, and print what the format cannot hold."""
    out, is_table = arguments.out, arguments.out.suffix == SUFFIX
    if out.suffix not in (".jsonl", ".json", SUFFIX):
        raise ValueError(f"--out {out} must end with .jsonl, .json or {SUFFIX}.")
    if is_table and arguments.to != OWN:
        raise ValueError(f"--out {out} is a table of the schema, not of --to {arguments.to}; write .jsonl or .json.")
    if arguments.embed_images and not is_table:
        raise ValueError(f"--embed-images needs a {SUFFIX} file; change --out {out}.")
    if arguments.embed_images and arguments.image_prefix is not None:
        raise ValueError("--image-prefix has no effect with --embed-images; leave it out.")
    if out.resolve() == arguments.records.resolve():
        raise ValueError(f"--out {out} is the file that is read; write another one.")
    kind = arguments.box_format or BOX_FORMATS.get(arguments.to)
    if arguments.box_format is not None and arguments.to in (OWN, "ms_swift"):
        raise ValueError(f"--box-format has no effect with --to {arguments.to}, which holds boxes; leave it out.")
    prefix = "" if arguments.image_prefix is None else arguments.image_prefix.rstrip("/") + "/"
    if arguments.to == OWN and (prefix.startswith("/") or ".." in Path(prefix).parts):
        raise ValueError(f"--image-prefix {prefix}: paths of the schema stay below the image root; use a relative one.")
    box_text = None if kind is None else _box_text(kind, prefix)
    losses, errors, count = Losses(), ErrorLog(), 0
    source = source_of(arguments.records, arguments)
    with _open(out) as write, progress_bar() as progress:
        for read in source:
            try:
                if isinstance(read.sample, DataError):
                    raise read.sample
                sample = _with_prefix(read.sample, prefix)
                record = WRITERS[arguments.to](sample, losses, box_text)
                write(record, read.sample if arguments.embed_images else None)
            except DataError as error:
                if arguments.on_error == "raise":
                    raise error if str(error).startswith(read.where) else error.at(read.where) from None
                errors.add(error.kind, str(error))
                continue
            count += 1
            progress(1)
    print(f"{count} records: {out}")
    if losses.counts:
        print(f"The format {arguments.to} cannot hold everything:\n{losses}")
    if errors.total:
        print(errors)


def _box_text(kind: str, prefix: str) -> BoxText:
    from idavlm.models import BoxFormat  # takes seconds, as it imports transformers

    box_format = BoxFormat(kind)

    def write(box: Box, sample: Sample) -> str:
        height, width = ImageStore(sample.image_root).size(box.image.removeprefix(prefix))
        edges = box.box
        if box.relative:
            edges = [edge * side for edge, side in zip(edges, (width, height) * 2, strict=True)]
        return box_format.write(box.name, edges, (height, width))

    return write


def _with_prefix(sample: Sample, prefix: str) -> Sample:
    """The sample with ``prefix`` before all paths of images."""

    def moved(part: Part | Box) -> Part | Box:
        return replace(part, image=prefix + part.image) if part.image else part

    if not prefix:
        return sample
    return replace(
        sample,
        identities=[replace(each, images=[prefix + image for image in each.images]) for each in sample.identities],
        messages=[Message(message.role, [moved(part) for part in message.content]) for message in sample.messages],
        boxes=[moved(box) for box in sample.boxes],
    )


@contextlib.contextmanager
def _open(out: Path) -> Iterator[Callable[[dict[str, Any], Sample | None], None]]:
    """A function that writes a record, and embeds the images of a sample. The file appears when it is complete."""
    if out.suffix == SUFFIX:
        with TableWriter(out) as table:
            yield lambda record, sample: table.write(record, None if sample is None else _bytes_of(sample))
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            is_list, number = out.suffix == ".json", 0
            file.write("[\n" if is_list else "")

            def write(record: dict[str, Any], sample: Sample | None) -> None:
                nonlocal number
                file.write(",\n" if is_list and number else "")
                file.write(json.dumps(record, ensure_ascii=False) + ("" if is_list else "\n"))
                number += 1

            yield write
            file.write("\n]\n" if is_list else "")
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _bytes_of(sample: Sample) -> Callable[[str], bytes]:
    """Returns the bytes of an image of the sample."""
    return ImageStore(sample.image_root).read_bytes
