"""MovieNet as IDA-VLM's scripts build it: rules and mistakes, for comparison."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from idavlm.data.errors import DataError
from idavlm.datasets.tuning.annotations import Report, Unsuitable, area, read_json, take
from idavlm.datasets.tuning.build import TuningSource
from idavlm.datasets.tuning.descriptions import Describer, DescriptionRequest
from idavlm.datasets.tuning.image_files import PartImages
from idavlm.datasets.tuning.movienet import (
    BODIES,
    CHAIN_LENGTH,
    DESCRIPTION_GAP,
    LOCATED_AREA,
    MIN_CHAIN_LENGTH,
    REFERENCE_AREA,
    check_tasks,
    fingerprint,
    list_films,
    read_meta,
)
from idavlm.datasets.tuning.published import box_text, caption_request, conversation, image_tag
from idavlm.datasets.tuning.splits import film_key

SAME_REFERENCE_GAP = 3
"""A reference that located a person is not used again in this number of following shots."""


@dataclass(frozen=True)
class _Entry:
    person: str
    place: tuple[int, int]
    box: list[float]
    resolution: list[float]


class PublishedMovieNet(TuningSource):
    """Builds records from MovieNet as IDA-VLM's scripts do.

    A person is located in frames with company; the reference is the latest frame that shows only this person.
    References of captions and questions are drawn from the whole film. People have the names of their characters, and
    only people who are there are introduced. Every film is used for training. An error loses a whole film.

    Args:
        annotations: folder with ``annotation/`` and ``meta/``.
        images: folder ``240P``.
        seed: seed of all choices.
        describe: writes captions, questions and answers; None for location records only.
        describer_name: what ``describe`` is, for the options in ``dataset.json``.
        tasks: tasks of the records; None for all that are possible.
        films: ids of the films (the published ``train_split.txt``); None for all in ``annotation/``.
    """

    name = "movienet"
    reader = "qwen_vl"
    units_per_part = 1

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        seed: int = 0,
        describe: Describer | None = None,
        describer_name: str | None = None,
        tasks: Sequence[str] | None = None,
        films: Sequence[str] | None = None,
    ) -> None:
        self.annotations = Path(annotations)
        self.image_root = Path(images)
        self.seed = seed
        self.describe = describe
        self.tasks = check_tasks(tasks, describe)
        self.films = list_films(self.annotations, films)
        self.options = {
            "annotations": fingerprint(self.annotations, self.films),
            "seed": seed,
            "describe": describer_name,
            "tasks": self.tasks,
            "as_published": True,
        }

    def __len__(self) -> int:
        return len(self.films)

    def compose(self, unit: int, images: PartImages, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the records of a film, all for training."""
        film = self.films[unit]
        where = str(self.annotations / "annotation" / f"{film}.json")
        with report.catch(where):
            composer = _PublishedFilm(self, film, where, images, report)
            for record in composer.records():
                yield "train", record


