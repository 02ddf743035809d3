"""Turns of a sample for formats that have only texts and images: introductions and boxes become text."""

from collections.abc import Callable
from dataclasses import dataclass

from idavlm.data.errors import DataError, quote
from idavlm.data.schema import Box, Message, Part, Sample
from idavlm.data.validation.record_checks import MARKUP
from idavlm.data.writers.losses import Losses

BoxText = Callable[[Box, Sample], str]
"""Text of a box: of a box format, for the image that the box lies in."""


@dataclass(frozen=True)
class Turn:
    """A turn: its role, and its content as texts and images in order."""

    role: str
    content: list[Part]


def introduction_parts(sample: Sample) -> list[Part]:
    """The reference photos as lines ``Kate is <image>``, one for each photo."""
    parts = []
    for identity in sample.identities:
        for image in identity.images:
            parts += [Part("text", text=f"{identity.name} is "), Part("image", image=image), Part("text", text="\n")]
    return parts


def answered_messages(sample: Sample, losses: Losses) -> list[Message]:
    """The messages with the answer as last turn: formats of training data have no evaluation records."""
    if not sample.is_evaluation:
        return sample.messages
    losses.add("the answer of an evaluation record became its last turn")
    if sample.false_answers:
        losses.add("false_answers are left out")
    target = sample.target_box
    if sample.task == "location" and target is not None:
        answer = Part("box", name=target.name, image=target.image)
    else:
        answer = Part("text", text=sample.answer)
    return [*sample.messages, Message("assistant", [answer])]


def turns_of(
    sample: Sample, losses: Losses, box_text: BoxText | None, *, keeps_introductions: bool = False
) -> list[Turn]:
    """The turns with introductions before the first question and boxes as text, and note what that changes.

    Args:
        sample: the sample.
        losses: counts what the format cannot hold.
        box_text: writes a box; None if there must be none in the messages.
        keeps_introductions: whether the reader of the format finds the identities in their lines again.

    Raises:
        DataError: a text holds the placeholder of an image, or a box has to be written without ``box_text``.
    """
    introduction = introduction_parts(sample)
    if introduction and not keeps_introductions:
        losses.add("identities became lines of text, NAME is <image>")
    messages = answered_messages(sample, losses)
    parts = [part for message in messages for part in message.content if part.type == "box"]
    if parts:
        losses.add("boxes in messages became text")
    note_boxes(sample, [sample.box_of_part(part) for part in parts], losses)
    note_fields(sample, losses)
    turns = []
    for message in messages:
        content = []
        if message.role == "user":
            content, introduction = introduction, []
        for part in message.content:
            if part.type == "box":
                if box_text is None:
                    raise DataError(
                        f"the messages hold a box of {quote(part.name)}; pass the box format in which it is written.",
                        where=sample.where,
                    )
                part = Part("text", text=box_text(sample.box_of_part(part), sample))
            check_text(part, sample)
            content = [*content, part]
        turns.append(Turn(message.role, content))
    return turns


def note_fields(sample: Sample, losses: Losses) -> None:
    """Note the fields that only the schema of the library has."""
    if sample.task is not None:
        losses.add("type is left out")
    if sample.meta is not None:
        losses.add("meta is left out")


def note_boxes(sample: Sample, written: list[Box], losses: Losses) -> None:
    """Note boxes of the record that are in none of its messages."""
    names = {(box.name, box.image) for box in written}
    if any((box.name, box.image) not in names for box in sample.boxes):
        losses.add("boxes that no message holds are left out")


def check_text(part: Part, sample: Sample) -> None:
    """Raise DataError if a text would be read as the placeholder of an image or box."""
    found = MARKUP.search(part.text) if part.type == "text" else None
    if found:
        raise DataError(f"a text holds {found[0]!r}, which stands for an image; change it.", where=sample.where)


def text_with_placeholders(turn: Turn) -> str:
    """The text of a turn with ``<image>`` for each image."""
    return "".join("<image>" if part.type == "image" else part.text for part in turn.content)


def images_of_turns(turns: list[Turn]) -> list[str]:
    """Paths of the images of all turns, in order."""
    return [part.image for turn in turns for part in turn.content if part.type == "image"]
