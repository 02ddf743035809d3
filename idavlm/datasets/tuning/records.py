"""Records of built data sets: introduced people, their references, scenes, questions, and where they come from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from idavlm.data.parsing import parse_sample
from idavlm.datasets.record_composer import image_parts


@dataclass(frozen=True)
class Reference:
    """A reference photo.

    Attributes:
        image: path in the built data set.
        of: path of the image in the source.
        box: what was cut out of it, ``[x1, y1, x2, y2]`` in pixels; None for the whole image.
        shot: key of the shot; empty if the source knows none.
        scene: key of the scene of a film; empty if the source knows none.
    """

    image: str
    of: str
    box: list[float] | None = None
    shot: str = ""
    scene: str = ""


@dataclass(frozen=True)
class Scene:
    """An image that is asked about; attributes as in :class:`Reference`."""

    image: str
    of: str
    shot: str = ""
    scene: str = ""


@dataclass(frozen=True)
class Introduced:
    """An identity that a record introduces.

    Attributes:
        name: its name in the record.
        key: its key in the source; two records with the same key are about the same individual.
        references: its reference photos.
        boxes: its box in each scene that shows it, by path in the built data set. Empty for a distractor.
    """

    name: str
    key: str
    references: list[Reference]
    boxes: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: text of the question.
        answer: text of the answer; empty if the answer is the box of ``target``.
        target: the identity to locate.
        task: one of the six tasks.
        false_answers: other choices, for evaluation.
    """

    question: str
    answer: str = ""
    target: Introduced | None = None
    task: str = "qa_single"
    false_answers: list[str] = field(default_factory=list)


def location_turn(identity: Introduced) -> Turn:
    """Ask where an identity is: in its box, or not in the image if it is a distractor."""
    answer = "" if identity.boxes else f"{identity.name} is not in the image."
    return Turn(f"Where is {identity.name}?", answer, identity, "location")


def identity_record(
    name: str,
    *,
    data: str,
    annotation: str,
    image_keys: Sequence[str],
    introduced: Sequence[Introduced],
    scenes: Sequence[Scene],
    turns: Sequence[Turn],
    evaluation: bool,
) -> dict[str, Any]:
    """Return a record of the schema, checked by :func:`idavlm.data.parse_sample`.

    ``meta`` says where the record comes from: ``data``, ``annotation``, the keys ``images`` and ``people`` by which
    data sets are split, the names of ``distractors``, and for ``references`` and ``scenes`` the image of the source,
    the crop, shot and scene (:mod:`idavlm.data.record_meta`).

    Args:
        name: id of the record.
        data: name of the source.
        annotation: file and line.
        image_keys: keys of the images, as :class:`idavlm.datasets.tuning.Splits` takes them.
        introduced: identities in the order in which they are introduced.
        scenes: images that are asked about.
        turns: questions and answers. An evaluation record has one.
        evaluation: whether the answer is a field of the record instead of the last turn.
    """
    scene_parts = image_parts([scene.image for scene in scenes])
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        content = turn.question if number else [*scene_parts, {"type": "text", "text": "\n" + turn.question}]
        messages.append({"role": "user", "content": content})
        if evaluation:
            break
        located = turn.target is not None and turn.target.boxes
        answer = [{"type": "box", "name": turn.target.name}] if located else turn.answer
        messages.append({"role": "assistant", "content": answer})
    record = {
        "id": name,
        "source": "identity",
        "type": turns[0].task,
        "identities": [
            {"name": identity.name, "images": [reference.image for reference in identity.references]}
            for identity in introduced
        ],
        "messages": messages,
        "boxes": [
            {"name": identity.name, "image": image, "box": box}
            for identity in introduced
            for image, box in identity.boxes.items()
        ],
    }
    if evaluation:
        record["answer"] = turns[0].answer
        if turns[0].false_answers:
            record["false_answers"] = turns[0].false_answers
        if turns[0].target is not None:
            record["target"] = turns[0].target.name
    parse_sample(record, where=annotation)
    record["meta"] = {
        "data": data,
        "annotation": annotation.rpartition("/")[2],
        "images": list(image_keys),
        "people": {identity.name: identity.key for identity in introduced},
        "distractors": [identity.name for identity in introduced if not identity.boxes],
        "references": [_origin(reference) for identity in introduced for reference in identity.references],
        "scenes": [_origin(scene) for scene in scenes],
    }
    return record


def _origin(image: Reference | Scene) -> dict[str, Any]:
    """The fields of an image without those that the source does not know; the box of a reference may be null."""
    fields = {"image": image.image, "of": image.of}
    if isinstance(image, Reference):
        fields["box"] = image.box
    return fields | {name: value for name in ("shot", "scene") if (value := getattr(image, name))}
