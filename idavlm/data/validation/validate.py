"""Validation of files of records: every check on every record, in one pass through the files."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from idavlm.data.dataset import ReadRecord
from idavlm.data.errors import DataError, quote
from idavlm.data.images import ImageStore, RecordImages
from idavlm.data.record_meta import meta_of, origins_of, people_of, shots_of
from idavlm.data.schema import Sample
from idavlm.data.validation.image_facts import (
    GreyCopies,
    ImageFacts,
    ImageFault,
    ImageKey,
    Map,
    facts_of_all,
    image_key,
    num_cores,
    parallel_map,
    root_of_image,
)
from idavlm.data.validation.problems import CHECKS, MAX_PROBLEMS, WARNING, Problem, ValidationReport
from idavlm.data.validation.record_checks import Finding, check_boxes, check_texts
from idavlm.data.validation.same_pixels import CANDIDATE, Place, find_crop, is_cut_from, is_same_image
from idavlm.data.validation.similar_images import SimilarImages
from idavlm.data.validation.sources import RecordSource
from idavlm.utils import check_positive

CHUNK = 512
"""Records that are checked at once."""

Progress = Callable[[int], None]
"""Called with the number of records that were checked since the last call."""


def validate_records(
    train: Sequence[RecordSource],
    test: Sequence[RecordSource] = (),
    *,
    images: bool = True,
    crops: bool = True,
    names_are_people: bool = False,
    num_tokens: Callable[[Sample], int] | None = None,
    num_workers: int | None = None,
    max_problems: int = MAX_PROBLEMS,
    progress: Progress | None = None,
) -> ValidationReport:
    """Check files of records; :data:`CHECKS` lists what is found.

    Each image is opened once, and again if it may be a reference that is cut out of a scene, or its scene. Memory holds
    hashes and places of each image and record; small copies of the images are in a temporary file.

    Args:
        train: files of training records, or any files that are checked on their own.
        test: files of held-out records. They must share no person, image or shot with ``train``.
        images: whether images are opened. If not, nothing is known of their sizes and pixels, and images are the same
            if their paths are.
        crops: whether references are searched for in the images that are asked about.
        names_are_people: whether a name is one person in all records. Otherwise ``meta.people`` of a record tells
            which persons its names are, and without it only the reference photos tell.
        num_tokens: ``num_tokens`` of a processor, to find records that it cannot encode.
        num_workers: processes that open and compare images; by default one for each core.
        max_problems: number of problems of one check that the report lists. All are counted.
        progress: see :data:`Progress`.

    Raises:
        DataError: a file does not exist or cannot be divided into records.
        ImportError: a table without the package ``datasets``.
    """
    check_positive(max_problems=max_problems, num_workers=num_workers)
    start = time.perf_counter()
    validation = _Validation(ValidationReport(max_problems=max_problems), images, crops, names_are_people, num_tokens)
    try:
        with parallel_map(num_workers or num_cores()) as mapped:
            for held_out, sources in ((False, train), (True, test)):
                for source in sources:
                    validation.check_source(source, held_out, mapped, progress)
    finally:
        validation.copies.close()
    validation.report.num_images = len(validation.sizes)
    validation.report.seconds = time.perf_counter() - start
    return validation.report


@dataclass(frozen=True, slots=True)
class _Checked:
    """A record of the current chunk that could be read."""

    read: ReadRecord
    sample: Sample
    numbers: dict[str, int]
    """Number of the image of each path."""


class _Validation:
    """What is known of all records until now: images by number, ids, records, persons and shots of training."""

    def __init__(self, report: ValidationReport, images: bool, crops: bool, names_are_people: bool, num_tokens) -> None:
        self.report = report
        self.opens_images = images
        self.crops = crops
        self.names_are_people = names_are_people
        self.num_tokens = num_tokens
        self.copies = GreyCopies()
        self.number_of: dict[ImageKey, int] = {}
        self.sizes: list[tuple[int, int] | None] = []
        self.digests: list[bytes] = []
        self.faults: dict[int, ImageFault] = {}
        self.blank: set[int] = set()
        self.similar = SimilarImages(self.copies)
        # Of the training records: where a digest, person, shot or question first occurs.
        self.trained_images: dict[bytes, str] = {}
        self.trained_references: set[bytes] = set()
        self.people: dict[str, str] = {}
        self.shots: dict[str, str] = {}
        self.image_keys: dict[str, str] = {}
        self.questions: dict[bytes, str] = {}

    def check_source(self, source: RecordSource, held_out: bool, mapped: Map, progress: Progress | None) -> None:
        """Check one file."""
        file = str(source.path)
        self.report.files.setdefault(file, 0)
        ids: dict[str, str] = {}
        contents: dict[bytes, str] = {}
        num_read = 0
        records = iter(source)
        while chunk := list(islice(records, CHUNK)):
            self.report.files[file] += len(chunk)
            checked = list(self._read(chunk, file, ids))
            num_read += len(checked)
            if self.opens_images:
                self._open_images(checked, held_out, mapped)
            for record in checked:
                for finding in self._findings(record, contents):
                    self._report(finding, record.read, file)
            if self.opens_images:
                for record, finding in self._compare_pixels(checked, mapped):
                    self._report(finding, record.read, file)
            for record in checked:
                if not held_out:
                    self._remember(record)
                    continue
                for finding in self._shared_with_training(record):
                    self._report(finding, record.read, file)
            if progress is not None:
                progress(len(chunk))
        if not num_read:
            self.report.add(
                Problem("no_records", CHECKS["no_records"][0], file, None, file, "", "no record can be read.")
            )

    def _report(self, finding: Finding, read: ReadRecord, file: str) -> None:
        level = finding.level or CHECKS[finding.check][0]
        name = read.sample.id if isinstance(read.sample, Sample) else ""
        self.report.add(Problem(finding.check, level, file, read.line, read.where, name, finding.message))

    def _read(self, chunk: list[ReadRecord], file: str, ids: dict[str, str]) -> Iterator[_Checked]:
        """The records of a chunk that can be read; the others are reported."""
        for read in chunk:
            sample = read.sample
            if isinstance(sample, DataError):
                check = sample.kind if sample.kind in CHECKS else "record"
                message = str(sample).removeprefix(f"{read.where}: ")
                self._report(Finding(check, message), read, file)
                continue
            if sample.id in ids:
                level = None if sample.is_evaluation else WARNING
                self._report(
                    Finding("id_repeated", f"id={quote(sample.id)} is that of {ids[sample.id]}.", level), read, file
                )
            ids.setdefault(sample.id, read.where)
            numbers = {}
            for path in sample.images:
                key = image_key(sample, path)
                number = self.number_of.setdefault(key, len(self.number_of))
                if number == len(self.digests):
                    self.sizes.append(None)
                    self.digests.append(_hash("path", *key))
                numbers[path] = number
            yield _Checked(read, sample, numbers)

    def _open_images(self, checked: list[_Checked], held_out: bool, mapped: Map) -> None:
        """Open the images of a chunk that were not opened yet."""
        jobs: dict[int, tuple[Path | RecordImages, str]] = {}
        for record in checked:
            for path, number in record.numbers.items():
                if number >= self.copies.count and number not in jobs:
                    jobs[number] = (root_of_image(record.sample, path), path)
        assert list(jobs) == list(range(self.copies.count, len(self.digests)))
        for number, facts in zip(jobs, facts_of_all(list(jobs.values()), mapped), strict=True):
            if isinstance(facts, ImageFacts):
                self.sizes[number] = facts.size
                self.digests[number] = facts.digest
                if facts.is_blank:
                    self.blank.add(number)
                if not held_out:
                    self.similar.add(number, facts)
                else:
                    self.similar.look_up(number, facts)
            else:
                self.faults[number] = facts
            self.copies.append(facts.grey if isinstance(facts, ImageFacts) else np.zeros((1, 1), np.uint8))

    def _findings(self, record: _Checked, contents: dict[bytes, str]) -> Iterator[Finding]:
        """Problems of one record alone, apart from crops."""
        sample, numbers = record.sample, record.numbers
        yield from check_texts(sample)
        for path, number in numbers.items():
            if number in self.faults:
                fault = self.faults[number]
                yield Finding(fault.check, fault.message)
            if number in self.blank:
                yield Finding("image_blank", f"{quote(path)} has one colour.")
        yield from self._equal_images(record)
        sizes = {path: size for path, number in numbers.items() if (size := self.sizes[number]) is not None}
        yield from check_boxes(sample, sizes)
        if self.num_tokens is not None and not any(number in self.faults for number in numbers.values()):
            try:
                self.num_tokens(sample)
            except DataError as error:
                yield Finding("encoding", str(error))
        content = _hash(*self._content(record))
        if content in contents:
            yield Finding("record_repeated", f"the record is that of {contents[content]}, apart from its id.")
        contents.setdefault(content, record.read.where)
        if sample.identities:
            known = all(identity.name in people_of(sample) for identity in sample.identities) or self.names_are_people
            self.report.people_known = (self.report.people_known[0] + known, self.report.people_known[1] + 1)

    def _equal_images(self, record: _Checked) -> Iterator[Finding]:
        """Images with equal pixels and different paths. Equal paths are found without opening them."""
        sample = record.sample
        digest_of = {path: self.digests[number] for path, number in record.numbers.items()}
        scenes = {digest_of[path]: path for path in sample.message_images}
        owner: dict[bytes, tuple[str, str]] = {}
        for identity in sample.identities:
            for path in dict.fromkeys(identity.images):
                digest = digest_of[path]
                if digest in owner and owner[digest][1] != path:
                    name, other = owner[digest]
                    if name == identity.name:
                        yield Finding("reference_repeated", f"{quote(other)} and {quote(path)} are the same photo.")
                    else:
                        yield Finding(
                            "reference_shared",
                            f"{quote(other)} of {quote(name)} is also {quote(path)} of {quote(identity.name)}.",
                        )
                owner.setdefault(digest, (identity.name, path))
                if digest in scenes and path not in sample.message_images:
                    yield Finding(
                        "reference_is_scene",
                        f"reference {quote(path)} of {quote(identity.name)} has the pixels of {quote(scenes[digest])}.",
                    )

    def _content(self, record: _Checked) -> Iterator[Any]:
        """Everything in a record but its id, with the pixels in place of the paths."""
        digest_of = {path: self.digests[number].hex() for path, number in record.numbers.items()}
        sample = record.sample
        yield from ((identity.name, [digest_of[path] for path in identity.images]) for identity in sample.identities)
        for message in sample.messages:
            parts = [(part.text, part.name, digest_of.get(part.image, ""), part.box) for part in message.content]
            yield message.role, parts
        yield sample.task, sample.answer, sample.false_answers, sample.target

    # --- References and the images that are asked about ---

    def _compare_pixels(self, checked: list[_Checked], mapped: Map) -> Iterator[tuple[_Checked, Finding]]:
        """References that are copies of an image that is asked about, or cut out of it."""
        pairs: dict[tuple, list[tuple[_Checked, str, str, str]]] = {}
        for record in checked:
            sample = record.sample
            for identity in sample.identities:
                boxes = {box.image: box for box in sample.boxes if box.name == identity.name}
                is_elsewhere = bool(boxes) or identity.name in meta_of(sample, "distractors")
                for reference in dict.fromkeys(identity.images):
                    for scene in dict.fromkeys(sample.message_images):
                        first, second = record.numbers[reference], record.numbers[scene]
                        if self.digests[first] == self.digests[second] or {first, second} & self.faults.keys():
                            continue
                        box = None
                        if scene in boxes:
                            height, width = self.sizes[second]
                            box = tuple(boxes[scene].box)
                            if boxes[scene].relative:
                                box = tuple(np.multiply(box, (width, height, width, height)).tolist())
                        search = self.crops and (box is not None or not is_elsewhere)
                        key = (first, second, box, search)
                        pairs.setdefault(key, []).append((record, identity.name, reference, scene))
        candidates = []
        jobs = (self._pair(key) for key in pairs)
        for key, found in zip(pairs, mapped(_compare_small_copies, jobs), strict=True):
            if found is True:
                for record, name, reference, scene in pairs[key]:
                    yield (
                        record,
                        Finding(
                            "reference_like_scene",
                            f"reference {quote(reference)} of {quote(name)} is a copy of {quote(scene)}.",
                        ),
                    )
            elif found is not None:
                candidates.append((key, found))
        jobs = []
        for key, place in candidates:
            record, _, reference, scene = pairs[key][0]
            roots = (root_of_image(record.sample, path) for path in (reference, scene))
            jobs.append((*zip(roots, (reference, scene), strict=True), place))
        for (key, _), is_cut in zip(candidates, mapped(_compare_images, jobs), strict=True):
            for record, name, reference, scene in pairs[key] if is_cut else ():
                level = WARNING if _says_cut(record.sample, reference, scene) else None
                text = f"reference {quote(reference)} of {quote(name)} is cut out of {quote(scene)}"
                text += ", as meta says." if level else "."
                yield record, Finding("reference_from_scene", text, level)

    def _pair(self, key: tuple) -> tuple:
        first, second, box, search = key
        scale = self.copies[second].shape[0] / self.sizes[second][0]
        return self.copies[first], self.copies[second], box, scale, search

    # --- Training and held-out records ---

    def _remember(self, record: _Checked) -> None:
        """Remember what held-out records must not share with a training record."""
        where = record.read.where
        for path, number in record.numbers.items():
            self.trained_images.setdefault(self.digests[number], f"{where} ({path})")
        self.trained_references |= {self.digests[record.numbers[path]] for path in record.sample.reference_images}
        for person in self._people(record.sample):
            self.people.setdefault(person, where)
        for shot in shots_of(record.sample).values():
            self.shots.setdefault(shot, where)
        for key in meta_of(record.sample, "images"):
            self.image_keys.setdefault(str(key), where)
        for question in self._questions(record):
            self.questions.setdefault(question, where)

    def _shared_with_training(self, record: _Checked) -> Iterator[Finding]:
        """What a held-out record shares with training records."""
        sample = record.sample
        for person, name in self._people(sample).items():
            if person in self.people:
                yield Finding(
                    "person_in_both", f"{quote(name)} is the person {quote(person)} of {self.people[person]}."
                )
        references = set(sample.reference_images)
        for path, number in record.numbers.items():
            digest = self.digests[number]
            if digest in self.trained_images:
                yield Finding("image_in_both", f"{quote(path)} is an image of {self.trained_images[digest]}.")
                if path in references and digest in self.trained_references:
                    [name, *_] = [identity.name for identity in sample.identities if path in identity.images]
                    yield Finding(
                        "person_in_both",
                        f"{quote(name)} has a reference photo of {self.trained_images[digest]}.",
                    )
            elif number in self.similar.found:
                other = self.trained_images[self.digests[self.similar.found[number]]]
                yield Finding("similar_image_in_both", f"{quote(path)} is a copy of an image of {other}.")
        for key in dict.fromkeys(map(str, meta_of(sample, "images"))):
            if key in self.image_keys:
                yield Finding("image_in_both", f"meta.images holds {quote(key)}, as does {self.image_keys[key]}.")
        for path, shot in shots_of(sample).items():
            if shot in self.shots:
                yield Finding(
                    "shot_in_both", f"{quote(path)} is of the shot {quote(shot)}, as are images of {self.shots[shot]}."
                )
        for question in self._questions(record):
            if question in self.questions:
                yield Finding("record_in_both", f"{self.questions[question]} asks the same about the same images.")

    def _people(self, sample: Sample) -> dict[str, str]:
        """Names of the identities by person."""
        people = people_of(sample)
        if self.names_are_people:
            return {identity.name: identity.name for identity in sample.identities}
        return {people[identity.name]: identity.name for identity in sample.identities if identity.name in people}

    def _questions(self, record: _Checked) -> list[bytes]:
        """A hash of the scenes and the text of each user turn; none for records without images."""
        scenes = [self.digests[record.numbers[path]].hex() for path in record.sample.message_images]
        texts = (
            " ".join("".join(part.text for part in message.content).split())
            for message in record.sample.messages
            if message.role == "user"
        )
        return [_hash(*scenes, text) for text in texts] if scenes else []


def _says_cut(sample: Sample, reference: str, scene: str) -> bool:
    """Whether ``meta`` says that a reference was cut out of a scene: a builder changes the pixels of such a crop."""
    first, second = origins_of(sample, "references").get(reference), origins_of(sample, "scenes").get(scene)
    return bool(first and second and first.get("box") and first.get("of") and first["of"] == second.get("of"))


def _compare_small_copies(job: tuple) -> bool | Place | None:
    """Whether the small copies are the same image; otherwise the place where the first may be cut from the second."""
    reference, scene, box, scale, search = job
    if is_same_image(reference, scene):
        return True
    place = find_crop(reference, scene, box, scale) if search else None
    return place if place is not None and place.correlation >= CANDIDATE else None


def _compare_images(job: tuple) -> bool:
    reference, scene, place = job
    crop, whole = (ImageStore(root).open(path) for root, path in (reference, scene))
    return is_cut_from(crop, whole, place)


def _hash(*parts: Any) -> bytes:
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).digest()
