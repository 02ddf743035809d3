"""RefCOCO, RefCOCO+ and RefCOCOg: individuals in COCO images that referring expressions single out."""

import ast
import io
import json
import pickle
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.datasets.tuning.annotations import (
    Report,
    Unsuitable,
    area,
    check_kind,
    draw_distractor,
    pixel_box,
    read_json,
    take,
)
from idavlm.datasets.tuning.build import TuningSource
from idavlm.datasets.tuning.image_files import PartImages
from idavlm.datasets.tuning.names import draw_names, phrase_gender
from idavlm.datasets.tuning.published import box_text, conversation, image_tag, is_mirrored
from idavlm.datasets.tuning.records import Introduced, identity_record, location_turn
from idavlm.datasets.tuning.splits import Splits, strictest

MIN_AREA = 3000
"""Minimum box of an individual that a record introduces, in square pixels."""

MAX_INTRODUCED = 4

_OWN_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test", "testA": "test", "testB": "test"}
_COCO_ID = re.compile(r"(?:COCO_\w+?_)?(\d{12})")
_FOLDERS = ("", "train2014", "coco/train2014", "images/train2014")


@dataclass(frozen=True)
class Referred:
    """An individual that expressions refer to.

    Attributes:
        where: file and row.
        image_id: id of the COCO image.
        annotation_id: id of the COCO annotation; -1 if the format has none.
        split: ``"train"``, ``"val"`` or ``"test"``.
        category: name of the COCO category; empty if the format has none.
        box: ``[x1, y1, x2, y2]`` in pixels.
        size: (width, height) of the image; None if the format does not say.
        file_name: file name in the annotation, which names image and annotation.
        expressions: the referring expressions.
        embedded: file, row group and row of the image if the annotation file holds it.
    """

    where: str
    image_id: int
    annotation_id: int
    split: str
    category: str
    box: list[float]
    size: tuple[float, float] | None
    file_name: str
    expressions: tuple[str, ...]
    embedded: tuple[str, int, int] | None = None


