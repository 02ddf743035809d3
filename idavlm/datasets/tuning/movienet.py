"""MovieNet: the cast of films in their frames; references from other scenes, location, captions and questions."""

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from idavlm.data.errors import DataError
from idavlm.datasets.tuning.annotations import Report, area, check_kind, pixel_box, read_json, scaled, take
from idavlm.datasets.tuning.build import TuningSource
from idavlm.datasets.tuning.descriptions import (
    TASKS,
    Describer,
    DescriptionRequest,
    checked_caption,
    checked_question,
)
from idavlm.datasets.tuning.image_files import PartImages
from idavlm.datasets.tuning.names import draw_names
from idavlm.datasets.tuning.records import Introduced, Reference, Turn, identity_record, location_turn
from idavlm.datasets.tuning.splits import Splits, film_key, strictest

REFERENCE_AREA = 0.4
"""A frame is a reference if the only body in it covers more than this share."""

LOCATED_AREA = 0.15
"""A person is located if the body covers more than this share of the frame."""

LOCATION_GAP = 4
DESCRIPTION_GAP = 2
"""Minimum number of shots between two frames that are asked about."""

REFERENCE_DISTANCE = 50
"""Minimum number of shots between a reference and the frames asked about, in films without annotated scenes."""

BODIES = range(2, 6)
"""Numbers of bodies of frames that are described."""

MAX_INTRODUCED = 4
MAX_REFERENCES = 2
CHAIN_LENGTH = 4
MIN_CHAIN_LENGTH = 3

CAPTION_REQUESTS = {
    "caption_single": ("Describe the image.", "What is happening in the image?", "Write a caption for the image."),
    "caption_multi": ("Describe what happens in the images.", "Tell what happens from the first image to the last."),
}
ALL_TASKS = ("location", *TASKS)


@dataclass(frozen=True)
class Body:
    """A body in a frame: id of the person (``"others"`` if it is none of the cast), other candidates, box.

    The box is in pixels of ``Frame.resolution``.
    """

    person: str
    candidates: tuple[str, ...]
    box: list[float]


@dataclass(frozen=True)
class Frame:
    """An annotated frame of a film."""

    film: str
    shot: int
    image: int
    resolution: tuple[float, float]
    bodies: tuple[Body, ...]

    @property
    def file(self) -> str:
        """File name."""
        return f"shot_{self.shot:04d}_img_{self.image}.jpg"

    @property
    def path(self) -> str:
        """Path below the folder ``240P``."""
        return f"{self.film}/{self.file}"

    def share(self, body: Body) -> float:
        """Share of the frame that a body covers."""
        return area(body.box) / (self.resolution[0] * self.resolution[1])

    def body_of(self, person: str) -> Body | None:
        """The body of a person who is in the frame exactly once, else None."""
        found = [body for body in self.bodies if body.person == person]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Film:
    """The annotation of a film.

    Attributes:
        name: its id, ``"tt0111161"``.
        frames: annotated frames in order of time.
        scene_starts: first shots of the annotated scenes, sorted; empty if the film has no annotated scenes.
        problems: faults of single entries.
    """

    name: str
    frames: list[Frame]
    scene_starts: list[int]
    problems: list[str]

    def scene(self, shot: int) -> str:
        """Key of the scene of a shot; empty if it is not known."""
        number = bisect_right(self.scene_starts, shot)
        return f"{self.name}:{number}" if number else ""


