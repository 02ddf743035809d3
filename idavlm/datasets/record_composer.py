"""Training and evaluation records of the six tasks, composed from the pictures of an album."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from idavlm.datasets import wording
from idavlm.datasets.album import Album, Person, Picture

Record = dict[str, Any]
Naming = Callable[[Sequence[str], Random], Sequence[str]]
"""Names of identities in one record: ``naming(identities, rng)``, all different."""

TRAIN_SHARES = {
    "matching": 0.45,
    "location": 0.4,
    "qa_single": 0.06,
    "caption_single": 0.03,
    "qa_multi": 0.03,
    "caption_multi": 0.03,
}
"""Kinds of training records and their shares. The first two need identities and nothing else: a small model learns to
read identities from them, and reads activities much later."""

TEST_SHARES = {
    "matching": 1.0,
    "location": 1.0,
    "qa_single": 0.5,
    "caption_single": 0.5,
    "qa_multi": 0.5,
    "caption_multi": 0.5,
}
"""Kinds of evaluation records, in shares of the number asked for."""

CHOICES = 4
"""Pictures to choose from in matching."""

MAX_REFERENCES = 2
"""Photos of each identity: as many in evaluation, one to so many in training."""

MAX_INTRODUCED = 4
"""Identities of a training record at most. Each more is one more choice for every patch of the scene: with one or two,
identity attention needs several times as many pictures to leave chance."""

ROLL_CALLS = 0.5
"""Share of matching's training records that ask who is in every picture in place of which shows whom. Never both: the
one could be answered from the text of the other, and a model that can copy does not learn to look."""

FALSE_ANSWERS = 3
"""False answers beside the right one, where there are so many."""

THIRD_PICTURE = 0.7
"""Share of records about several pictures that have three of them."""

MAX_TRIALS = 1000


def drawn_names(pool: Sequence[str]) -> Naming:
    """Names drawn anew from ``pool`` for every record, so that a name says nothing about a look."""
    pool = list(dict.fromkeys(pool))
    return lambda identities, rng: rng.sample(pool, len(identities))


def own_names(names: Mapping[str, str]) -> Naming:
    """Everybody's own name, by identity; they must differ within a record."""
    return lambda identities, rng: [names[identity] for identity in identities]


@dataclass(frozen=True)
class _Question:
    text: str
    answer: str = ""
    false_answers: list[str] = field(default_factory=list)
    target: str | None = None
    """Name of the person whose box is the answer."""


