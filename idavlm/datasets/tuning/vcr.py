"""VCR (Visual Commonsense Reasoning): questions about tagged people in film frames, with answer and rationale."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
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
    read_json,
    scaled,
    take,
)
from idavlm.datasets.tuning.build import TuningSource
from idavlm.datasets.tuning.image_files import PartImages
from idavlm.datasets.tuning.names import draw_names, join_words, pronoun_gender
from idavlm.datasets.tuning.published import NAMES, conversation, image_tag, is_mirrored
from idavlm.datasets.tuning.records import Introduced, Turn, identity_record, location_turn
from idavlm.datasets.tuning.splits import Splits, film_key

MAX_PEOPLE = 5
"""Maximum number of tags that the texts of a record use."""

MIN_AREA = 0.08
"""Minimum box of a person whom a record introduces, as a share of the image."""

REASON_QUESTIONS = ("Why?", "Explain why.", "How do you know?", "Give a reason for the answer.")
PUBLISHED_REASON_QUESTIONS = ("explain why", "give a reason for the answer")

_TAG = re.compile(r"\b(\d+)\b")

Tokens = list[str | list[int]]


@dataclass(frozen=True)
class Question:
    """A line of VCR.

    Attributes:
        name: ``annot_id``.
        where: file and line.
        split: ``"val"`` if ``val.jsonl`` has questions about the film, else ``"train"``.
        film: key of the film.
        image: path of the frame.
        objects: class of each object.
        boxes: box of each object in pixels of the frame, unchecked.
        size: (width, height) that the boxes refer to.
        question: tokens; a token that is a list holds indices of objects, from 0.
        choices: tokens of the four answers.
        rationales: tokens of the four rationales.
        answer: index of the right answer.
        rationale: index of the right rationale.
    """

    name: str
    where: str
    split: str
    film: str
    image: str
    objects: list[str]
    boxes: list[Any]
    size: tuple[float, float]
    question: Tokens
    choices: list[Tokens]
    rationales: list[Tokens]
    answer: int
    rationale: int

    def people(self, texts: Sequence[Tokens]) -> list[int]:
        """Indices of the people that texts mention, in order."""
        tags = (index for text in texts for token in text if isinstance(token, list) for index in token)
        return [index for index in dict.fromkeys(tags) if self.objects[index] == "person"]

    def box(self, index: int) -> list[float]:
        """Box of an object, cut at the edges of the image.

        Raises:
            DataError: it has none.
        """
        if index >= len(self.boxes):
            raise DataError(f"objects[{index}] has no box in the metadata of {quote(self.image)}.", where=self.where)
        box = self.boxes[index]
        return pixel_box(box[:4] if isinstance(box, list) else box, *self.size, self.where, name=f"boxes[{index}]")


class VCR(TuningSource):
    """Builds records from VCR: ``train.jsonl`` and ``val.jsonl`` with ``vcr1images/``.

    People whom the question, the right answer or the right rationale mention get names and are introduced by a crop of
    the frame that is changed (:func:`idavlm.datasets.tuning.changed_crop`), because VCR does not say who is who in
    other frames. Tags are read from the token lists, so that "2 hours" stays as it is. Other objects are written as
    their class. A record is left out if it mentions no one, more than five people, a box smaller than 8 % of the frame,
    or two objects of one class. Films are split as a whole; ``val.jsonl`` is held out.

    Args:
        annotations: a file of VCR, or the folder of ``train.jsonl`` and ``val.jsonl``.
        images: the folder ``vcr1images``.
        seed: seed of all choices.
        distractors: share of the records that introduce someone of another film too, who is not in the image.
        as_published: build records as IDA-VLM's script does, with its mistakes, from the texts ``*_orig``. Every line
        is
            used for training.
        splits: shares of validation and test.
    """

    name = "vcr"
    units_per_part = 128

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        seed: int = 0,
        distractors: float = 0.25,
        as_published: bool = False,
        splits: Splits | None = None,
    ) -> None:
        self.files = [JsonRecords(path) for path in _files(Path(annotations))]
        self.image_root = Path(images)
        self.seed = seed
        self.distractors = distractors
        self.as_published = as_published
        self.splits = splits or Splits()
        self.reader = "qwen_vl" if as_published else "idavlm"
        self.options = {
            "annotations": {file.path.name: file.fingerprint for file in self.files},
            "seed": seed,
            "distractors": distractors,
            "as_published": as_published,
            "val": self.splits.val,
            "test": self.splits.test,
        }
        self._ends = list(accumulate(map(len, self.files)))
        # A film that val.jsonl has is held out as a whole.
        self._held_out_films = {
            _film(entry)
            for file in self.files
            if file.path.stem == "val"
            for entry in file.decode_all()
            if isinstance(entry, dict)
        }
        self._metadata = lru_cache(64)(read_json)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_metadata"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._metadata = lru_cache(64)(read_json)

    def where(self, unit: int) -> str:
        """File and line of a question."""
        file, index = self._locate(unit)
        return file.where(index)

    def compose(self, unit: int, images: PartImages, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the record of a question, with its split, unless it is left out."""
        with report.catch(self.where(unit)):
            rng = Random(f"{self.seed} vcr {unit}")
            compose = self._compose_as_published if self.as_published else self._compose
            yield compose(unit, images, rng, report)

    def _compose(self, unit: int, images: PartImages, rng: Random, report: Report) -> tuple[str, dict[str, Any]]:
        question = self.read(unit)
        split = self.splits.of(question.film, own=question.split)
        right = [question.choices[question.answer], question.rationales[question.rationale]]
        texts = [question.question, *(question.choices if split == "test" else right)]
        people = question.people(texts)
        if not people:
            raise Unsuitable("no person is mentioned")
        if len(people) > MAX_PEOPLE:
            raise Unsuitable(f"more than {MAX_PEOPLE} people are mentioned")
        labels = _object_labels(question, texts)
        boxes = {index: question.box(index) for index in people}
        if any(area(box) < MIN_AREA * question.size[0] * question.size[1] for box in boxes.values()):
            raise Unsuitable(f"a person is smaller than {MIN_AREA:.0%} of the image")
        size = images.size(question.image)
        images.open(question.image)  # a damaged image is found before a crop is written
        other = None
        if rng.random() < self.distractors:
            other = draw_distractor(lambda: self._draw_person(question, split, images, rng), report)

        plain = [" ".join(token for token in text if isinstance(token, str)) for text in texts]
        genders = [pronoun_gender(plain, len(people))] * len(people)
        names = draw_names([*genders, *(["neutral"] if other else [])], rng, plain)
        labels |= dict(zip(people, names, strict=False))

        scene = images.scene(question.image)
        introduced = [
            Introduced(
                labels[index],
                f"vcr:{question.image}#{index}",
                [images.crop(question.image, scaled(box, question.size, size), rng)],
                {scene.image: scaled(box, question.size, size)},
            )
            for index, box in boxes.items()
        ]
        keys = [question.film]
        if other is not None:
            there, index = other
            box = scaled(there.box(index), there.size, images.size(there.image))
            reference = images.crop(there.image, box, rng)
            introduced.append(Introduced(names[-1], f"vcr:{there.image}#{index}", [reference]))
            keys.append(there.film)
            report.counts["distractors"] += 1
        rng.shuffle(introduced)

        choices = [_render(choice, labels) for choice in question.choices] if split == "test" else []
        answer = _render(right[0], labels)
        false_answers = [text for text in dict.fromkeys(choices) if text != answer]
        turns = [
            Turn(_render(question.question, labels), answer, false_answers=false_answers),
            Turn(rng.choice(REASON_QUESTIONS), _render(right[1], labels)),
        ]
        if split == "test":
            turns = turns[:1]
        elif other is not None:
            turns.append(location_turn(rng.choice(introduced)))
        record = identity_record(
            f"vcr-{question.name}",
            data=self.name,
            annotation=question.where,
            image_keys=keys,
            introduced=introduced,
            scenes=[scene],
            turns=turns,
            evaluation=split == "test",
        )
        return split, record

    def _draw_person(
        self, question: Question, split: str, images: PartImages, rng: Random
    ) -> tuple[Question, int] | None:
        """A person of a random question, if it is of another film of the same split; large enough for a reference."""
        other = self.read(rng.randrange(len(self)))
        if other.film == question.film or self.splits.of(other.film, own=other.split) != split:
            return None
        large = [
            index
            for index, kind in enumerate(other.objects)
            if kind == "person" and area(other.box(index)) >= MIN_AREA * other.size[0] * other.size[1]
        ]
        if not large:
            return None
        images.open(other.image)
        return other, rng.choice(large)

    def read(self, unit: int) -> Question:
        """Read a question and the metadata of its frame.

        Raises:
            DataError: a field is missing or of the wrong type, or a tag names no object.
        """
        file, index = self._locate(unit)
        where = file.where(index)
        entry = file[index]
        image = take(entry, "img_fn", str, where)
        objects = take(entry, "objects", list, where)
        for number, kind in enumerate(objects):
            check_kind(kind, f"objects[{number}]", str, where)
        choices, rationales = (_choices(entry, name, len(objects), where) for name in ("answer", "rationale"))
        metadata_path = take(entry, "metadata_fn", str, where)
        metadata = self._metadata(self.image_root / metadata_path)
        size = _size(metadata, where)
        return Question(
            name=str(entry.get("annot_id", unit)),
            where=where,
            split="val" if _film(entry) in self._held_out_films else "train",
            film=_film(entry),
            image=image,
            objects=objects,
            boxes=take(metadata, "boxes", list, where, context=metadata_path),
            size=size,
            question=_tokens(entry.get("question"), "question", len(objects), where),
            choices=choices,
            rationales=rationales,
            answer=_label(entry, "answer_label", choices, where),
            rationale=_label(entry, "rationale_label", rationales, where),
        )

    def _locate(self, unit: int) -> tuple[JsonRecords, int]:
        number = bisect_right(self._ends, unit)
        return self.files[number], unit - (self._ends[number - 1] if number else 0)

    def _compose_as_published(
        self, unit: int, images: PartImages, rng: Random, report: Report
    ) -> tuple[str, dict[str, Any]]:
        file, index = self._locate(unit)
        entry, where = file[index], file.where(index)
        texts = [take(entry, f"{name}_orig", str, where) for name in ("question", "answer", "rationale")]
        objects, image = take(entry, "objects", list, where), take(entry, "img_fn", str, where)
        if len(objects) > len(NAMES):
            raise Unsuitable("more objects than names")
        drawn = rng.sample(NAMES, len(objects))
        labels: dict[str, str] = {}
        for tag in (match[0] for text in texts for match in _TAG.finditer(text)):
            if int(tag) > len(objects):
                raise Unsuitable("a number is larger than the number of objects")
            if tag not in labels:
                is_person = objects[int(tag) - 1] == "person"
                number = 1 + sum(label.startswith("image ") for label in labels.values())
                labels[tag] = drawn[int(tag) - 1] if is_person else f"image {number}"
        if len(labels) > MAX_PEOPLE:
            raise Unsuitable(f"more than {MAX_PEOPLE} tags are used")
        turns = [_replace_numbers(text, labels) for text in texts]

        metadata = self._metadata(self.image_root / (image[:-3] + "json"))
        size = _size(metadata, where)
        crops, people = [], {}
        for number, box in enumerate(take(metadata, "boxes", list, where)):
            label = labels.get(str(number + 1))
            if label is None:
                continue
            corners = pixel_box(box[:4] if isinstance(box, list) else box, *size, where, name=f"boxes[{number}]")
            if area(corners) < size[0] * size[1] * MIN_AREA:
                raise Unsuitable(f"an object is smaller than {MIN_AREA:.0%} of the image")
            crops.append((label, number, corners))
            people[label] = f"vcr:{image}#{number}"
        scene = images.scene(image)
        tags = [
            (
                label,
                image_tag(
                    images.published_crop(
                        image,
                        scaled(box, size, images.size(image)),
                        f"{image[:-4]}_{number}.jpg",
                        mirrored=is_mirrored(self.seed, image, box),
                    )
                ),
            )
            for label, number, box in crops
        ]
        if rng.random() > 0.5:
            prompt = f"In the image 0: {image_tag(scene.image)}\nthere are some object or person images. "
            prompt += "".join(f"{label}: {tag}\n" for label, tag in tags)
        else:
            prompt = "".join(f"{label} is {tag}\n" for label, tag in tags) + f"In the image {image_tag(scene.image)}\n"
        record = conversation(
            f"vcr-{entry.get('annot_id', unit)}",
            [prompt + turns[0], turns[1], rng.choice(PUBLISHED_REASON_QUESTIONS), turns[2]],
            data=self.name,
            annotation=where,
            image_keys=[_film(entry)],
            people=people,
        )
        return "train", record


