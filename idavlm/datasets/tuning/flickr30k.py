"""Flickr30k Entities: captions whose phrases are linked to boxes; people get names and reference photos."""

import hashlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.data.json_records import JsonRecords
from idavlm.datasets.record_composer import enumeration
from idavlm.datasets.tuning.annotations import (
    Report,
    Unsuitable,
    area,
    check_kind,
    draw_distractor,
    pixel_box,
    scaled,
    take,
)
from idavlm.datasets.tuning.build import TuningSource
from idavlm.datasets.tuning.image_files import PartImages
from idavlm.datasets.tuning.names import draw_names, join_words, phrase_gender
from idavlm.datasets.tuning.published import NAMES, caption_request, conversation, image_tag, is_mirrored
from idavlm.datasets.tuning.records import Introduced, Turn, identity_record, location_turn
from idavlm.datasets.tuning.splits import Splits

MIN_WORDS = 10
MAX_PEOPLE = 5
MIN_AREA = 3000
"""Minimum box of a person whom a record introduces, in square pixels."""

PUBLISHED_KEYWORDS = (
    *("people", " man", " men", "woman", "women", "boy", "girl", "person", "child", "lady", "guy", "someone", "kid"),
    *("female", " male", "player", "audience", "adult", "biker", "mom", "mother"),
)
"""Substrings by which IDA-VLM's script takes a phrase for a person."""

REQUESTS = (
    "Describe the image.",
    "What is happening in the image?",
    "Describe what the people in the image do.",
    "Write a caption for the image.",
)

