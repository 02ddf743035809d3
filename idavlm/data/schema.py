"""The sample schema: dataclasses for checked records (:func:`idavlm.data.parse_sample` creates them from JSON)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from idavlm.data.images import RecordImages

ROLES = ("system", "user", "assistant")
"""Roles of messages."""

PART_TYPES = ("text", "image", "box")
"""Types of content parts."""

SOURCES = ("identity", "general")
"""Sources of samples. The index of a source is its number in ``sample_source`` of a batch."""

TASK_TYPES = ("matching", "location", "qa_single", "caption_single", "qa_multi", "caption_multi")
"""Tasks of records: the six tasks of MM-ID (IDA-VLM)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a message: text, an image, or the box of an identity.

    A ``"text"`` part has ``text``. An ``"image"`` part has ``image``, a path relative to the image root. A ``"box"``
    part has ``name`` and ``image``, which refer to an entry of ``Sample.boxes``, or ``image`` and a ``box`` of its own
    (``relative`` as in :class:`Box`), whose ``name`` may be empty.
    """

    type: str
    text: str = ""
    image: str = ""
    name: str = ""
    box: list[float] | None = None
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of ``"system"``, ``"user"`` or ``"assistant"``."""

    role: str
    content: list[Part]

    @property
    def images(self) -> list[str]:
        """Paths of the images of the message, in order."""
        return [part.image for part in self.content if part.type == "image"]


@dataclass(frozen=True, slots=True)
class Identity:
    """A named identity and the paths of its reference photos, relative to the image root."""

    name: str
    images: list[str]


@dataclass(frozen=True, slots=True)
class Box:
    """A bounding box: ``box`` is ``[x1, y1, x2, y2]`` of identity ``name`` in pixels of the original ``image``.

    If ``relative`` is true, it is in 0..1 of the width and height of the image. ``label`` says what the individual does
    or is in the image ("waving"); empty if that is not known. The library does not use it; losses of your own may.
    """

    name: str
    image: str
    box: list[float]
    relative: bool = False
    label: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A checked record.

    Attributes:
        id: identifier; file and line if the record has none.
        source: one of :data:`SOURCES`.
        identities: identities with their reference photos.
        messages: the conversation. Evaluation samples end with a user turn, training samples with the answer.
        boxes: bounding boxes in the images of the messages.
        task: one of :data:`TASK_TYPES` (``"type"`` of the record); optional for training samples.
        answer: correct answer of an evaluation sample; None for training samples.
        false_answers: incorrect answers of a multiple-choice question.
        target: name of the identity whose box is the answer to a location question.
        where: file and line of the record, for messages.
        image_root: folder that the image paths are relative to, or a :class:`idavlm.data.RecordImages` that holds the
            images of the record.
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
    image_root: "Path | RecordImages | None" = None

    @property
    def is_evaluation(self) -> bool:
        """Whether the sample is to be answered and scored: it has an ``answer`` and no final assistant turn."""
        return self.answer is not None

    @property
    def reference_images(self) -> list[str]:
        """Paths of the reference photos, grouped by identity."""
        return [image for identity in self.identities for image in identity.images]

    @property
    def message_images(self) -> list[str]:
        """Paths of the images of the messages, in order: scenes if the sample has identities, else general images."""
        return [image for message in self.messages for image in message.images]

    @property
    def images(self) -> list[str]:
        """Paths of all images in the order of the encoded sample: references, then images of the messages."""
        return self.reference_images + self.message_images

    def box_of(self, name: str, image: str) -> Box:
        """Return the box of identity ``name`` in ``image``. Raises KeyError if there is none."""
        for box in self.boxes:
            if box.name == name and box.image == image:
                return box
        raise KeyError(f"{self.where or self.id}: no box of {name!r} in {image!r}.")

    def box_of_part(self, part: Part) -> Box:
        """Return the box of a box part: its own, or the entry of ``boxes`` that it refers to."""
        if part.box is not None:
            return Box(part.name, part.image, part.box, part.relative)
        return self.box_of(part.name, part.image)

    @property
    def all_boxes(self) -> list[Box]:
        """The entries of ``boxes``, and the boxes that parts of the messages have themselves."""
        parts = [part for message in self.messages for part in message.content]
        return [*self.boxes, *(self.box_of_part(part) for part in parts if part.box is not None)]

    def with_pixel_boxes(self, size_of: Callable[[str], tuple[int, int]]) -> "Sample":
        """Return the sample with all boxes in pixels; ``size_of`` returns (height, width) of an image."""

        def in_pixels(box: Box | Part) -> Box | Part:
            if not box.relative:
                return box
            height, width = size_of(box.image)
            x1, y1, x2, y2 = box.box
            return replace(box, box=[x1 * width, y1 * height, x2 * width, y2 * height], relative=False)

        if not any(box.relative for box in self.all_boxes):
            return self
        messages = [Message(message.role, [in_pixels(part) for part in message.content]) for message in self.messages]
        return replace(self, boxes=[in_pixels(box) for box in self.boxes], messages=messages)

    @property
    def target_box(self) -> Box | None:
        """Ground-truth box of a location question: the box of ``target`` in the last image; None if it is not there."""
        images = self.message_images
        found = [box for box in self.boxes if box.name == self.target and images and box.image == images[-1]]
        return found[0] if found else None
