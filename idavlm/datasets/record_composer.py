"""Composes training and evaluation records of the six tasks from the images of an album."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from idavlm.data.schema import TASK_TYPES
from idavlm.datasets.album import Album, AlbumImage, Appearance
from idavlm.utils.checks import check_choice, check_positive

Record = dict[str, Any]
Naming = Callable[[Sequence[str], Random], Sequence[str]]
"""Names of the identities of one record: ``naming(identities, rng)``, all different."""

TRAIN_SHARES = {
    "matching": 0.25,
    "location": 0.25,
    "qa_single": 0.15,
    "caption_single": 0.15,
    "qa_multi": 0.1,
    "caption_multi": 0.1,
}
"""Tasks of training records and their shares."""

TEST_SHARES = {
    "matching": 1.0,
    "location": 1.0,
    "qa_single": 0.5,
    "caption_single": 0.5,
    "qa_multi": 0.5,
    "caption_multi": 0.5,
}
"""Tasks of evaluation records, and the number of records as a share of ``count``."""

MAX_INTRODUCED = 4
"""Maximum number of identities that a training record introduces. Each identity is one more class for every patch of
the scene. With only one or two, the identity attention needs several times as many images to exceed chance."""

ROLL_CALL_SHARE = 0.5
"""Share of the training records of matching that ask which identity is in each image, instead of which image shows each
identity. A record never asks both: one answer could be copied from the text of the other without using the images."""

NUM_FALSE_ANSWERS = 3
"""Number of false answers per question, if there are enough activities."""

THIRD_IMAGE_SHARE = 0.7
"""Share of the records about several images that have three images instead of two."""

DESCRIBED_PHOTO_SHARE = 0.3
"""Share of the training records of ``caption_single`` that describe a photo of one identity instead of a scene."""

MAX_TRIALS = 1000

ABSENT = "Not here."
"""Answer to the question where an identity is that is not in the scene."""

ROLL_CALL_QUESTION = "Who is in the pictures?"


def drawn_names(pool: Sequence[str]) -> Naming:
    """Naming that draws names from ``pool`` for every record, so that a name is independent of the appearance."""
    pool = list(dict.fromkeys(pool))
    return lambda identities, rng: rng.sample(pool, len(identities))


def own_names(names: Mapping[str, str]) -> Naming:
    """Naming by a fixed name per identity. The names of the identities of a record must differ."""
    return lambda identities, rng: [names[identity] for identity in identities]


@dataclass(frozen=True)
class RecordOptions:
    """What an ablation study varies about records.

    Args:
        max_references: reference photos per identity: exactly this number in evaluation records, 1 to this number in
            training records.
        num_choices: number of images in a matching record.
        num_identities: number of identities that an evaluation record about a scene introduces. Those beyond the
            identities of the scene are absent from it. With more than :data:`MAX_INTRODUCED`, training records
            introduce 1 to this number, too.
        train_absent_share: share of the training records about a scene that introduce an identity that is not in the
            scene, and ask about it as well.
        test_absent_share: share of the evaluation records of location and qa_single that ask about an identity that is
            not in the scene.

    Raises:
        ValueError: an option is out of range.
    """

    max_references: int = 2
    num_choices: int = 4
    num_identities: int = 2
    train_absent_share: float = 0.0
    test_absent_share: float = 0.0

    def __post_init__(self):
        check_positive(max_references=self.max_references, num_identities=self.num_identities)
        if not 2 <= self.num_choices <= 8:
            raise ValueError(f"num_choices={self.num_choices} must be an integer from 2 to 8.")
        for name in ("train_absent_share", "test_absent_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share from 0 to 1.")

    def check_photos(self, num_photos: int) -> None:
        """Raise ``ValueError`` unless ``num_photos`` photos per identity suffice: references, and two for questions."""
        if num_photos < self.max_references + 2:
            raise ValueError(
                f"max_references={self.max_references} needs num_photos={self.max_references + 2} or more, but it is "
                f"{num_photos}."
            )


@dataclass(frozen=True)
class _Question:
    text: str
    answer: str = ""
    false_answers: list[str] = field(default_factory=list)
    target: str | None = None
    """Name of the identity that is to be located. Without ``answer``, its box is the answer."""


class RecordComposer:
    """Composes records from an album.

    Args:
        album: images with at least three photos of each identity, and scenes.
        rng: source of all random choices.
        naming: :func:`drawn_names` or :func:`own_names`.
        question: question about the activity of an identity.
        options: photos per identity, number of choices, absent identities.
    """

    def __init__(
        self,
        album: Album,
        rng: Random,
        naming: Naming,
        question: str = "What is {name} doing?",
        options: RecordOptions = RecordOptions(),
    ) -> None:
        self.album = album
        self.rng = rng
        self.naming = naming
        self.question = question
        self.options = options

    def training(self, count: int, *, shares: Mapping[str, float] | None = None) -> Iterator[Record]:
        """Yield ``count`` training records in random order.

        ``"type"`` of a record is its task. Many records contain several questions.

        Args:
            count: number of records.
            shares: relative frequency of each task; None for :data:`TRAIN_SHARES`. Tasks other than matching and
                location need activities.

        Raises:
            ValueError: a task is unknown, a share is negative or all are zero, or the album has no images for a task.
        """
        shares = _checked_shares(TRAIN_SHARES if shares is None else shares)
        tasks = self.rng.choices(list(shares), list(shares.values()), k=count)
        for number, task in enumerate(tasks):
            draft = self._draft(task, evaluation=False)
            yield {**draft.record(f"{task}-{number}", draft.questions), "type": task}

    def evaluation(self, count: int, *, shares: Mapping[str, float] | None = None) -> Iterator[Record]:
        """Yield evaluation records with one question each: ``count`` x share of each task.

        Args:
            count: number of records of a task with share 1.
            shares: share of each task; None for :data:`TEST_SHARES`.

        Raises:
            ValueError: as :meth:`training`.
        """
        for task, share in _checked_shares(TEST_SHARES if shares is None else shares).items():
            for number in range(round(count * share)):
                draft = self._draft(task, evaluation=True)
                question = draft.questions[number % len(draft.questions)]
                record = draft.record(f"{task}-{number}", [question])
                record["messages"].pop()
                record |= {"type": task, "answer": question.answer}
                if question.false_answers:
                    record["false_answers"] = question.false_answers
                if question.target:
                    record["target"] = question.target
                yield record

    def _draft(self, task: str, evaluation: bool) -> "_Draft":
        """Choose images and the identities to introduce, then the questions about them."""
        choose, ask = {
            "matching": (self._choose_photos, self._ask_matching),
            "location": (self._choose_scene, self._ask_location),
            "qa_single": (self._choose_scene, self._ask_qa_single),
            "caption_single": (self._choose_scene_or_photo, self._ask_caption),
            "qa_multi": (self._choose_several, self._ask_qa_multi),
            "caption_multi": (self._choose_several, self._ask_caption),
        }[task]
        for _ in range(MAX_TRIALS):
            images, introduced, asked = choose(evaluation)
            draft = _Draft(self, images, introduced, asked, evaluation)
            draft.questions = ask(draft)
            if draft.questions:
                return draft
        raise ValueError(f"the album has no images for {task} questions; add activities to its appearances.")

    # These three return the images, the identities that are introduced, and those that are asked about.

    def _choose_photos(self, evaluation: bool) -> tuple[list[AlbumImage], list[str], list[str]]:
        """One photo each of several identities; one identity is introduced, in training one to all of them."""
        identities = self.album.sampler.draw(self.options.num_choices, self.rng)
        most = min(self.options.num_choices, MAX_INTRODUCED)
        introduced = self.rng.sample(identities, 1 if evaluation else self.rng.randint(1, most))
        return [self.rng.choice(self.album.photos[identity]) for identity in identities], introduced, introduced

    def _choose_scene(self, evaluation: bool) -> tuple[list[AlbumImage], list[str], list[str]]:
        """A scene; two of its identities are introduced, in training one to all of them."""
        scene, options = self.rng.choice(self.album.scenes), self.options
        size = len(scene.appearances)
        is_fixed = evaluation or options.num_identities > MAX_INTRODUCED
        most = options.num_identities if is_fixed else min(MAX_INTRODUCED, size)
        count = self.rng.randint(most if evaluation else 1, most)
        absent_share = options.test_absent_share if evaluation else options.train_absent_share
        asks_about_absent = absent_share > 0 and self.rng.random() < absent_share
        num_absent = max(count - size, int(asks_about_absent))
        num_shown = min(size, max(count - num_absent, 0 if evaluation else 1))
        shown = [appearance.identity for appearance in self.rng.sample(scene.appearances, num_shown)]
        if not num_absent:
            return [scene], shown, shown
        absent = self.album.sampler.draw_absent([each.identity for each in scene.appearances], num_absent, self.rng)
        introduced = self.rng.sample([*shown, *absent], len(shown) + len(absent))
        if not asks_about_absent:
            return [scene], introduced, shown
        return [scene], introduced, absent if evaluation else introduced

    def _choose_scene_or_photo(self, evaluation: bool) -> tuple[list[AlbumImage], list[str], list[str]]:
        """As :meth:`_choose_scene`; in training often a photo of one identity, which is easier to describe."""
        if not evaluation and self.rng.random() < DESCRIBED_PHOTO_SHARE:
            [identity] = self.album.sampler.draw(1, self.rng)
            photo = self.rng.choice(self.album.photos[identity])
            if photo.appearances[0].activity:
                return [photo], [identity], [identity]
        return self._choose_scene(evaluation)

    def _choose_several(self, evaluation: bool) -> tuple[list[AlbumImage], list[str], list[str]]:
        """One image each of two identities, which are introduced, and often another image of one of them."""
        for _ in range(MAX_TRIALS):
            introduced = self.album.sampler.draw(2, self.rng)
            candidates = [self.album.images_with_activity[identity] for identity in introduced]
            if not all(candidates):
                continue
            images = [self.rng.choice(of_identity) for of_identity in candidates]
            if self.rng.random() < THIRD_IMAGE_SHARE:
                images.append(self.rng.choice(self.rng.choice(candidates)))
            images = list(dict.fromkeys(images))
            if len(images) > 1:
                self.rng.shuffle(images)
                return images, introduced, introduced
        raise ValueError("the album has too few images with activities; add scenes.")

    def _ask_location(self, draft: "_Draft") -> list[_Question]:
        questions = [
            _Question(f"Where is {name}?", "" if draft.images[0].appearance_of(identity) else ABSENT, target=name)
            for identity, name in draft.asked.items()
        ]
        if not draft.evaluation:  # the answers to both questions depend on where the identity is, not on each other
            questions += self._ask_qa_single(draft)
        self.rng.shuffle(questions)
        return questions

    def _ask_qa_single(self, draft: "_Draft") -> list[_Question]:
        scene, may_be_absent = draft.images[0], self.options.test_absent_share > 0
        appearances = [(name, scene.appearance_of(identity)) for identity, name in draft.asked.items()]
        questions = [
            self._activity_question(name, appearance, scene, may_be_absent=may_be_absent)
            for name, appearance in appearances
            if appearance is not None and appearance.activity
        ]
        for name in (name for name, appearance in appearances if appearance is None):
            activities = dict.fromkeys(each.activity for each in scene.appearances if each.activity)
            false = [f"{name} is {activity}." for activity in activities][:NUM_FALSE_ANSWERS]
            questions.append(_Question(self.question.format(name=name), f"{name} is not here.", false))
        self.rng.shuffle(questions)
        return questions

    def _ask_matching(self, draft: "_Draft") -> list[_Question]:
        questions = [
            _Question(f"Which picture shows {name}?", *_choice(draft.numbers_of(identity)[0], len(draft.images)))
            for identity, name in draft.names.items()
        ]
        if not draft.evaluation and self.rng.random() < ROLL_CALL_SHARE:
            return [_Question(ROLL_CALL_QUESTION, roll_call(draft.images, draft.names))]
        self.rng.shuffle(questions)
        return questions

    def _ask_caption(self, draft: "_Draft") -> list[_Question]:
        images, names = draft.images, draft.names
        single = len(images) == 1
        answer = caption(images[0].appearances, names) if single else captions(images, names)
        return [_Question(describe_question(len(images)), answer)]

    def _ask_qa_multi(self, draft: "_Draft") -> list[_Question]:
        """Ask "In which picture is Kate reading?" or "What is Kate doing in picture 2?".

        The first form is only used if another identity has the same activity in another image, so that the activity
        alone does not determine the answer.
        """
        questions = []
        for identity, name in draft.names.items():
            number = self.rng.choice(draft.numbers_of(identity))
            image = draft.images[number - 1]
            appearance = image.appearance_of(identity)
            elsewhere = [other for each in draft.images if each is not image for other in each.appearances]
            same_activity = [other.identity for other in elsewhere if other.activity == appearance.activity]
            if same_activity and identity not in same_activity:
                text = f"In which picture is {name} {appearance.activity}?"
                questions.append(_Question(text, *_choice(number, len(draft.images))))
            else:
                questions.append(self._activity_question(name, appearance, image, number))
        self.rng.shuffle(questions)
        return questions

    def _activity_question(
        self,
        name: str,
        appearance: Appearance,
        image: AlbumImage,
        number: int | None = None,
        *,
        may_be_absent: bool = False,
    ) -> _Question:
        """Ask for the activity of an identity. False answers are the other activities in the image, then any others.

        Where other records ask about identities that are absent, that answer is a false one here.
        """
        text = self.question.format(name=name)
        in_image = [other.activity for other in image.appearances]
        in_album = self.rng.sample(self.album.activities, len(self.album.activities))
        false = [
            activity
            for activity in dict.fromkeys([*in_image, *in_album])
            if activity and activity != appearance.activity
        ]
        return _Question(
            text if number is None else f"{text.rstrip('?')} in picture {number}?",
            f"{name} is {appearance.activity}.",
            [f"{name} is {activity}." for activity in false[:NUM_FALSE_ANSWERS]]
            + [f"{name} is not here."] * may_be_absent,
        )


class _Draft:
    """A record that is being composed: its images, the identities it introduces, their names and references.

    Attributes:
        images: images of the messages.
        names: names of the introduced identities, by identity.
        asked: names of those that may be asked about.
        references: paths of their reference photos, by identity.
        questions: questions to ask.
    """

    def __init__(
        self,
        composer: RecordComposer,
        images: list[AlbumImage],
        introduced: list[str],
        asked: list[str],
        evaluation: bool,
    ) -> None:
        rng, max_references = composer.rng, composer.options.max_references
        self.images = images
        self.evaluation = evaluation
        self.names = dict(zip(introduced, composer.naming(introduced, rng), strict=True))
        self.asked = {identity: self.names[identity] for identity in asked}
        self.questions: list[_Question] = []
        self.references = {
            identity: self._choose_references(
                composer.album,
                identity,
                max_references if evaluation else self._num_references(len(introduced), max_references, rng),
                rng,
            )
            for identity in introduced
        }

    @staticmethod
    def _num_references(num_introduced: int, max_references: int, rng: Random) -> int:
        """Reference photos per identity in training: one if many identities are introduced, as photos cost time."""
        return rng.randint(1, max_references) if num_introduced <= 2 else 1

    def _choose_references(self, album: Album, identity: str, count: int, rng: Random) -> list[str]:
        """Choose photos that are not in the record and whose shots differ from the record's and from each other."""
        paths = {image.path for image in self.images}
        shots = {found.shot for image in self.images if (found := image.appearance_of(identity))} - {""}
        photos = [photo for photo in album.photos[identity] if photo.path not in paths]
        chosen: list[str] = []
        for photo in rng.sample(photos, len(photos)):
            shot = photo.appearances[0].shot
            if shot not in shots and len(chosen) < count:
                chosen.append(photo.path)
                shots |= {shot} - {""}
        if not chosen:
            raise ValueError(f"identity {identity!r} has no photo of another shot than those asked about; add photos.")
        return chosen

    def _label(self, appearance: Appearance) -> str:
        """Name of the identity; "someone 1", "someone 2" ... for identities that are not introduced."""
        all_identities = dict.fromkeys(each.identity for image in self.images for each in image.appearances)
        unnamed = [identity for identity in all_identities if identity not in self.names]
        return self.names.get(appearance.identity) or f"someone {unnamed.index(appearance.identity) + 1}"

    def numbers_of(self, identity: str) -> list[int]:
        """Numbers, from 1, of the images that show ``identity``."""
        return [number for number, image in enumerate(self.images, 1) if image.appearance_of(identity)]

    def record(self, name: str, questions: Sequence[_Question]) -> Record:
        """Return the record with id ``name``: the questions with their answers, boxes, and who the names are.

        Training records have the boxes of the introduced identities. Evaluation records have the boxes of all
        identities in the images, so that the chance level of pointing at any identity can be computed.
        """
        messages = []
        images = image_parts([image.path for image in self.images])
        for number, question in enumerate(questions):
            content = question.text if number else [*images, {"type": "text", "text": "\n" + question.text}]
            messages.append({"role": "user", "content": content})
            is_box = question.target is not None and not question.answer
            answer = [{"type": "box", "name": question.target}] if is_box else question.answer
            messages.append({"role": "assistant", "content": answer})
        boxes = [
            {"name": self._label(appearance), "image": image.path, "box": list(appearance.box)}
            | ({"label": appearance.activity} if appearance.activity else {})
            for image in self.images
            for appearance in image.appearances
            if self.evaluation or appearance.identity in self.names
        ]
        identities = [{"name": self.names[identity], "images": paths} for identity, paths in self.references.items()]
        meta = {
            "people": {name: identity for identity, name in self.names.items()},
            "distractors": [name for identity, name in self.names.items() if not self.numbers_of(identity)],
        }
        return {
            "id": name,
            "source": "identity",
            "identities": identities,
            "messages": messages,
            "boxes": boxes,
            "meta": meta,
        }