class RefCOCO(TuningSource):
    """Builds records from RefCOCO, RefCOCO+ and RefCOCOg.

    Formats are recognised by the files: ``refs(unc).p`` or ``refs(umd).p`` with ``instances.json`` in the same folder,
    parquet files of ``jxu124/refcoco*``, and parquet files of ``lmms-lab/RefCOCO*``, which hold the images.

    The individuals of an image that are people are introduced by changed crops and asked for, one location question
    each. Pass all three data sets at once: an image that is held out by one of them is then held out by all.

    Args:
        annotations: files, or folders that hold them.
        images: folder of the COCO images: ``COCO_train2014_*.jpg`` in it, or in its folder ``train2014``.
        seed: seed of all choices.
        distractors: share of the records that introduce an individual of another image too.
        categories: COCO categories to introduce; None for all of them. Formats without categories need None.
        as_published: build records as IDA-VLM's script does, with its mistakes: one record for the first row of each
            individual, of every category, from the training and validation splits.
        splits: shares of validation and test.
    """

    name = "refcoco"
    units_per_part = 64

    def __init__(
        self,
        annotations: str | Path | Sequence[str | Path],
        images: str | Path,
        *,
        seed: int = 0,
        distractors: float = 0.25,
        categories: Sequence[str] | None = ("person",),
        as_published: bool = False,
        splits: Splits | None = None,
    ) -> None:
        paths = [annotations] if isinstance(annotations, (str, Path)) else list(annotations)
        files = [file for path in paths for file in _files(Path(path))]
        self.image_root = Path(images)
        self.seed = seed
        self.distractors = distractors
        self.categories = None if categories is None else list(categories)
        self.as_published = as_published
        self.splits = splits or Splits()
        self.reader = "qwen_vl" if as_published else "idavlm"
        report = Report()
        referred = [entry for file in files for entry in _read(file, report)]
        self.problems = report.problems
        known = sorted({entry.category for entry in referred} - {""})
        for category in [] if as_published else self.categories or []:
            if category not in known:
                found = ", ".join(known) or "they name no categories"
                raise ValueError(
                    f"categories: {category!r} is in none of the files ({found}); pass categories=None "
                    "(--categories all), or another one."
                )
        self.options = {
            "annotations": {"/".join(file.parts[-2:]): file.stat().st_size for file in files},
            "seed": seed,
            "distractors": distractors,
            "categories": self.categories,
            "as_published": as_published,
            "val": self.splits.val,
            "test": self.splits.test,
        }
        splits_of_image: dict[int, list[str]] = defaultdict(list)
        for entry in referred:
            splits_of_image[entry.image_id].append(entry.split)
        self._own_splits = {image: strictest(found) for image, found in splits_of_image.items()}
        self._units = _first_rows(referred) if as_published else _by_image(referred)
        self._images = {_image_name(entry.image_id): entry.embedded for entry in referred if entry.embedded}

    def __len__(self) -> int:
        return len(self._units)

    def read_embedded(self, path: str) -> bytes | None:
        """Bytes of an image in a parquet file of ``lmms-lab``."""
        found = self._images.get(path)
        return None if found is None else _embedded_image(*found)

    def split_of(self, image_id: int) -> str:
        """Split of an image: the strictest that one of the data sets assigns."""
        return self.splits.of(f"coco:{image_id}", own=self._own_splits[image_id])

    def compose(self, unit: int, images: PartImages, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the record of an image (as published: of an individual) with its split."""
        if unit == 0:
            report.problems.extend(self.problems)
        entries = self._units[unit]
        with report.catch(entries[0].where):
            rng = Random(f"{self.seed} refcoco {entries[0].image_id} {entries[0].annotation_id}")
            if self.as_published:
                yield "train", self._compose_as_published(entries[0], images)
            else:
                yield self._compose(entries, images, rng, report)

    def _suitable(self, entries: Sequence[Referred], size: tuple[float, float], report: Report) -> list[Referred]:
        """Individuals that may be introduced, each with a box inside the image."""
        found = []
        for entry in entries:
            with report.catch(entry.where):
                box = pixel_box(entry.box, *size, entry.where)
                if self.categories is not None and entry.category not in self.categories:
                    raise Unsuitable("another category")
                if area(box) < MIN_AREA:
                    raise Unsuitable(f"a box is smaller than {MIN_AREA} square pixels")
                found.append(entry)
        return found

    def _compose(
        self, entries: list[Referred], images: PartImages, rng: Random, report: Report
    ) -> tuple[str, dict[str, Any]]:
        image_id = entries[0].image_id
        split = self.split_of(image_id)
        path = self._path(image_id)
        size = images.size(path)
        images.open(path)
        found = self._suitable(entries, size, report)
        if not found:
            raise Unsuitable("no individual of the image can be introduced")
        if len(found) > MAX_INTRODUCED:
            found = rng.sample(found, MAX_INTRODUCED)
        other = None
        if rng.random() < self.distractors:
            other = draw_distractor(lambda: self._draw_individual(image_id, split, images, rng), report)
        genders = [phrase_gender(" ".join(entry.expressions)) for entry in [*found, *([other] if other else [])]]
        texts = [expression for entry in found for expression in entry.expressions]
        names = draw_names(genders, rng, texts)
        scene = images.scene(path)
        introduced = []
        for entry, name in zip(found, names, strict=False):
            box = pixel_box(entry.box, *size, entry.where)
            introduced.append(Introduced(name, _key(entry), [images.crop(path, box, rng)], {scene.image: box}))
        keys = [f"coco:{image_id}"]
        if other is not None:
            there = self._path(other.image_id)
            reference = images.crop(there, pixel_box(other.box, *images.size(there), other.where), rng)
            introduced.append(Introduced(names[-1], _key(other), [reference]))
            keys.append(f"coco:{other.image_id}")
            report.counts["distractors"] += 1
        rng.shuffle(introduced)
        turns = [location_turn(identity) for identity in introduced]
        rng.shuffle(turns)
        if split == "test":
            turns = turns[:1]
        record = identity_record(
            f"refcoco-{image_id}",
            data=self.name,
            annotation=entries[0].where,
            image_keys=keys,
            introduced=introduced,
            scenes=[scene],
            turns=turns,
            evaluation=split == "test",
        )
        return split, record

    def _draw_individual(self, image_id: int, split: str, images: PartImages, rng: Random) -> Referred | None:
        """An individual of a random image, if it is another image of the same split."""
        entries = rng.choice(self._units)
        if entries[0].image_id == image_id or self.split_of(entries[0].image_id) != split:
            return None
        path = self._path(entries[0].image_id)
        images.open(path)
        found = self._suitable(entries, images.size(path), Report())
        return rng.choice(found) if found else None

    def _path(self, image_id: int) -> str:
        """Path of a COCO image below the image root.

        Raises:
            DataError: it is in none of the known folders.
        """
        name = _image_name(image_id)
        if name in self._images:
            return name
        for folder in _FOLDERS:
            path = f"{folder}/{name}" if folder else name
            if (self.image_root / path).is_file():
                return path
        raise DataError(f"{name} is neither in {self.image_root} nor in its folder train2014.", kind="image")

    def _compose_as_published(self, entry: Referred, images: PartImages) -> dict[str, Any]:
        path = self._path(entry.image_id)
        size = images.size(path)
        box = pixel_box(entry.box, *size, entry.where)
        scene = images.scene(path)
        name = f"{Path(entry.file_name).stem}_crop.jpg"
        mirrored = is_mirrored(self.seed, entry.file_name, entry.box)
        crop = images.published_crop(path, box, name, mirrored=mirrored)
        prompt = (
            f"Picture 1: {image_tag(crop)}\nPicture 2:{image_tag(scene.image)}\n"
            "Identify the Picture 1 instance in the Picture 2 with grounding:"
        )
        return conversation(
            f"refcoco-{entry.file_name}",
            [prompt, box_text("Picture 1", entry.box, entry.size or size)],
            data=self.name,
            annotation=entry.where,
            image_keys=[f"coco:{entry.image_id}"],
            people={"Picture 1": _key(entry)},
        )


def _key(entry: Referred) -> str:
    return f"coco:{entry.image_id}#{entry.annotation_id if entry.annotation_id >= 0 else entry.file_name}"


def _image_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def _by_image(referred: list[Referred]) -> list[list[Referred]]:
    """Individuals by image. One that several data sets refer to, or several rows, is one individual."""
    found: dict[int, dict[tuple, Referred]] = {}
    for entry in referred:
        identity = (entry.annotation_id,) if entry.annotation_id >= 0 else tuple(round(value) for value in entry.box)
        found.setdefault(entry.image_id, {}).setdefault(identity, entry)
    return [list(individuals.values()) for individuals in found.values()]


def _first_rows(referred: list[Referred]) -> list[list[Referred]]:
    """The first row of each file name in the training and validation splits; RefCOCOg comes first, as published."""
    first: dict[str, Referred] = {}
    for entry in sorted(referred, key=lambda entry: "refcocog" not in entry.where.lower()):
        if entry.split != "test":
            first.setdefault(entry.file_name, entry)
    return [[entry] for entry in first.values()]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted([*path.rglob("refs(*).p"), *path.rglob("*.parquet")])
        if not found:
            raise ValueError(f"annotations={str(path)!r} holds neither refs(...).p nor parquet files of RefCOCO.")
        return found
    if not path.is_file():
        raise ValueError(f"annotations={str(path)!r} does not exist; pass refs(...).p or parquet files of RefCOCO.")
    return [path]


def _read(file: Path, report: Report) -> Iterator[Referred]:
    """Read a file. Faulty rows are reported."""
    rows = _pickle_rows(file) if file.suffix == ".p" else _parquet_rows(file)
    for where, read in rows:
        with report.catch(where):
            yield read()


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers; a pickle that names a class or function could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"names {module}.{name}; a file of references holds only lists, dicts, strings and numbers.")


def _pickle_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Rows of ``refs(...).p``, which Python 2 wrote, with ``instances.json``."""
    try:
        refs = _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except DataError as error:
        raise error.at(str(file)) from None
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"is no pickle of references ({error}); restore it.", where=str(file)) from None
    path = file.parent / "instances.json"
    instances = read_json(path)
    by_name: dict[str, dict[int, dict]] = {}
    for name in ("annotations", "images", "categories"):
        entries = take(instances, name, list, str(path))
        by_name[name] = {
            entry["id"]: entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), int)
        }
    for number, ref in enumerate(check_kind(refs, "the pickle", list, str(file))):
        where = f"{file}[{number}]"

        def read(ref: Any = ref, where: str = where) -> Referred:
            image_id, annotation_id = take(ref, "image_id", int, where), take(ref, "ann_id", int, where)
            annotation, image = by_name["annotations"].get(annotation_id), by_name["images"].get(image_id)
            if annotation is None or image is None:
                missing = f"ann_id={annotation_id}" if annotation is None else f"image_id={image_id}"
                raise DataError(f"{missing} is not in {path}.", where=where)
            sentences = take(ref, "sentences", list, where)
            category = by_name["categories"].get(take(ref, "category_id", int, where), {})
            return Referred(
                where=where,
                image_id=image_id,
                annotation_id=annotation_id,
                split=_split(take(ref, "split", str, where), where),
                category=category.get("name", ""),
                box=_corners(annotation.get("bbox"), where),
                size=_size(image, where),
                file_name=take(ref, "file_name", str, where),
                expressions=tuple(take(sentence, "sent", str, where) for sentence in sentences),
            )

        yield where, read


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Rows of ``jxu124/refcoco*`` and ``lmms-lab/RefCOCO*``; images are not read."""
    table = _parquet(str(file))
    columns = set(table.schema_arrow.names)
    if {"raw_anns", "image_id", "ann_id"} <= columns:
        read_row, wanted = _read_jxu124, columns - {"image"}
    elif {"bbox", "answer", "file_name"} <= columns:
        read_row, wanted = _read_lmms, columns - {"image", "segmentation"}
    else:
        raise DataError(
            f"has the columns {', '.join(sorted(columns))}; expected those of jxu124/refcoco or lmms-lab/RefCOCO.",
            where=str(file),
        )
    embeds = "image" in columns
    number = 0
    for group in range(table.num_row_groups):
        for index, row in enumerate(table.read_row_group(group, columns=sorted(wanted)).to_pylist()):
            where = f"{file}[{number}]"
            place = (str(file), group, index) if embeds else None
            number += 1

            def read(row: Any = row, where: str = where, place: Any = place) -> Referred:
                return read_row(row, where, place)

            yield where, read


def _read_jxu124(row: dict, where: str, place: tuple[str, int, int] | None) -> Referred:
    annotation, image = (_parsed(row.get(name), name, where) for name in ("raw_anns", "raw_image_info"))
    captions = row.get("captions") or []
    return Referred(
        where=where,
        image_id=take(row, "image_id", int, where),
        annotation_id=take(row, "ann_id", int, where),
        split=_split(take(row, "split", str, where), where),
        category=_category(row.get("category_id", annotation.get("category_id"))),
        box=_corners(annotation.get("bbox"), where),
        size=_size(image, where),
        file_name=take(row, "file_name", str, where),
        expressions=tuple(str(caption) for caption in captions),
        embedded=place,
    )


def _read_lmms(row: dict, where: str, place: tuple[str, int, int] | None) -> Referred:
    file_name = take(row, "file_name", str, where)
    found = _COCO_ID.search(file_name)
    if found is None:
        raise DataError(f"file_name={quote(file_name)} holds no id of a COCO image.", where=where)
    stem = Path(where.rpartition("[")[0]).name.split("-")[0]
    return Referred(
        where=where,
        image_id=int(found[1]),
        annotation_id=-1,
        split=_split(stem, where),
        category="",
        box=_corners(row.get("bbox"), where),
        size=None,
        file_name=file_name,
        expressions=tuple(str(answer) for answer in row.get("answer") or []),
        embedded=place,
    )


def _category(number: Any) -> str:
    """Name of a COCO category where the format has only its number: 1 is "person"."""
    return "person" if number == 1 else f"category {number}"


def _split(name: str, where: str) -> str:
    if name not in _OWN_SPLITS:
        raise DataError(f"split={quote(name)} is not known; expected one of {', '.join(_OWN_SPLITS)}.", where=where)
    return _OWN_SPLITS[name]


def _corners(box: Any, where: str) -> list[float]:
    """``[x, y, width, height]`` as corners."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
        raise DataError(f"bbox={quote(box)} must be four numbers [x, y, width, height].", where=where)
    x, y, width, height = box
    return [x, y, x + width, y + height]


def _size(image: Any, where: str) -> tuple[float, float]:
    """(width, height) that an annotation gives for an image."""
    width, height = (take(image, name, float, where) for name in ("width", "height"))
    if not (0 < width < 1e6 and 0 < height < 1e6):
        raise DataError(f"width={width} and height={height} are no size of an image.", where=where)
    return width, height


def _parsed(text: Any, name: str, where: str) -> dict:
    """A column that holds the text of a dict, as JSON or as Python writes it."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict):
            return value
    raise DataError(f"{name}={quote(text)} is no text of a dict.", where=where)


@lru_cache(16)
def _parquet(path: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError("parquet files need pyarrow; install idavlm[data].") from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"is no parquet file ({error}); restore it.", where=path) from None


@lru_cache(2)
def _image_column(path: str, group: int) -> Any:
    return _parquet(path).read_row_group(group, columns=["image"]).column("image")


def _embedded_image(path: str, group: int, row: int) -> bytes | None:
    value = _image_column(path, group)[row].as_py()
    return value.get("bytes") if isinstance(value, dict) else value
