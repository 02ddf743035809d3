"""The one sample schema: what a record becomes once it has been checked (see ``parsing.py``)."""

from dataclasses import dataclass, field
from pathlib import Path

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image", "box")
SOURCES = ("identity", "general")
TASK_TYPES = ("matching", "location", "qa_single", "caption_single", "qa_multi", "caption_multi")


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message: text, a picture, or the box of a person.

    A ``"text"`` part has ``text``; an ``"image"`` part has ``image``, a path under the image root; a ``"box"`` part
    has the ``name`` and ``image`` of the entry of ``Sample.boxes`` it stands for.
    """

    type: str
    text: str = ""
    image: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of ``"system"``, ``"user"`` or ``"assistant"``."""

    role: str
    content: list[Part]

    @property
    def images(self) -> list[str]:
        """Paths of its pictures, in order."""
        return [part.image for part in self.content if part.type == "image"]


@dataclass(frozen=True, slots=True)
class Identity:
    """A named person and their reference photos (paths under the image root)."""

    name: str
    images: list[str]


@dataclass(frozen=True, slots=True)
class Box:
    """Where a person is: ``box`` is ``[x1, y1, x2, y2]`` in pixels of the original picture ``image``."""

    name: str
    image: str
    box: list[float]


@dataclass(frozen=True, slots=True)
class Sample:
    """A checked record. ``task`` is None for training; otherwise the sample is to be answered and scored.

    ``where`` is its file and line, for messages; ``image_root`` is the folder its paths stand under.
    """

    id: str
    source: str
    identities: list[Identity]
    messages: list[Message]
    boxes: list[Box] = field(default_factory=list)
    task: str | None = None
    answer: str | None = None
    false_answers: list[str] = field(default_factory=list)
    target: str | None = None
    where: str = ""
    image_root: Path | None = None

    @property
    def reference_images(self) -> list[str]:
        """Paths of the reference photos, identity by identity."""
        return [image for identity in self.identities for image in identity.images]

    @property
    def message_images(self) -> list[str]:
        """Paths of the pictures in the messages, in order: scenes, or general images where nobody is introduced."""
        return [part.image for message in self.messages for part in message.content if part.type == "image"]

    @property
    def images(self) -> list[str]:
        """All pictures in the order of the encoded sample: references, then pictures of the messages."""
        return self.reference_images + self.message_images

    def box_of(self, name: str, image: str) -> Box:
        """The entry of ``boxes`` of this person in this picture; KeyError without one."""
        for box in self.boxes:
            if box.name == name and box.image == image:
                return box
        raise KeyError(f"{self.where or self.id}: no box of {name!r} in {image!r}.")

    @property
    def target_box(self) -> Box | None:
        """The gold box of a location task: that of ``target`` in the last picture; None where there is none."""
        images = self.message_images
        found = [box for box in self.boxes if box.name == self.target and images and box.image == images[-1]]
        return found[0] if found else None