def _checked_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """The tasks with a positive share."""
    for task, share in shares.items():
        check_choice("shares: task", task, TASK_TYPES)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < float("inf"):
            raise ValueError(f"shares: {task}={share!r} must be a number of at least 0.")
    if not any(shares.values()):
        raise ValueError("shares: all tasks have the share 0; pass a positive one.")
    return {task: share for task, share in shares.items() if share}


def image_label(number: int) -> str:
    """Label of an image in questions and answers: "Picture 2"."""
    return f"Picture {number}"


def image_parts(paths: Sequence[str]) -> list[dict[str, str]]:
    """Content parts of the images of a record: several images have their labels before them."""
    if len(paths) == 1:
        return [{"type": "image", "image": paths[0]}]
    parts = []
    for number, path in enumerate(paths, 1):
        text = ("\n" if number > 1 else "") + image_label(number) + ": "
        parts += [{"type": "text", "text": text}, {"type": "image", "image": path}]
    return parts


def enumeration(words: Sequence[str]) -> str:
    """Enumerate names or clauses: "Kate", "Kate and Tom", "Kate, Tom and Ida"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def describe_question(num_images: int) -> str:
    """Request for a caption of one or several images."""
    return "Describe the picture." if num_images == 1 else "Describe the pictures."


def roll_call(images: Sequence[AlbumImage], names: Mapping[str, str]) -> str:
    """Identities in each image: "Picture 1: Kate. Picture 2: someone."."""
    labels = [
        " and ".join(names.get(appearance.identity, "someone") for appearance in image.appearances) for image in images
    ]
    return " ".join(f"{image_label(number)}: {label}." for number, label in enumerate(labels, 1))


def caption(appearances: Sequence[Appearance], names: Mapping[str, str]) -> str:
    """Caption from left to right: "Kate is waving, someone is running and Tom is reading."; ``names`` by identity."""
    clauses = [f"{names.get(appearance.identity, 'someone')} is {appearance.activity}" for appearance in appearances]
    joined = enumeration(clauses)
    return joined[0].upper() + joined[1:] + "."


def captions(images: Sequence[AlbumImage], names: Mapping[str, str]) -> str:
    """Captions of several images: "Picture 1: Kate is waving. Picture 2: Tom is running."."""
    return " ".join(
        f"{image_label(number)}: {caption(image.appearances, names)}" for number, image in enumerate(images, 1)
    )


def _choice(number: int, count: int) -> tuple[str, list[str]]:
    """Label of image ``number`` of ``count``, and the labels of the other images."""
    labels = [image_label(each) for each in range(1, count + 1)]
    return labels.pop(number - 1), labels


FIRST_NAMES: tuple[str, ...] = (
    *("Ada", "Alan", "Alice", "Amir", "Amy", "Anna", "Anton", "Astrid", "Bella", "Ben", "Boris", "Carl", "Carla"),
    *("Chloe", "Clara", "Daniel", "David", "Diego", "Dora", "Edith", "Elena", "Eli", "Emil", "Emma", "Erik"),
    *("Esther", "Eva", "Felix", "Fiona", "Frank", "Freya", "George", "Grace", "Greta", "Hana", "Hannah", "Hassan"),
    *("Helen", "Henry", "Hugo", "Ida", "Ines", "Ingrid", "Iris", "Isaac", "Ivan", "Jack", "Jana", "Jane", "Jasper"),
    *("John", "Jonas", "Julia", "Kai", "Karim", "Kate", "Klara", "Lars", "Laura", "Lena", "Leo", "Liam", "Lina"),
    *("Lucas", "Lucy", "Luis", "Maria", "Mark", "Marta", "Max", "Maya", "Mia", "Mila", "Nadia", "Nico", "Nina"),
    *("Noah", "Nora", "Olga", "Oliver", "Omar", "Oscar", "Otto", "Paul", "Pia", "Rita", "Robin", "Rosa", "Ruth"),
    *("Sam", "Sara", "Simon", "Sofia", "Stella", "Tara", "Theo", "Tina", "Tom", "Uma", "Vera", "Victor", "Wanda"),
    *("Yara", "Yuki", "Zoe"),
)
"""First names for :func:`drawn_names`."""