class RecordComposer:
    """Composes records from an album.

    Args:
        album: pictures with at least three photos of everybody, and scenes.
        rng: decides everything.
        naming: :func:`drawn_names` or :func:`own_names`.
        question: of somebody's activity.
    """

    def __init__(self, album: Album, rng: Random, naming: Naming, question: str = "What is {name} doing?") -> None:
        self.album = album
        self.rng = rng
        self.naming = naming
        self.question = question

    def training(self, count: int) -> Iterator[Record]:
        """``count`` training records of the kinds of :data:`TRAIN_SHARES`, shuffled, with several questions each."""
        kinds = self.rng.choices(list(TRAIN_SHARES), list(TRAIN_SHARES.values()), k=count)
        for number, kind in enumerate(kinds):
            draft = self._draft(kind, evaluation=False)
            yield draft.record(f"{kind}-{number}", draft.questions)

    def evaluation(self, count: int) -> Iterator[Record]:
        """Evaluation records, one question each: ``count`` times its share of every kind of :data:`TEST_SHARES`."""
        for kind, share in TEST_SHARES.items():
            for number in range(round(count * share)):
                draft = self._draft(kind, evaluation=True)
                question = draft.questions[number % len(draft.questions)]
                record = draft.record(f"{kind}-{number}", [question])
                record["messages"].pop()
                record |= {"type": kind, "answer": question.answer}
                if question.false_answers:
                    record["false_answers"] = question.false_answers
                if question.target:
                    record["target"] = question.target
                yield record

    def _draft(self, kind: str, evaluation: bool) -> "_Draft":
        """Choose the pictures and who of the people in them is introduced, then ask."""
        choose, ask = {
            "matching": (self._choose_choices, self._ask_matching),
            "location": (self._choose_scene, self._ask_location),
            "qa_single": (self._choose_scene, self._ask_qa_single),
            "caption_single": (self._choose_scene, self._ask_caption),
            "qa_multi": (self._choose_several, self._ask_qa_multi),
            "caption_multi": (self._choose_several, self._ask_caption),
        }[kind]
        for _ in range(MAX_TRIALS):
            pictures, known = choose(evaluation)
            draft = _Draft(self, pictures, known, evaluation)
            draft.questions = ask(draft)
            if draft.questions:
                return draft
        raise ValueError(f"the album has no pictures to ask {kind} questions about; give its people activities.")

    def _choose_choices(self, evaluation: bool) -> tuple[list[Picture], list[str]]:
        """A photo each of people who may meet; one of them is asked for, in training perhaps all."""
        people = self.album.cast.draw(CHOICES, self.rng)
        known = self.rng.sample(people, 1 if evaluation else self.rng.randint(1, CHOICES))
        return [self.rng.choice(self.album.photos[one]) for one in people], known

    def _choose_scene(self, evaluation: bool) -> tuple[list[Picture], list[str]]:
        """A scene, and two of the people in it, in training perhaps all."""
        scene = self.rng.choice(self.album.scenes)
        most = 2 if evaluation else min(MAX_INTRODUCED, len(scene.people))
        return [scene], [
            person.identity for person in self.rng.sample(scene.people, self.rng.randint(2 if evaluation else 1, most))
        ]

    def _choose_several(self, evaluation: bool) -> tuple[list[Picture], list[str]]:
        """A picture of each of two people, often one more of either of them."""
        for _ in range(MAX_TRIALS):
            known = self.album.cast.draw(2, self.rng)
            of_each = [self.album.telling[one] for one in known]
            if not all(of_each):
                continue
            pictures = [self.rng.choice(some) for some in of_each]
            if self.rng.random() < THIRD_PICTURE:
                pictures.append(self.rng.choice(self.rng.choice(of_each)))
            pictures = list(dict.fromkeys(pictures))
            if len(pictures) > 1:
                self.rng.shuffle(pictures)
                return pictures, known
        raise ValueError("the album has too few pictures with something to say of people; add scenes.")

    def _ask_location(self, draft: "_Draft") -> list[_Question]:
        questions = [_Question(wording.where_is(name), target=name) for name in draft.names.values()]
        self.rng.shuffle(questions)
        return questions

    def _ask_qa_single(self, draft: "_Draft") -> list[_Question]:
        scene = draft.pictures[0]
        shown = ((name, scene.shows(identity)) for identity, name in draft.names.items())
        questions = [self._what(name, person, scene) for name, person in shown if person.activity]
        self.rng.shuffle(questions)
        return questions

    def _ask_matching(self, draft: "_Draft") -> list[_Question]:
        numbers = {identity: draft.numbers_of(identity)[0] for identity in draft.names}
        questions = [
            _Question(wording.which_shows(name), *_choice(numbers[identity], len(draft.pictures)))
            for identity, name in draft.names.items()
        ]
        if not draft.evaluation and self.rng.random() < ROLL_CALLS:
            return [_Question(wording.WHO, wording.roll_call(draft.pictures, draft.names))]
        self.rng.shuffle(questions)
        return questions

    def _ask_caption(self, draft: "_Draft") -> list[_Question]:
        pictures, names = draft.pictures, draft.names
        single = len(pictures) == 1
        answer = wording.caption(pictures[0].people, names) if single else wording.captions(pictures, names)
        return [_Question(wording.describe(len(pictures)), answer)]

    def _ask_qa_multi(self, draft: "_Draft") -> list[_Question]:
        """ "In which picture is Kate reading?" where that takes knowing her, or "What is Kate doing in picture 2?"."""
        questions = []
        for identity, name in draft.names.items():
            number = self.rng.choice(draft.numbers_of(identity))
            picture = draft.pictures[number - 1]
            person = picture.shows(identity)
            elsewhere = [other for one in draft.pictures if one is not picture for other in one.people]
            same = [other.identity for other in elsewhere if other.activity == person.activity]
            if same and identity not in same:
                text = wording.in_which_is(name, person.activity)
                questions.append(_Question(text, *_choice(number, len(draft.pictures))))
            else:
                questions.append(self._what(name, person, picture, number))
        self.rng.shuffle(questions)
        return questions

    def _what(self, name: str, person: Person, picture: Picture, number: int | None = None) -> _Question:
        """What somebody is doing; false is what the others in the picture do, then anything."""
        text = self.question.format(name=name)
        others = [other.activity for other in picture.people]
        anything = self.rng.sample(self.album.activities, len(self.album.activities))
        false = [one for one in dict.fromkeys([*others, *anything]) if one and one != person.activity]
        return _Question(
            text if number is None else wording.in_picture(text, number),
            wording.is_doing(name, person.activity),
            [wording.is_doing(name, one) for one in false[:FALSE_ANSWERS]],
        )