class _PublishedFilm:
    """Composes the records of one film."""

    def __init__(self, source: PublishedMovieNet, film: str, where: str, images: PartImages, report: Report) -> None:
        self.source = source
        self.film = film
        self.where = where
        self.images = images
        self.report = report
        title, self.characters = read_meta(source.annotations, film)
        self.key = film_key(title) if title else f"film:{film}"
        self.entries = [
            _entry(entry, f"{where} cast[{number}]")
            for number, entry in enumerate(take(read_json(Path(where)), "cast", list, where))
        ]
        self.frames: dict[tuple[int, int], list[_Entry]] = {}  # in the order of the file
        for entry in self.entries:
            self.frames.setdefault(entry.place, []).append(entry)
        self.solos = self._solo_frames(count_ids=False)

    def records(self) -> Iterator[dict[str, Any]]:
        """All records of the film."""
        tasks = self.source.tasks
        if "location" in tasks:
            yield from self._location_records()
        for task in ("caption_single", "qa_single"):
            if task in tasks:
                yield from self._described(task, [[place] for place in self._described_frames()])
        for task in ("caption_multi", "qa_multi"):
            if task in tasks:
                yield from self._described(task, self._chains(task))

    def _solo_frames(self, *, count_ids: bool) -> dict[str, list[tuple[int, int]]]:
        """Frames of one body that covers 40 %, by person. The location script counts ids: two "others" are one."""
        found: dict[str, list[tuple[int, int]]] = {}
        for person in self.characters:
            for entry in self.entries:
                bodies = self.frames[entry.place]
                number = len({body.person for body in bodies}) if count_ids else len(bodies)
                if entry.person == person and number == 1 and _share(entry) > REFERENCE_AREA:
                    found.setdefault(person, []).append(entry.place)
        return found

    def _location_records(self) -> Iterator[dict[str, Any]]:
        number = 0
        for person, solos in self._solo_frames(count_ids=True).items():
            places = [entry.place for entry in self.entries if entry.person == person]
            latest = solos[0]
            last: tuple[tuple[int, int], int] | None = None
            for place in places[places.index(latest) + 1 :]:
                # The script keeps one box per person and frame, the last one.
                entry = [body for body in self.frames[place] if body.person == person][-1]
                if place in solos:
                    latest = place
                elif len({body.person for body in self.frames[place]}) > 1 and _share(entry) > LOCATED_AREA:
                    if last is not None and last[0] == latest and place[0] - last[1] <= SAME_REFERENCE_GAP:
                        continue
                    last = (latest, place[0])
                    with self.report.catch(f"{self.where} shot {place[0]} image {place[1]}"):
                        yield self._location_record(number, person, latest, place, entry)
                    number += 1

    def _location_record(
        self, number: int, person: str, reference: tuple[int, int], place: tuple[int, int], entry: _Entry
    ) -> dict[str, Any]:
        name = str(self.characters[person])
        tags = [image_tag(self.images.scene(self._path(each)).image) for each in (reference, place)]
        prompt = f"{name} is {tags[0]}\nIn the image: {tags[1]}\nIdentify {name} with grounding."
        answer = box_text(name, entry.box, tuple(entry.resolution))
        return self._record(f"location-{number}", [prompt, answer], place, {name: f"movienet:{person}"})

    def _described_frames(self) -> list[tuple[int, int]]:
        """Frames of two to five bodies, two to four of them with references, two shots apart."""
        last, found = -DESCRIPTION_GAP, []
        for place, bodies in self.frames.items():
            with_references = sum(body.person in self.solos for body in bodies)
            if len(bodies) in BODIES and place[0] - last >= DESCRIPTION_GAP and 2 <= with_references <= 4:
                found.append(place)
                last = place[0]
        return found

    def _chains(self, task: str) -> list[list[tuple[int, int]]]:
        """Chains of frames that share a person. The frame that ends a chain is lost."""
        last = -1
        rng = Random(f"{self.source.seed} movienet {self.film} chains")
        chains: list[list[tuple[int, int]]] = []
        chain: list[tuple[int, int]] = []
        common: list[str] = []

        def end(wanted: int) -> None:
            number = len(dict.fromkeys(common))
            is_kept = task == "qa_multi" or number in (2, 3) or (number == 1 and rng.random() < 0.5)
            if len(chain) == wanted and is_kept:
                chains.append(list(chain))

        for place, bodies in self.frames.items():
            people = [body.person for body in bodies if body.person in self.solos]
            if len(bodies) not in BODIES or place[0] - last < DESCRIPTION_GAP or not 1 <= len(people) <= 4:
                continue
            shared = [person for person in people if person in common]
            if not chain or shared:
                common = shared if chain else people
                chain.append(place)
            else:
                end(MIN_CHAIN_LENGTH)
                chain, common = [], []
            last = place[0]
            if len(chain) == CHAIN_LENGTH:
                end(CHAIN_LENGTH)
                chain, common = [], []
        return chains

    def _described(self, task: str, groups: list[list[tuple[int, int]]]) -> Iterator[dict[str, Any]]:
        drafts = []
        for places in groups:
            bodies = [body for body in self.frames[places[-1]] if body.person in self.solos]
            people = [
                body.person
                for body in bodies
                if all(any(other.person == body.person for other in self.frames[place]) for place in places)
            ]
            with self.report.catch(f"{self.where} shot {places[0][0]} image {places[0][1]}"):
                drafts.append((self._request(task, places, people), places, people))
        replies = self.source.describe([request for request, *_ in drafts]) if drafts else []
        for number, ((_, places, people), reply) in enumerate(zip(drafts, replies, strict=True)):
            with self.report.catch(f"{self.where} shot {places[0][0]} image {places[0][1]}"):
                yield self._described_record(f"{task}-{number}", task, places, people, reply)

    def _request(self, task: str, places: list[tuple[int, int]], people: list[str]) -> DescriptionRequest:
        """The model gets the boxes and the size of the annotated resolution, but the smaller file."""
        if any(self.characters[person] is None for person in people):
            raise Unsuitable("the published script fails at a character without a name")
        for place in places:
            self.images.size(self._path(place))
        names = {person: self.characters[person] for person in people}
        boxes = tuple(
            {names[body.person]: body.box for body in self.frames[place] if body.person in names} for place in places
        )
        return DescriptionRequest(
            film=self.film,
            task=task,
            frames=tuple(_file(place) for place in places),
            images=tuple(self.images.source / self._path(place) for place in places),
            size=tuple(self.frames[places[0]][0].resolution),
            names=names,
            boxes=boxes,
        )

    def _described_record(
        self,
        name: str,
        task: str,
        places: list[tuple[int, int]],
        people: list[str],
        reply: str | None,
    ) -> dict[str, Any]:
        if reply is None:
            raise Unsuitable("there is no description")
        # Before images are put into the data set.
        lines = reply.split("\n")
        if task == "qa_single" and (reply[:2].lower() == "no" or len(lines) != 2 or lines[1][:2].lower() == "no"):
            raise Unsuitable("a question or answer begins with 'no', or there is not one line break")
        if not task.startswith("caption") and len(lines) < 2:
            raise Unsuitable("the published script fails at a reply without a line break")
        rng = Random(f"{self.source.seed} movienet {self.film} {task} {places[0]}")
        prompt, keys = "", {}
        for person in people:
            existing = [place for place in self.solos[person] if (self.images.source / self._path(place)).is_file()]
            if existing:
                reference = self.images.scene(self._path(rng.choice(existing))).image
                prompt += f"{self.characters[person]} is {image_tag(reference)}\n "
                keys[self.characters[person]] = f"movienet:{person}"
        images = [self.images.scene(self._path(place)).image for place in places]
        if task.startswith("caption"):
            return self._record(name, [prompt + caption_request(rng, images), reply], places[0], keys)
        tags = [image_tag(image) for image in images]
        if len(images) == 1:
            prompt += f"In the image: {tags[0]}\n "
        else:
            prompt += "In the following images: " + "".join(f"{tag}\n" for tag in tags)
        return self._record(name, [prompt + lines[0], lines[1]], places[0], keys)

    def _record(self, name: str, texts: list[str], place: tuple[int, int], people: dict[str, str]) -> dict[str, Any]:
        return conversation(
            f"movienet-{self.film}-{name}",
            texts,
            data=self.source.name,
            annotation=f"{self.where} shot {place[0]} image {place[1]}",
            image_keys=[self.key],
            people=people,
        )

    def _path(self, place: tuple[int, int]) -> str:
        return f"{self.film}/{_file(place)}"


def _file(place: tuple[int, int]) -> str:
    return f"shot_{place[0]:04d}_img_{place[1]}.jpg"


def _share(entry: _Entry) -> float:
    return area(entry.box) / (entry.resolution[0] * entry.resolution[1])


def _entry(entry: Any, where: str) -> _Entry:
    box = take(take(entry, "body", dict, where), "bbox", list, where)
    resolution = take(entry, "resolution", list, where)
    if len(box) != 4 or len(resolution) != 2 or not all(isinstance(value, (int, float)) for value in box + resolution):
        raise DataError(f"body.bbox={box!r} or resolution={resolution!r} is damaged; the film is lost.", where=where)
    place = take(entry, "shot_idx", int, where), take(entry, "img_idx", int, where)
    return _Entry(take(entry, "pid", str, where), place, box, resolution)