def _film(entry: dict[str, Any]) -> str:
    """Key of the film of a line: its field ``movie``, or the first folder of its image."""
    movie = entry.get("movie") or str(entry.get("img_fn")).partition("/")[0]
    return film_key(str(movie))


def _files(annotations: Path) -> list[Path]:
    if not annotations.is_dir():
        return [annotations]
    found = [path for name in ("train", "val") if (path := annotations / f"{name}.jsonl").is_file()]
    if not found:
        raise ValueError(f"annotations={str(annotations)!r} holds neither train.jsonl nor val.jsonl of VCR.")
    return found


def _size(metadata: Any, where: str) -> tuple[float, float]:
    """(width, height) that the boxes of a frame refer to."""
    width, height = (take(metadata, name, float, where, context="the metadata") for name in ("width", "height"))
    if not (0 < width < 1e6 and 0 < height < 1e6):
        raise DataError(f"width={width} and height={height} of the metadata are no size of an image.", where=where)
    return width, height


def _tokens(value: Any, name: str, num_objects: int, where: str) -> Tokens:
    """Check a token list: words, and lists of indices of objects."""
    for token in check_kind(value, name, list, where):
        if isinstance(token, str):
            continue
        indices = token if isinstance(token, list) else [None]
        if not indices or not all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < num_objects for i in indices
        ):
            raise DataError(
                f"{name} holds {quote(token)}; expected a word or indices of the {num_objects} objects, from 0.",
                where=where,
            )
    return value