class MovieNet(TuningSource):
    """Builds records from MovieNet: ``annotation/``, ``meta/`` and the frames ``240P/``.

    A reference is a whole frame that shows only one body. It is of another scene than the frames that are asked about;
    in a film without annotated scenes it is at least fifty shots away. Names are drawn, because a model may know
    characters by the title of the film. Distractors are other members of the same cast who are not in the frame.
    Films are split as a whole. An actor who plays in held-out films is not introduced in training films.

    Args:
        annotations: folder with ``annotation/`` and ``meta/``.
        images: folder ``240P``.
        seed: seed of all choices.
        distractors: share of the records that introduce someone who is not there.
        describe: writes captions, questions and answers; None for location records only.
        describer_name: what ``describe`` is, for the options in ``dataset.json``.
        tasks: tasks of the records; None for all that are possible.
        films: ids of the films; None for all in ``annotation/``.
        splits: shares of validation and test.
    """

    name = "movienet"
    reader = "idavlm"
    units_per_part = 1

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        seed: int = 0,
        distractors: float = 0.25,
        describe: Describer | None = None,
        describer_name: str | None = None,
        tasks: Sequence[str] | None = None,
        films: Sequence[str] | None = None,
        splits: Splits | None = None,
    ) -> None:
        self.annotations = Path(annotations)
        self.image_root = Path(images)
        self.seed = seed
        self.distractors = distractors
        self.describe = describe
        self.tasks = check_tasks(tasks, describe)
        self.splits = splits or Splits()
        self.films = list_films(self.annotations, films)
        self._split_films()
        self.options = {
            "annotations": fingerprint(self.annotations, self.films),
            "seed": seed,
            "distractors": distractors,
            "describe": describer_name,
            "tasks": self.tasks,
            "as_published": False,
            "val": self.splits.val,
            "test": self.splits.test,
        }

    def _split_films(self) -> None:
        """Splits of films and of their cast: a person has the strictest split of the films that list it."""
        self._film_keys: dict[str, str] = {}
        self._casts: dict[str, list[str]] = {}
        splits: dict[str, list[str]] = defaultdict(list)
        for film in self.films:
            try:
                title, cast = read_meta(self.annotations, film)
            except DataError:  # reported when the film is built
                continue
            self._film_keys[film] = film_key(title) if title else f"film:{film}"
            self._casts[film] = list(cast)
            for person in cast:
                splits[person].append(self.splits.of(self._film_keys[film]))
        self._person_splits = {
            person: strictest([*of_films, self.splits.held_out.get(f"movienet:{person}", "train")])
            for person, of_films in splits.items()
        }

    def __len__(self) -> int:
        return len(self.films)

    def compose(self, unit: int, images: PartImages, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the records of a film with its split."""
        film = self.films[unit]
        with report.catch(str(self.annotations / "annotation" / f"{film}.json")):
            read_meta(self.annotations, film)
            composer = _FilmComposer(self, read_film(self.annotations, film), images, report)
            for record in composer.records():
                yield composer.split, record


class _FilmComposer:
    """Composes the records of one film."""

    def __init__(self, source: MovieNet, film: Film, images: PartImages, report: Report) -> None:
        self.source = source
        self.film = film
        self.images = images
        self.report = report
        report.problems.extend(film.problems)
        self.key = source._film_keys[film.name]
        self.split = source.splits.of(self.key)
        self.cast = [person for person in source._casts[film.name] if source._person_splits.get(person) == self.split]
        if len(self.cast) < len(source._casts[film.name]):
            report.counts["actors of held-out films"] += len(source._casts[film.name]) - len(self.cast)
        self._readable: dict[str, bool] = {}
        self.solos: dict[str, list[Frame]] = defaultdict(list)
        for frame in film.frames:
            if len(frame.bodies) == 1 and frame.share(frame.bodies[0]) > REFERENCE_AREA:
                person = frame.bodies[0].person
                if person in self.cast and self._is_readable(frame):
                    self.solos[person].append(frame)

    def records(self) -> Iterator[dict[str, Any]]:
        """All records of the film."""
        tasks = self.source.tasks
        if "location" in tasks:
            yield from self._location_records()
        drafts = []
        for task in (task for task in TASKS if task in tasks):
            groups = self._chains() if task.endswith("multi") else [[frame] for frame in self._described_frames(2)]
            drafts += [draft for group in groups if (draft := self._draft(task, group)) is not None]
        if not drafts:
            return
        replies = self.source.describe([request for request, *_ in drafts])
        for (request, frames, introduced, scenes), reply in zip(drafts, replies, strict=True):
            with self.report.catch(self._where(frames)):
                record = self._described_record(request, frames, introduced, scenes, reply)
                if record is not None:
                    yield record

    def _location_records(self) -> Iterator[dict[str, Any]]:
        last = -LOCATION_GAP
        for frame in self.film.frames:
            if len(frame.bodies) < 2 or frame.shot - last < LOCATION_GAP:
                continue
            rng = self._rng("location", [frame])
            present = [
                person
                for person in self.cast
                if (body := frame.body_of(person)) is not None and frame.share(body) > LOCATED_AREA
            ]
            with self.report.catch(self._where([frame])):
                introduced, scenes = self._introduce(present, [frame], rng)
                if not any(identity.boxes for identity in introduced):
                    self.report.dropped["no person of the frame has a reference of another scene"] += 1
                    continue
                last = frame.shot
                turns = [location_turn(identity) for identity in introduced]
                rng.shuffle(turns)
                yield self._record("location", [frame], introduced, scenes, turns[:1] if self.is_test else turns)

    @property
    def is_test(self) -> bool:
        return self.split == "test"

    def _introduce(
        self, people: Sequence[str], frames: list[Frame], rng: Random, *, needs: int = 1
    ) -> tuple[list[Introduced], list[Any]]:
        """Introduce people of the frames who have references, and perhaps a distractor; in random order.

        Returns:
            The introduced people and the scenes; two empty lists if fewer than ``needs`` people have references.
        """
        with_references = [
            (person, found) for person in people if (found := self._reference_frames(person, frames, rng))
        ]
        if len(with_references) < needs:
            return [], []
        if len(with_references) > MAX_INTRODUCED:
            with_references = rng.sample(with_references, MAX_INTRODUCED)
        if rng.random() < self.source.distractors:
            seen = {person for frame in frames for body in frame.bodies for person in (body.person, *body.candidates)}
            absent = [person for person in self.cast if person not in seen]
            rng.shuffle(absent)
            other = next(
                (pair for person in absent if (pair := (person, self._reference_frames(person, frames, rng)))[1]), None
            )
            self.report.counts["distractors" if other else "distractors not found"] += 1
            with_references += [other] if other else []
        scenes = [
            self.images.scene(frame.path, shot=_shot(frame), scene=self.film.scene(frame.shot)) for frame in frames
        ]
        boxes: dict[str, dict[str, list[float]]] = defaultdict(dict)
        for frame, scene in zip(frames, scenes, strict=True):
            size = self.images.size(frame.path)
            for person, _ in with_references:
                body = frame.body_of(person)
                if body is not None:
                    boxes[person][scene.image] = scaled(body.box, frame.resolution, size)
        names = draw_names(["neutral"] * len(with_references), rng)
        introduced = [
            Introduced(name, f"movienet:{person}", [self._reference(frame) for frame in chosen], boxes[person])
            for name, (person, chosen) in zip(names, with_references, strict=True)
        ]
        rng.shuffle(introduced)
        return introduced, scenes

    def _reference_frames(self, person: str, frames: list[Frame], rng: Random) -> list[Frame]:
        """One or two frames that show only this person, of other scenes than ``frames`` and than each other."""
        count = rng.randint(1, MAX_REFERENCES)
        solos = self.solos.get(person, [])
        used = list(frames)
        chosen: list[Frame] = []
        for frame in rng.sample(solos, len(solos)):
            if len(chosen) < count and all(self._is_elsewhere(frame, other) for other in used):
                chosen.append(frame)
                used.append(frame)
        return chosen

    def _reference(self, frame: Frame) -> Reference:
        return self.images.whole(frame.path, shot=_shot(frame), scene=self.film.scene(frame.shot))

    def _is_elsewhere(self, reference: Frame, other: Frame) -> bool:
        first, second = self.film.scene(reference.shot), self.film.scene(other.shot)
        if first and second:
            return first != second
        return abs(reference.shot - other.shot) >= REFERENCE_DISTANCE

    def _described_frames(self, min_people: int) -> list[Frame]:
        """Frames of two to five bodies, ``min_people`` to four of them with references, two shots apart."""
        found: list[Frame] = []
        for frame in self.film.frames:
            is_next = not found or frame.shot - found[-1].shot >= DESCRIPTION_GAP
            has_people = min_people <= len(self._people(frame)) <= MAX_INTRODUCED
            if is_next and has_people and len(frame.bodies) in BODIES and self._is_readable(frame):
                found.append(frame)
        return found

    def _people(self, frame: Frame) -> list[str]:
        return [person for person in self.cast if person in self.solos and frame.body_of(person) is not None]

    def _chains(self) -> list[list[Frame]]:
        """Chains of three or four frames that have a person in common. The frame that ends a chain begins the next."""
        chains: list[list[Frame]] = []
        chain: list[Frame] = []
        common: set[str] = set()
        for frame in self._described_frames(1):
            people = set(self._people(frame))
            if chain and common & people:
                chain, common = [*chain, frame], common & people
            else:
                chains += [chain] if len(chain) >= MIN_CHAIN_LENGTH else []
                chain, common = [frame], people
            if len(chain) == CHAIN_LENGTH:
                chains.append(chain)
                chain, common = [], set()
        return chains + ([chain] if len(chain) >= MIN_CHAIN_LENGTH else [])

    def _draft(self, task: str, frames: list[Frame]) -> tuple | None:
        """The request for a description, with the people it introduces; None if too few have references."""
        rng = self._rng(task, frames)
        common = [person for person in self._people(frames[0]) if all(frame.body_of(person) for frame in frames)]
        introduced, scenes = [], []
        with self.report.catch(self._where(frames)):
            introduced, scenes = self._introduce(common, frames, rng, needs=1 if len(frames) > 1 else 2)
        present = [identity for identity in introduced if identity.boxes]
        if not present:
            self.report.dropped["too few people of the frames have references of another scene"] += 1
            return None
        request = DescriptionRequest(
            film=self.film.name,
            task=task,
            frames=tuple(frame.file for frame in frames),
            images=tuple(self.images.source / frame.path for frame in frames),
            size=self.images.size(frames[0].path),
            names={identity.key.removeprefix("movienet:"): identity.name for identity in present},
            boxes=tuple({identity.name: identity.boxes[scene.image] for identity in present} for scene in scenes),
        )
        return request, frames, introduced, scenes

    def _described_record(
        self,
        request: DescriptionRequest,
        frames: list[Frame],
        introduced: list[Introduced],
        scenes: list,
        reply: str | None,
    ) -> dict[str, Any] | None:
        if reply is None:
            self.report.dropped["there is no description"] += 1
            return None
        rng = self._rng(f"{request.task} request", frames)
        names = list(request.names.values())
        if request.task in CAPTION_REQUESTS:
            text = checked_caption(reply, names)
            turns = [Turn(rng.choice(CAPTION_REQUESTS[request.task]), text, task=request.task)]
        else:
            question, answer = checked_question(reply, names)
            turns = [Turn(question, answer, task=request.task)]
            if self.is_test:
                self.report.dropped["a question of a test film has no false answers"] += 1
                return None
        if len(frames) == 1 and not self.is_test and any(not identity.boxes for identity in introduced):
            turns.append(location_turn(rng.choice(introduced)))
        return self._record(request.task, frames, introduced, scenes, turns)

    def _record(
        self, task: str, frames: list[Frame], introduced: list[Introduced], scenes: list, turns: list[Turn]
    ) -> dict[str, Any]:
        return identity_record(
            f"movienet-{self.film.name}-{task}-{frames[0].shot}-{frames[0].image}",
            data=self.source.name,
            annotation=self._where(frames),
            image_keys=[self.key],
            introduced=introduced,
            scenes=scenes,
            turns=turns,
            evaluation=self.is_test,
        )

    def _is_readable(self, frame: Frame) -> bool:
        """Whether the file of a frame can be read; if not, this is reported once."""
        if frame.path not in self._readable:
            try:
                self.images.size(frame.path)
                self._readable[frame.path] = True
            except DataError as error:
                self.report.problems.append(f"{self._where([frame])}: {error}")
                self._readable[frame.path] = False
        return self._readable[frame.path]

    def _where(self, frames: list[Frame]) -> str:
        path = self.source.annotations / "annotation" / f"{self.film.name}.json"
        return f"{path} shot {frames[0].shot} image {frames[0].image}"

    def _rng(self, task: str, frames: list[Frame]) -> Random:
        return Random(f"{self.source.seed} movienet {self.film.name} {task} {frames[0].shot} {frames[0].image}")


def _shot(frame: Frame) -> str:
    return f"{frame.film}:{frame.shot}"


def check_tasks(tasks: Sequence[str] | None, describe: Describer | None) -> list[str]:
    """The tasks of the records. Raises ValueError for an unknown one, or one that needs descriptions without them."""
    if tasks is None:
        return list(ALL_TASKS) if describe is not None else ["location"]
    for task in tasks:
        if task not in ALL_TASKS:
            raise ValueError(f"tasks: {task!r} is not known; choose from {', '.join(ALL_TASKS)}.")
        if task in TASKS and describe is None:
            raise ValueError(f"tasks: {task!r} needs descriptions; pass describe= (--describe or --texts).")
    return [task for task in ALL_TASKS if task in tasks]


def list_films(annotations: Path, films: Sequence[str] | None) -> list[str]:
    """Ids of the films; by default all in ``annotation/``."""
    folder = annotations / "annotation"
    if not folder.is_dir():
        raise ValueError(
            f"annotations={str(annotations)!r} has no folder annotation; pass the folder files of MovieNet."
        )
    found = list(films) if films is not None else sorted(path.stem for path in folder.glob("*.json"))
    if not found:
        raise ValueError(f"{folder} holds no .json file; pass the folder files of MovieNet.")
    return found


def fingerprint(annotations: Path, films: Sequence[str]) -> str:
    """Hash of the names and sizes of the annotation files."""
    paths = [annotations / kind / f"{film}.json" for film in films for kind in ("annotation", "meta")]
    lines = [f"{path.parent.name}/{path.name} {path.stat().st_size if path.is_file() else None}" for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def read_meta(annotations: Path, film: str) -> tuple[str, dict[str, str | None]]:
    """Title of a film, empty if it is unknown, and the character of each member of its cast, by id.

    Raises:
        DataError: the file is missing or faulty.
    """
    path = annotations / "meta" / f"{film}.json"
    meta = read_json(path)
    cast = {}
    for number, entry in enumerate(take(meta, "cast", list, str(path))):
        where = f"{path} cast[{number}]"
        character = entry.get("character") if isinstance(entry, dict) else None
        cast[take(entry, "id", str, where)] = character if isinstance(character, str) else None
    title = meta.get("title")
    return title if isinstance(title, str) else "", cast


def read_film(annotations: Path, film: str) -> Film:
    """Read the annotation of a film.

    Raises:
        DataError: the file is missing or faulty as a whole. Faulty entries are in ``problems`` of the result.
    """
    path = annotations / "annotation" / f"{film}.json"
    annotation = read_json(path)
    bodies: dict[tuple[int, int], list[Body]] = defaultdict(list)
    resolutions: dict[tuple[int, int], tuple[float, float]] = {}
    problems: list[str] = []
    incomplete: set[str] = set()
    for number, entry in enumerate(take(annotation, "cast", list, str(path))):
        where = f"{path} cast[{number}]"
        try:
            place, resolution, body = _read_body(entry, where)
        except DataError as error:
            problems.append(str(error))
            # The frame has a body that is not known: it must not pass for a frame of one person.
            if isinstance(entry, dict):
                incomplete.add(f"{entry.get('shot_idx')} {entry.get('img_idx')}")
            continue
        bodies[place].append(body)
        resolutions[place] = resolution
    frames = [
        Frame(film, *place, resolutions[place], tuple(bodies[place]))
        for place in sorted(bodies)
        if f"{place[0]} {place[1]}" not in incomplete
    ]
    starts = []
    for number, scene in enumerate(annotation.get("scene") or []):
        where = f"{path} scene[{number}]"
        try:
            shots = take(scene, "shot", list, where)
            starts.append(check_kind(shots[0] if shots else None, "shot", int, where))
        except DataError as error:
            problems.append(str(error))
    return Film(film, frames, sorted(starts), problems)


def _read_body(entry: Any, where: str) -> tuple[tuple[int, int], tuple[float, float], Body]:
    """Shot and number of the image, resolution, body."""
    place = take(entry, "shot_idx", int, where), take(entry, "img_idx", int, where)
    resolution = take(entry, "resolution", list, where)
    if len(resolution) != 2 or not all(isinstance(side, (int, float)) and side > 0 for side in resolution):
        raise DataError(f"resolution={resolution!r} must be [width, height].", where=where)
    box = pixel_box(take(entry, "body", dict, where).get("bbox"), *resolution, where, name="body.bbox")
    candidates = entry.get("possible_pids") or []
    candidates = tuple(map(str, candidates)) if isinstance(candidates, list) else ()
    return place, tuple(resolution), Body(take(entry, "pid", str, where), candidates, box)
