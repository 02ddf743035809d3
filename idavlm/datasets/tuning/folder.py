"""Own annotations: a folder with photos of each person, and scenes with boxes, as records of the six tasks."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.data.images import ImageStore
from idavlm.data.json_records import JsonRecords
from idavlm.datasets.album import Album, AlbumImage, Appearance
from idavlm.datasets.record_composer import (
    FIRST_NAMES,
    TEST_SHARES,
    TRAIN_SHARES,
    RecordComposer,
    RecordOptions,
    drawn_names,
    own_names,
)
from idavlm.datasets.tuning.annotations import Report, check_kind, pixel_box, take
from idavlm.datasets.tuning.build import TuningSource
from idavlm.datasets.tuning.image_files import PartImages
from idavlm.datasets.tuning.splits import SPLITS, Splits, strictest
from idavlm.utils import check_choice, check_positive

PEOPLE = "people"
"""Folder, below the images, with one sub-folder per person."""

MIN_PHOTOS = 3
NAMINGS = ("drawn", "own")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class PhotoFolder(TuningSource):
    """Builds records of the six tasks from own photos and scenes.

    ``images`` has a folder ``people`` with one sub-folder per person (pet, object), named as the person, with at least
    three photos each. ``annotations`` is a JSON Lines file of scenes::

        {"image": "scenes/party.jpg", "people": [{"name": "Kate", "box": [853, 112, 1237, 516], "activity": "waving"}]}

    ``image`` is relative to ``images``, ``box`` is in pixels. ``activity`` follows "is" ("Kate is waving") and is
    needed for captions and questions only. A line about a photo of the folder ``people`` gives its box and activity;
    ``shot`` says which photos are of one shot, such as the frames of a burst. References are never of a shot
    that is asked about.

    People are split by the hash of their name. A scene belongs to the strictest split of the people in it, and the
    others are not introduced there.

    Args:
        annotations: the file of scenes.
        images: the folder.
        seed: seed of all choices.
        distractors: share of the records about a scene that introduce someone who is not there too, and of the test
            records of location and qa_single that ask for someone who is not there.
        records: number of training records.
        test_records: number of test records of the tasks of share 1, see ``test_shares``.
        shares: share of each task in the training records; None for
            :data:`idavlm.datasets.record_composer.TRAIN_SHARES`.
        test_shares: number of test records of each task as a share of ``test_records``; None for
            :data:`idavlm.datasets.record_composer.TEST_SHARES`, of the tasks in ``shares``.
        names: ``"drawn"`` for names that are drawn anew for each record, so that the model learns to use the
            photos; ``"own"`` for the names of the folders.
        question: question about the activity of a person.
        splits: shares of validation and test. The default holds no one out.
    """

    name = "folder"
    reader = "idavlm"
    units_per_part = 1
    records_per_unit = 200

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        seed: int = 0,
        distractors: float = 0.25,
        records: int = 10_000,
        test_records: int = 100,
        shares: Mapping[str, float] | None = None,
        test_shares: Mapping[str, float] | None = None,
        names: str = "drawn",
        question: str = "What is {name} doing?",
        splits: Splits | None = None,
    ) -> None:
        check_positive(records=records, test_records=test_records)
        check_choice("names", names, NAMINGS)
        self.image_root = Path(images)
        self.seed = seed
        self.record_options = RecordOptions(train_absent_share=distractors, test_absent_share=distractors)
        self.shares = dict(TRAIN_SHARES if shares is None else shares)
        if test_shares is None:
            test_shares = {task: share for task, share in TEST_SHARES.items() if self.shares.get(task)}
        self.test_shares = dict(test_shares)
        self.naming = names
        self.question = question
        self.splits = splits or Splits(val=0.0, test=0.0)
        self.problems: list[str] = []
        self.annotations = JsonRecords(annotations)
        photos = self._find_photos()
        self.albums = self._read_albums(photos)
        counts = {"train": records, "val": max(1, records // 20), "test": test_records}
        self._units = [
            (split, first, min(self.records_per_unit, counts[split] - first))
            for split in SPLITS
            if self.albums[split] is not None
            for first in (range(0, counts[split], self.records_per_unit) if split != "test" else [0])
        ]
        self.options = {
            "annotations": self.annotations.fingerprint,
            "photos": hashlib.sha256(
                "\n".join(path for paths in photos.values() for path in paths).encode()
            ).hexdigest()[:16],
            "seed": seed,
            "distractors": distractors,
            "records": records,
            "test_records": test_records,
            "shares": self.shares,
            "test_shares": self.test_shares,
            "names": names,
            "question": question,
            "val": self.splits.val,
            "test": self.splits.test,
        }
        self.test_records = test_records

    def __len__(self) -> int:
        return len(self._units)

    def _find_photos(self) -> dict[str, list[str]]:
        folder = self.image_root / PEOPLE
        if not folder.is_dir():
            raise ValueError(
                f"images={str(self.image_root)!r} has no folder {PEOPLE!r} with one sub-folder per person."
            )
        return {
            person.name: [
                f"{PEOPLE}/{person.name}/{file.name}"
                for file in sorted(person.iterdir())
                if file.suffix.lower() in _SUFFIXES
            ]
            for person in sorted(folder.iterdir())
            if person.is_dir()
        }

    def _read_albums(self, photos: Mapping[str, list[str]]) -> dict[str, Album | None]:
        """The images of each split; None for a split without enough people."""
        store = ImageStore(self.image_root)
        annotated = self._read_scenes(store, photos)
        person_splits = {person: self.splits.of(_key(person)) for person in photos}
        images: dict[str, list[AlbumImage]] = defaultdict(list)
        for person, paths in photos.items():
            usable = []
            for path in paths:
                if path in annotated:
                    usable.append(annotated.pop(path))
                    continue
                try:
                    height, width = store.size(path)
                except DataError as error:
                    self.problems.append(str(error))
                    continue
                usable.append(AlbumImage(path, (Appearance(person, box=(0, 0, width, height), shot=path),)))
            if len(usable) < MIN_PHOTOS:
                self.problems.append(
                    f"{self.image_root / PEOPLE / person}: {len(usable)} photos can be used, {MIN_PHOTOS} are needed; "
                    "the person is left out."
                )
                del person_splits[person]
                continue
            images[person_splits[person]] += usable
        for image in annotated.values():
            known = [each for each in image.appearances if each.identity in person_splits]
            split = strictest(person_splits[each.identity] for each in known)
            kept = tuple(each for each in known if person_splits[each.identity] == split)
            if len(kept) > 1:
                images[split].append(AlbumImage(image.path, kept))
            else:
                self.problems.append(
                    f"{image.path}: fewer than two people of one split are in the scene; it is not used."
                )
        albums: dict[str, Album | None] = {}
        for split in SPLITS:
            people = sum(found == split for found in person_splits.values())
            album = Album(images[split]) if images[split] else None
            if album is not None and (people < 4 or not album.scenes):
                if split == "train":
                    raise ValueError(
                        f"images={str(self.image_root)!r} has {people} people with photos and {len(album.scenes)} "
                        "scenes for training; at least 4 people and one scene are needed."
                    )
                self.problems.append(
                    f"split {split!r} has {people} people and {len(album.scenes)} scenes; it is left out."
                )
                album = None
            albums[split] = album
        for album in filter(None, albums.values()):
            full = [scene.path for scene in album.scenes if len(scene.appearances) == len(album.photos)]
            if full and self.record_options.train_absent_share:
                raise ValueError(
                    f"distractors={self.record_options.train_absent_share}: everyone is in {full[0]}, so that no one "
                    "is left to be introduced although absent; pass distractors=0 (--distractors 0), or add people."
                )
        if albums["train"] is None:
            raise ValueError(f"images={str(self.image_root)!r} has no usable photos for training.")
        needs_activities = [task for task in self.shares if task not in ("matching", "location") and self.shares[task]]
        if needs_activities and not albums["train"].activities:
            raise ValueError(
                f"shares: {', '.join(needs_activities)} need an activity of some people in {self.annotations.path}; "
                "add them, or pass shares= (--shares) for matching and location only."
            )
        return albums

    def _read_scenes(self, store: ImageStore, photos: Mapping[str, list[str]]) -> dict[str, AlbumImage]:
        """Annotated images by path. Faulty lines are added to ``problems``."""
        found: dict[str, AlbumImage] = {}
        report = Report(problems=self.problems)
        for number, entry in enumerate(self.annotations.decode_all()):
            where = self.annotations.where(number)
            with report.catch(where):
                if isinstance(entry, DataError):
                    raise entry
                image = self._read_scene(entry, where, store, photos)
                if image.path in found:
                    raise DataError(f"image={quote(image.path)} is annotated before; merge both lines.", where=where)
                found[image.path] = image
        return found

    def _read_scene(self, entry: Any, where: str, store: ImageStore, photos: Mapping[str, list[str]]) -> AlbumImage:
        path = take(entry, "image", str, where)
        height, width = store.size(path)
        appearances = []
        for number, person in enumerate(take(entry, "people", list, where)):
            name = take(person, "name", str, where, context=f"people[{number}]")
            if name not in photos:
                raise DataError(f"people[{number}].name={quote(name)} has no folder of photos.", where=where)
            if any(other.identity == name for other in appearances):
                raise DataError(f"people[{number}].name={quote(name)} is there twice.", where=where)
            box = pixel_box(person.get("box"), width, height, where, name=f"people[{number}].box")
            activity = check_kind(person["activity"], "activity", str, where) if "activity" in person else ""
            shot = check_kind(person["shot"], "shot", str, where) if "shot" in person else path
            appearances.append(Appearance(name, activity, tuple(round(value) for value in box), shot))
        if not appearances:
            raise DataError("people is empty; name at least one person, or remove the line.", where=where)
        appearances.sort(key=lambda each: each.box[0])
        return AlbumImage(path, tuple(appearances))

    def compose(self, unit: int, images: PartImages, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the records of a unit with their split."""
        if unit == 0:
            report.problems.extend(self.problems)
        split, first, count = self._units[unit]
        album = self.albums[split]
        people = {person: person for person in album.photos}
        naming = own_names(people) if self.naming == "own" else drawn_names(FIRST_NAMES)
        rng = Random(f"{self.seed} folder {split} {first}")
        composer = RecordComposer(album, rng, naming, self.question, self.record_options)
        if split == "test":
            records = composer.evaluation(self.test_records, shares=self.test_shares)
        else:
            records = composer.training(count, shares=self.shares)
        shots = {photo.path: photo.appearances[0].shot for photos in album.photos.values() for photo in photos}
        for number, record in enumerate(records, first):
            record["id"] = f"folder-{split}-{number}"
            record["meta"] = self._meta(record, shots)
            yield split, _with_output_paths(record, images)

    def _meta(self, record: dict[str, Any], shots: Mapping[str, str]) -> dict[str, Any]:
        scenes = [
            part["image"]
            for message in record["messages"]
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image"
        ]
        photos = [path for identity in record["identities"] for path in identity["images"]]
        return {
            "data": self.name,
            "annotation": self.annotations.path.name,
            "images": [f"folder:{path}" for path in dict.fromkeys([*scenes, *photos])],
            "people": {name: _key(person) for name, person in record["meta"]["people"].items()},
            "distractors": record["meta"]["distractors"],
            "references": [
                {"image": f"scenes/{path}", "of": path, "box": None, "shot": shots[path]} for path in photos
            ],
            "scenes": [{"image": f"scenes/{path}", "of": path} for path in scenes],
        }


def _key(person: str) -> str:
    return f"folder:person:{person}"


def _with_output_paths(record: dict[str, Any], images: PartImages) -> dict[str, Any]:
    """The record with the paths of its images in the built data set, which are put there."""

    def moved(path: str) -> str:
        return images.scene(path).image

    for identity in record["identities"]:
        identity["images"] = [moved(path) for path in identity["images"]]
    for message in record["messages"]:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = moved(part["image"])
    for box in record.get("boxes", []):
        box["image"] = moved(box["image"])
    return record