def _choices(entry: Any, kind: str, num_objects: int, where: str) -> list[Tokens]:
    choices = take(entry, f"{kind}_choices", list, where)
    return [_tokens(choice, f"{kind}_choices[{number}]", num_objects, where) for number, choice in enumerate(choices)]


def _label(entry: Any, name: str, choices: list[Tokens], where: str) -> int:
    label = take(entry, name, int, where)
    if not 0 <= label < len(choices):
        raise DataError(f"{name}={label} is none of the {len(choices)} choices.", where=where)
    return label


def _object_labels(question: Question, texts: Sequence[Tokens]) -> dict[int, str]:
    """Texts of mentioned objects that are no people: "the cup"."""
    tags = dict.fromkeys(i for text in texts for token in text if isinstance(token, list) for i in token)
    labels = {i: f"the {question.objects[i]}" for i in tags if question.objects[i] != "person"}
    if len(set(labels.values())) < len(labels):
        raise Unsuitable("two objects of one class are mentioned")
    return labels


def _render(tokens: Tokens, labels: dict[int, str]) -> str:
    return join_words(
        [token if isinstance(token, str) else enumeration([labels[i] for i in token]) for token in tokens]
    )


def _replace_numbers(text: str, labels: dict[str, str]) -> str:
    """Replace numbers at the beginning of words, of at most two digits; a word such as "2nd" may be lost."""
    words = []
    for word in text.split():
        if word[0].isnumeric():
            digits = word[:2] if len(word) > 1 and word[:2].isnumeric() else word[0]
            if digits not in labels:
                raise Unsuitable("the published script fails at a number that is no tag")
            word = labels[digits] + word[len(digits) :]
        words.append(word)
    return " ".join(words)