class _Draft:
    """One record being composed: its pictures, the identities introduced, their names and reference photos."""

    def __init__(self, composer: RecordComposer, pictures: list[Picture], known: list[str], evaluation: bool) -> None:
        rng = composer.rng
        self.pictures = pictures
        self.evaluation = evaluation
        self.names = dict(zip(known, composer.naming(known, rng), strict=True))
        self.questions: list[_Question] = []
        self.references = {
            identity: self._choose_references(
                composer.album, identity, MAX_REFERENCES if evaluation else self._photos(len(known), rng), rng
            )
            for identity in known
        }

    @staticmethod
    def _photos(introduced: int, rng: Random) -> int:
        """Photos of each identity in training: one where many are introduced, as every photo costs time."""
        return rng.randint(1, MAX_REFERENCES) if introduced <= MAX_REFERENCES else 1

    def _choose_references(self, album: Album, identity: str, count: int, rng: Random) -> list[str]:
        """Photos that are not in the record already, of other shots than the record's and each other's."""
        paths = {picture.path for picture in self.pictures}
        shots = {person.shot for picture in self.pictures if (person := picture.shows(identity))} - {""}
        photos = [photo for photo in album.photos[identity] if photo.path not in paths]
        chosen: list[str] = []
        for photo in rng.sample(photos, len(photos)):
            shot = photo.people[0].shot
            if shot not in shots and len(chosen) < count:
                chosen.append(photo.path)
                shots |= {shot} - {""}
        if not chosen:
            raise ValueError(f"identity {identity!r} has no photo of another shot than those asked about; add photos.")
        return chosen

    def _label(self, person: Person) -> str:
        """The person's name, or "someone 1", "someone 2" ... of those who are not introduced."""
        strangers = dict.fromkeys(other.identity for picture in self.pictures for other in picture.people)
        strangers = [one for one in strangers if one not in self.names]
        return self.names.get(person.identity) or f"someone {strangers.index(person.identity) + 1}"

    def numbers_of(self, identity: str) -> list[int]:
        """Numbers, from 1, of the pictures that show somebody."""
        return [number for number, picture in enumerate(self.pictures, 1) if picture.shows(identity)]

    def record(self, name: str, questions: Sequence[_Question]) -> Record:
        """The record of these questions, each with its answer, and boxes of the identities introduced.

        In evaluation it has the boxes of everybody, so that a score can say what pointing at anybody would reach.
        """
        messages = []
        for number, question in enumerate(questions):
            content = (
                question.text if number else [*self._picture_parts(), {"type": "text", "text": "\n" + question.text}]
            )
            messages.append({"role": "user", "content": content})
            answer = [{"type": "box", "name": question.target}] if question.target else question.answer
            messages.append({"role": "assistant", "content": answer})
        boxes = [
            {"name": self._label(person), "image": picture.path, "box": list(person.box)}
            for picture in self.pictures
            for person in picture.people
            if self.evaluation or person.identity in self.names
        ]
        identities = [{"name": self.names[one], "images": images} for one, images in self.references.items()]
        return {"id": name, "source": "identity", "identities": identities, "messages": messages, "boxes": boxes}

    def _picture_parts(self) -> list[dict[str, str]]:
        if len(self.pictures) == 1:
            return [{"type": "image", "image": self.pictures[0].path}]
        parts = []
        for number, picture in enumerate(self.pictures, 1):
            text = ("\n" if number > 1 else "") + wording.picture_number(number) + ": "
            parts += [{"type": "text", "text": text}, {"type": "image", "image": picture.path}]
        return parts


def _choice(number: int, count: int) -> tuple[str, list[str]]:
    """The right picture of ``count`` and the others."""
    names = [wording.picture_number(one) for one in range(1, count + 1)]
    return names.pop(number - 1), names