_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[\w-]+)+) ([^\]]+)\]")
_MARKED = re.compile(r"<ph_st>(.*?)<ph_ed>")
_PRONOUN = re.compile(r"(?:he|she|him|her|his|hers|himself|herself|they|them|themselves|who|whom|one|each)", re.I)
_GROUP = re.compile(
    r"\b(?:people|men|women|boys|girls|children|kids|ladies|guys|adults|players|persons|group|crowd|couple|pair|team|band"
    r"|family|audience|line|row|others|teens|workers|students|friends)\b",
    re.IGNORECASE,
)
_NUMBERS = {"two": 2, "both": 2, "couple": 2, "pair": 2, "three": 3, "four": 4, "five": 5}
_SINGULAR = re.compile(r"(?:an?|one|another|the|this|his|her|their)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Phrase:
    """A phrase of a caption: text, chain id (0: not visual) and types."""

    text: str
    chain: int
    types: tuple[str, ...]


@dataclass(frozen=True)
class Photo:
    """An image of Flickr30k Entities: its captions, split into texts and phrases, and the boxes of each chain.

    Attributes:
        name: id of the image.
        captions: file and line of each caption, and its pieces.
        boxes: boxes of the objects in pixels of an image of ``size``.
        chains: numbers of the objects of each chain. An object may belong to several: "two men", "one of the men".
        size: (width, height).
        problems: faults of single captions and objects.
    """

    name: str
    captions: list[tuple[str, list[str | Phrase]]]
    boxes: list[list[float]]
    chains: dict[int, list[int]]
    size: tuple[float, float]
    problems: list[str] = field(default_factory=list)


class Flickr30kEntities(TuningSource):
    """Builds records from Flickr30k Entities: ``Sentences/``, ``Annotations/``, the lists of splits and the images.

    A phrase of the type ``people`` becomes a name if its chain has one box and the phrase is about one person, or if it
    says how many people it is about and has as many boxes ("two men"). Crowds and pronouns stay as they are. Each
    occurrence of a phrase is replaced where it stands. A caption is left out if it has fewer than ten words, if it is
    in ``UNRELATED_CAPTIONS``, or if it names no one or more than five people. References are changed crops, because
    every image shows other people.

    Args:
        annotations: folder of Flickr30k Entities. ``val.txt`` and ``test.txt`` in it are held out.
        images: folder of ``<id>.jpg``.
        seed: seed of all choices.
        distractors: share of the records that introduce a person of another image too.
        splits: shares of validation and test.
    """

    name = "flickr30k"
    reader = "idavlm"
    units_per_part = 32

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        seed: int = 0,
        distractors: float = 0.25,
        splits: Splits | None = None,
    ) -> None:
        self.annotations = Path(annotations)
        if not (self.annotations / "Sentences").is_dir() or not (self.annotations / "Annotations").is_dir():
            raise ValueError(
                f"annotations={str(annotations)!r} has no folders Sentences and Annotations; pass the folder of "
                "Flickr30k Entities. Shikra's CWB_flickr30k_train.jsonl has no types of phrases; it serves "
                "as_published=True only."
            )
        self.image_root = Path(images)
        self.seed = seed
        self.distractors = distractors
        self.splits = splits or Splits()
        own = {
            name: split
            for split in ("train", "val", "test")
            if (path := self.annotations / f"{split}.txt").is_file()
            for name in path.read_text().split()
        }
        if not own:
            own = {path.stem: "train" for path in sorted((self.annotations / "Sentences").glob("*.txt"))}
        self._names = list(own)
        self._own_splits = own
        self._unrelated = _read_unrelated(self.annotations / "UNRELATED_CAPTIONS")
        sizes = [f"{path.name} {path.stat().st_size}" for path in sorted(self.annotations.glob("Sentences/*.txt"))]
        self.options = {
            "annotations": hashlib.sha256("\n".join([*self._names, *sizes]).encode()).hexdigest()[:16],
            "seed": seed,
            "distractors": distractors,
            "as_published": False,
            "val": self.splits.val,
            "test": self.splits.test,
        }

    def __len__(self) -> int:
        return len(self._names)

    def split_of(self, name: str) -> str:
        """Split of an image."""
        return self.splits.of(f"flickr30k:{name}", own=self._own_splits[name])

    def compose(self, unit: int, images: PartImages, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the records of the captions of an image, with their split."""
        name = self._names[unit]
        split = self.split_of(name)
        with report.catch(str(self.annotations / "Sentences" / f"{name}.txt")):
            photo = self.read(name)
            report.problems.extend(photo.problems)
            for number, (where, pieces) in enumerate(photo.captions):
                with report.catch(where):
                    rng = Random(f"{self.seed} flickr30k {name} {number}")
                    record = self._compose(photo, number, pieces, where, split, images, rng, report)
                    yield split, record

    def _compose(
        self,
        photo: Photo,
        number: int,
        pieces: list[str | Phrase],
        where: str,
        split: str,
        images: PartImages,
        rng: Random,
        report: Report,
    ) -> dict[str, Any]:
        words = " ".join(piece if isinstance(piece, str) else piece.text for piece in pieces).split()
        if len(words) < MIN_WORDS:
            raise Unsuitable(f"fewer than {MIN_WORDS} words")
        if (photo.name, number + 1) in self._unrelated:
            raise Unsuitable("the caption is listed as unrelated")
        people: dict[int, str] = {}  # gender by number of the object
        named: dict[int, list[int]] = {}  # people of each piece that becomes a name
        for position, piece in enumerate(pieces):
            if isinstance(piece, Phrase) and (objects := _people_of(piece, photo)):
                named[position] = objects
                for number_of_object in objects:
                    people.setdefault(number_of_object, phrase_gender(piece.text))
        if not people:
            raise Unsuitable("no phrase names a person with a box")
        if len(people) > MAX_PEOPLE:
            raise Unsuitable(f"more than {MAX_PEOPLE} people are named")
        path = f"{photo.name}.jpg"
        size = images.size(path)
        images.open(path)
        other = None
        if rng.random() < self.distractors:
            other = draw_distractor(lambda: self._draw_person(photo.name, split, images, rng), report)
        drawn = draw_names([*people.values(), *([other[2]] if other else [])], rng, words)
        names = dict(zip(people, drawn, strict=False))
        text = join_words(
            [
                enumeration([names[key] for key in named[position]])
                if position in named
                else piece
                if isinstance(piece, str)
                else piece.text
                for position, piece in enumerate(pieces)
            ]
        )
        scene = images.scene(path)
        introduced = []
        for index, name in names.items():
            box = scaled(photo.boxes[index], photo.size, size)
            key = f"flickr30k:{photo.name}#{index}"
            introduced.append(Introduced(name, key, [images.crop(path, box, rng)], {scene.image: box}))
        keys = [f"flickr30k:{photo.name}"]
        if other is not None:
            there, index, _ = other
            there_path = f"{there.name}.jpg"
            box = scaled(there.boxes[index], there.size, images.size(there_path))
            key = f"flickr30k:{there.name}#{index}"
            introduced.append(Introduced(drawn[-1], key, [images.crop(there_path, box, rng)]))
            keys.append(f"flickr30k:{there.name}")
            report.counts["distractors"] += 1
        rng.shuffle(introduced)
        turns = [Turn(rng.choice(REQUESTS), text, task="caption_single")]
        if other is not None and split != "test":
            turns.append(location_turn(rng.choice(introduced)))
        return identity_record(
            f"flickr30k-{photo.name}-{number}",
            data=self.name,
            annotation=where,
            image_keys=keys,
            introduced=introduced,
            scenes=[scene],
            turns=turns,
            evaluation=split == "test",
        )

    def _draw_person(self, name: str, split: str, images: PartImages, rng: Random) -> tuple[Photo, int, str] | None:
        """A person of a random image, if it is another one of the same split: image, number of the object, gender."""
        other = rng.choice(self._names)
        if other == name or self.split_of(other) != split:
            return None
        photo = self.read(other)
        people = {
            index: phrase_gender(piece.text)
            for _, pieces in photo.captions
            for piece in pieces
            if isinstance(piece, Phrase)
            for index in _people_of(piece, photo)
        }
        if not people:
            return None
        images.open(f"{other}.jpg")
        index = rng.choice(list(people))
        return photo, index, people[index]

    def read(self, name: str) -> Photo:
        """Read captions and boxes of an image.

        Raises:
            DataError: a file is missing or damaged. Damaged captions and boxes are in ``problems`` of the result, and
                do not affect the others.
        """
        path = self.annotations / "Sentences" / f"{name}.txt"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read ({error}); restore it.", where=str(path)) from None
        boxes, chains, size, problems = _read_boxes(self.annotations / "Annotations" / f"{name}.xml")
        captions = []
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                captions.append((where, _pieces(line, where)))
            except DataError as error:
                problems.append(str(error))
        return Photo(name, captions, boxes, chains, size, problems)


class PublishedFlickr30k(TuningSource):
    """Builds records from Shikra's ``CWB_flickr30k_train.jsonl`` as IDA-VLM's script does, with its mistakes.

    A phrase is a person if it contains one of :data:`PUBLISHED_KEYWORDS`, and phrases are replaced by their text, so
    that two phrases "a man" get the same name. People are introduced in the order of the caption by crops of the scene.
    Shikra's templates, which the script uses, are replaced by a few requests of the same form.

    Args:
        annotations: the file.
        images: folder of ``<image_id>.jpg``.
        seed: seed of all choices.
    """

    name = "flickr30k"
    reader = "qwen_vl"
    units_per_part = 128

    def __init__(self, annotations: str | Path, images: str | Path, *, seed: int = 0) -> None:
        if Path(annotations).is_dir():
            raise ValueError(
                f"annotations={str(annotations)!r} is a folder; as_published=True reads Shikra's "
                "CWB_flickr30k_train.jsonl, as IDA-VLM does."
            )
        self.file = JsonRecords(annotations)
        self.image_root = Path(images)
        self.seed = seed
        self.options = {"annotations": self.file.fingerprint, "seed": seed, "as_published": True}

    def __len__(self) -> int:
        return len(self.file)

    def compose(self, unit: int, images: PartImages, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the record of a caption unless a rule leaves it out."""
        where = self.file.where(unit)
        with report.catch(where):
            yield "train", self._compose(self.file[unit], where, images, Random(f"{self.seed} flickr30k {unit}"))

    def _compose(self, entry: Any, where: str, images: PartImages, rng: Random) -> dict[str, Any]:
        caption = take(entry, "sentence", str, where)
        if len(caption.split()) < MIN_WORDS:
            raise Unsuitable(f"fewer than {MIN_WORDS} words")
        boxes, sequences = take(entry, "boxes", list, where), take(entry, "boxes_seq", list, where)
        phrases = _MARKED.findall(caption)
        if len(sequences) != len(phrases):
            raise DataError(
                f"boxes_seq has {len(sequences)} entries for {len(phrases)} marked phrases; repair it.", where=where
            )
        for sequence in sequences:
            if not all(
                isinstance(n, int) and 0 <= n < len(boxes) for n in check_kind(sequence, "boxes_seq", list, where)
            ):
                raise DataError(f"boxes_seq holds {quote(sequence)}, but there are {len(boxes)} boxes.", where=where)
        is_person = [any(word in phrase.lower() for word in PUBLISHED_KEYWORDS) for phrase in phrases]
        people = dict.fromkeys(
            n for sequence, person in zip(sequences, is_person, strict=True) if person for n in sequence
        )
        if len(people) > MAX_PEOPLE:
            raise Unsuitable(f"more than {MAX_PEOPLE} people are named")
        names = dict(zip(people, rng.sample(NAMES, len(people)), strict=True))
        replaced = {
            f"<ph_st>{phrase}<ph_ed>": enumeration([names[n] for n in sequence]) if person and sequence else phrase
            for phrase, sequence, person in zip(phrases, sequences, is_person, strict=True)
        }
        image = f"{entry.get('image_id')}.jpg"
        size = images.size(image)
        prompt = "Given some people characters, " if names else ""
        corners = {n: pixel_box(boxes[n], *size, where, name=f"boxes[{n}]") for n in names}
        if any(area(box) < MIN_AREA for box in corners.values()):
            raise Unsuitable(f"a box is smaller than {MIN_AREA} square pixels")
        scene = images.scene(image)
        for n, name in names.items():
            file = f"{entry.get('id')}/{name}.jpg"
            mirrored = is_mirrored(self.seed, f"{where} {file}", boxes[n])
            prompt += f"{name} is {image_tag(images.published_crop(image, corners[n], file, mirrored=mirrored))}\n, "
        prompt = prompt[:-2] + ". " + caption_request(rng, [scene.image])
        for marked, text in replaced.items():
            caption = caption.replace(marked, text)
        key = f"flickr30k:{entry.get('image_id')}"
        return conversation(
            f"flickr30k-{entry.get('id')}",
            [prompt, caption],
            data=self.name,
            annotation=where,
            image_keys=[key],
            people={name: f"{key}#{n}" for n, name in names.items()},
        )


def _pieces(line: str, where: str) -> list[str | Phrase]:
    """Texts and phrases of a caption."""
    pieces: list[str | Phrase] = []
    position = 0
    for match in _PHRASE.finditer(line):
        pieces += [line[position : match.start()], Phrase(match[3], int(match[1]), tuple(match[2][1:].split("/")))]
        position = match.end()
    pieces.append(line[position:])
    rest = " ".join(piece for piece in pieces if isinstance(piece, str))
    if "[/EN" in rest or "]" in rest:
        raise DataError(f"{quote(line)} has a phrase that is not [/EN#CHAIN/TYPE WORDS]; repair it.", where=where)
    return pieces


def _read_boxes(
    path: Path,
) -> tuple[list[list[float]], dict[int, list[int]], tuple[float, float], list[str]]:
    """Boxes of the objects, numbers of the objects of each chain, (width, height), and faults of single objects."""
    try:
        root = ElementTree.fromstring(path.read_bytes())
        size = tuple(float(root.findtext(f"size/{name}")) for name in ("width", "height"))
    except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
        raise DataError(f"cannot be read ({error}); restore it.", where=str(path)) from None
    boxes: list[list[float]] = []
    chains: dict[int, list[int]] = {}
    problems = []
    for number, entry in enumerate(root.findall("object")):
        corners = entry.find("bndbox")
        if corners is None:  # nobndbox, or the whole scene
            continue
        where = f"{path} object {number}"
        try:
            values = [float(corners.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax")]
            box = pixel_box(
                [values[0] - 1, values[1] - 1, *values[2:]], *size, where, name="bndbox"
            )  # it counts from 1
            names = [int(name.text) for name in entry.findall("name")]
        except (TypeError, ValueError) as error:
            message = str(error)
            problems.append(message if message.startswith(where) else f"{where}: is no box ({message}); repair it.")
            continue
        for chain in names:
            chains.setdefault(chain, []).append(len(boxes))
        boxes.append(box)
    return boxes, chains, size, problems


def _read_unrelated(path: Path) -> set[tuple[str, int]]:
    """Captions that do not describe their image: (image, number from 1). The file may be missing."""
    if not path.is_file():
        return set()
    lines = (line.split() for line in path.read_text().splitlines() if not line.startswith("#"))
    return {(words[0], int(words[1])) for words in lines if len(words) == 2 and words[1].isdigit()}


def _people_of(phrase: Phrase, photo: Photo) -> list[int]:
    """Numbers of the objects of the people whose names replace a phrase; [] if the phrase stays."""
    objects = photo.chains.get(phrase.chain, [])
    if "people" not in phrase.types or not objects or _PRONOUN.fullmatch(phrase.text.strip()):
        return []
    if any(area(photo.boxes[index]) < MIN_AREA for index in objects):
        return []
    words = phrase.text.lower().split()
    number = next((_NUMBERS[word] for word in words if word in _NUMBERS), None)
    if number is not None:
        return objects if number == len(objects) else []
    is_one = _SINGULAR.match(phrase.text) and not _GROUP.search(phrase.text) and "and" not in words
    return objects if is_one and len(objects) == 1 else []
