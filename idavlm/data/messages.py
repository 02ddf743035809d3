"""Conversations as the messages of transformers, with content parts that introduce identities.

Besides ``text`` and ``image``, a user turn may hold ``{"type": "identity", "name": "Kate", "images": [...]}``:
reference photos of Kate, rendered as one line per photo. An image part with a name, ``{"type": "image", "image": ...,
"identity": "Kate"}``, is one reference photo; data sets with a column of images (TRL) use it.
"""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.data.introductions import reads_as_name
from idavlm.data.schema import ROLES, Identity, Message, Part, Sample

IMAGE_KEYS = ("image", "url", "path", "base64")
"""Keys of an image part that hold the image."""

OTHER_PARTS = ("video", "audio")
"""Parts that a processor may know, but that cannot be combined with identities."""

PART_TYPES = ("text", "image", "image_url", "identity", *OTHER_PARTS)
"""Types of the content parts of messages."""


@dataclass(frozen=True, slots=True)
class Photo:
    """An image of a conversation.

    Attributes:
        image: the image as it was passed (path, PIL image, bytes, ...).
        identity: number of the identity that it introduces; None for a scene or a general image.
        key: key of the image part, one of :data:`IMAGE_KEYS`.
        field: place in the messages, for errors.
    """

    image: Any
    identity: int | None = None
    key: str = "image"
    field: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """A message: its content as texts and photos in order, and the message as it was passed."""

    message: Mapping[str, Any]
    content: list[str | Photo]

    @property
    def introduces(self) -> bool:
        """Whether the turn holds references."""
        return any(isinstance(part, Photo) and part.identity is not None for part in self.content)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Checked messages.

    Attributes:
        turns: the messages.
        identities: names of the identities, in the order in which they are introduced.
    """

    turns: list[Turn]
    identities: list[str] = field(default_factory=list)

    @property
    def photos(self) -> list[Photo]:
        """All images, in order."""
        return [part for turn in self.turns for part in turn.content if isinstance(part, Photo)]

    @property
    def texts(self) -> Iterator[tuple[str, str]]:
        """Role and text of all text parts."""
        for turn in self.turns:
            yield from ((turn.message["role"], part) for part in turn.content if isinstance(part, str))


def is_batch(conversation: Sequence) -> bool:
    """Whether ``conversation`` is a list of conversations, as in ``apply_chat_template`` of transformers."""
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise DataError(f"messages={quote(conversation)} must be a non-empty list of messages, or of conversations.")
    return isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")


def has_identities(conversation: Any) -> bool:
    """Whether messages introduce identities."""
    for message in getattr(conversation, "messages", conversation):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and (part.get("type") == "identity" or part.get("identity") is not None):
                return True
    return False


def read_conversation(messages: Any, *, where: str = "messages") -> Conversation:
    """Check messages and return them as a :class:`Conversation`.

    Fields whose value is None count as absent, because Arrow tables fill missing fields with None.

    Args:
        messages: ``[{"role", "content"}, ...]``, where the content is a string or a list of parts.
        where: name of the argument, for errors.

    Raises:
        DataError: with the place in the messages, for the first fault.
    """
    messages = getattr(messages, "messages", messages)  # transformers.pipelines wraps them
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"{where}={quote(messages)} must be a non-empty list of messages.")
    names: list[str] = []
    turns = []
    for number, message in enumerate(messages):
        place = f"{where}[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{place} is {quote(message)}; expected a dict with 'role' and 'content'.")
        turns.append(Turn(message, _content(message, place, names)))
    return Conversation(turns, names)


def _content(message: Mapping[str, Any], place: str, names: list[str]) -> list[str | Photo]:
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, (list, tuple)):
        raise DataError(f"{place}.content={quote(content)} must be a string or a list of parts.")
    parts: list[str | Photo] = []
    has_scene = False
    for number, part in enumerate(content):
        field = f"{place}.content[{number}]"
        if isinstance(part, str):  # as in some chat templates
            parts.append(part)
            continue
        if not isinstance(part, Mapping) or "type" not in part:
            raise DataError(f'{field} is {quote(part)}; expected a dict with a "type".')
        part = {name: value for name, value in part.items() if value is not None}
        kind = part.get("type")
        if kind not in PART_TYPES:
            known = ", ".join(map(repr, PART_TYPES))
            raise DataError(f"{field}.type={kind!r} is not known; choose one of {known}.")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise DataError(f"{field}.text={quote(part.get('text'))} must be a string.")
            parts.append(part["text"])
        elif kind in OTHER_PARTS:
            parts.append(Photo(None, key=kind, field=field))
        else:
            photos = _photos(part, kind, field, message["role"], names)
            is_reference = photos[0].identity is not None
            if is_reference and has_scene:
                raise DataError(
                    f"{field} introduces {names[photos[0].identity]!r} after an image of the same turn; put identities "
                    "before the images that are asked about."
                )
            has_scene |= not is_reference
            parts += photos
    return parts


def _photos(part: dict[str, Any], kind: str, field: str, role: str, names: list[str]) -> list[Photo]:
    """The images of an image part or identity part. New names are appended to ``names``."""
    if kind == "image_url":
        url = part.get("image_url")
        return [Photo(url.get("url") if isinstance(url, Mapping) else url, key="url", field=field)]
    name = part.get("name") if kind == "identity" else part.get("identity")
    if kind == "identity" or name is not None:
        if role != "user":
            raise DataError(
                f"{field} introduces {quote(name)} in a turn of {role!r}; introduce identities in user turns."
            )
        check_name(name, f"{field}.{'name' if kind == 'identity' else 'identity'}")
    if kind == "image":
        key = next((key for key in IMAGE_KEYS if key in part), None)
        identity = None if name is None else _number_of(name, names, field, may_repeat=True)
        return [Photo(None if key is None else part[key], identity, key or "image", field)]
    unknown = part.keys() - {"type", "name", "images"}
    if unknown:
        raise DataError(
            f"{field} has unknown fields {', '.join(sorted(map(repr, unknown)))}; allowed are name, images."
        )
    images = part.get("images")
    if not isinstance(images, (list, tuple)) or not images:
        raise DataError(f"{field}.images={quote(images)} of {quote(name)} must be a list of at least one photo.")
    identity = _number_of(name, names, field, may_repeat=False)
    return [Photo(image, identity, field=f"{field}.images[{number}]") for number, image in enumerate(images)]


def conversation_to_sample(conversation: Conversation, images: Sequence[Any], *, name: str = "messages") -> Sample:
    """Return checked messages as a sample, whose references come first, in the order in which they are introduced.

    Args:
        conversation: the messages.
        images: the loaded images of ``conversation.photos``.
        name: ``id`` of the sample.

    Raises:
        DataError: what a sample cannot hold: another role, an image outside of a user turn, videos.
    """
    loaded = iter(images)
    photos: list[list[Any]] = [[] for _ in conversation.identities]
    messages = []
    for number, turn in enumerate(conversation.turns):
        role, parts = turn.message["role"], []
        if role not in ROLES:
            known = ", ".join(map(repr, ROLES))
            raise DataError(f"{name}[{number}].role={quote(role)} is not known; choose one of {known}.")
        for part in turn.content:
            if isinstance(part, str):
                parts.append(Part("text", text=part))
                continue
            if part.key in OTHER_PARTS or role != "user":
                kind = part.key if part.key in OTHER_PARTS else "image"
                raise DataError(f"{part.field} is a {kind} in a turn of {role!r}; only user turns have images.")
            image = next(loaded)
            if part.identity is None:
                parts.append(Part("image", image=image))
            else:
                photos[part.identity].append(image)
        messages.append(Message(role, parts))
    identities = [Identity(*pair) for pair in zip(conversation.identities, photos, strict=True)]
    return Sample(name, "identity" if identities else "general", identities, messages)


def check_name(name: Any, field: str) -> None:
    """Check the name of an identity: one line of text without white space around it, which reads as a name.

    Raises:
        DataError: with ``field``, the name and the remedy.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"{field}={quote(name)} must be a non-empty string without NUL characters.")
    if name != name.strip() or len(name.splitlines()) > 1:
        raise DataError(f"{field}={quote(name)} must be one line without white space at its ends.")
    if not reads_as_name(name):
        raise DataError(f"{field}={quote(name)} does not name anybody; use another name.")


def _number_of(name: str, names: list[str], field: str, *, may_repeat: bool) -> int:
    """Number of the identity ``name``; a new name is appended to ``names``."""
    if name in names and may_repeat:
        return names.index(name)
    same = next((other for other in names if _folded(other) == _folded(name)), None)
    if same == name:
        raise DataError(f"{field} is a second part of {quote(name)}; put all its photos into one part.")
    if same is not None:
        raise DataError(
            f"{field} introduces {quote(name)}, but there is {quote(same)} already; use names that differ clearly."
        )
    names.append(name)
    return len(names) - 1


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def sample_to_messages(sample: Sample, box_text: Callable[[Part], str] | None = None) -> list[dict[str, Any]]:
    """Return the messages of a sample. The identities are parts of the first user turn, before its other parts.

    Args:
        sample: a sample. Image paths stay as they are, relative to its ``image_root``.
        box_text: function from a box part to its text. Needed for samples with box parts.

    Raises:
        ValueError: the sample has box parts, but there is no ``box_text``.
    """
    identities = [
        {"type": "identity", "name": identity.name, "images": list(identity.images)} for identity in sample.identities
    ]
    messages = []
    for message in sample.messages:
        content = []
        if message.role == "user":
            content, identities = identities, []
        for part in message.content:
            if part.type == "image":
                content.append({"type": "image", "image": part.image})
                continue
            if part.type == "box" and box_text is None:
                raise ValueError(
                    f"sample {sample.id!r} has a box of {part.name!r} in its messages; pass box_text, which writes it, "
                    "or use encode() of the processor."
                )
            text = box_text(part) if part.type == "box" else part.text
            if content and content[-1]["type"] == "text":  # some chat templates strip or separate text parts
                content[-1]["text"] += text
            else:
                content.append({"type": "text", "text": text})
        messages.append({"role": message.role, "content": content})
    return messages


def conversation_of_text(named: list[tuple[str, list]], images: list, names: list[str | None]) -> Conversation:
    """The references that were passed, and the images of a text, ``names`` of which are references."""
    identities = list(dict.fromkeys([*(name for name, _ in named), *(name for name in names if name is not None)]))
    photos = [
        Photo(photo, identities.index(name), field=f"identities[{quote(name)}][{number}]")
        for name, of_name in named
        for number, photo in enumerate(of_name)
    ]
    photos += [
        Photo(image, None if name is None else identities.index(name))
        for image, name in zip(images, names, strict=True)
    ]
    return Conversation([Turn({"role": "user"}, photos)], identities)


def read_identities(identities: Any, num_rows: int) -> list[list[tuple[str, list]]]:
    """Names and photos of each text, from the argument ``identities``."""
    if identities is None:
        return [[] for _ in range(num_rows)]
    is_one = isinstance(identities, Mapping) or (
        isinstance(identities, (list, tuple)) and all(_is_identity(entry) for entry in identities) and num_rows == 1
    )
    rows = [identities] if is_one else identities
    if not isinstance(rows, (list, tuple)) or len(rows) != num_rows:
        raise DataError(
            f"identities={quote(identities)} do not fit to {num_rows} texts; pass a list of identities, or a dict of "
            "names and photos, for each text."
        )
    return [_identities_of(row, "identities" if is_one else f"identities[{n}]") for n, row in enumerate(rows)]


def _is_identity(entry: Any) -> bool:
    return isinstance(entry, Mapping) and set(entry) <= {"type", "name", "images"} and "name" in entry


def _identities_of(row: Any, field: str) -> list[tuple[str, list]]:
    if isinstance(row, Mapping):
        row = [
            {"name": name, "images": photos if isinstance(photos, (list, tuple)) else [photos]}
            for name, photos in row.items()
        ]
    parts = [{"type": "identity", **entry} if isinstance(entry, Mapping) else entry for entry in row or ()]
    if not parts:
        return []
    read = read_conversation([{"role": "user", "content": parts}], where=field)
    for entry in read.photos:
        if entry.identity is None:
            raise DataError(f"{field}={quote(row)} must hold identities only: {{'name', 'images'}}.")
    of_identity = [[photo.image for photo in read.photos if photo.identity == n] for n in range(len(read.identities))]
    return list(zip(read.identities, of_identity, strict=True))


def images_of_texts(images: Any, counts: list[int]) -> list[list]:
    """Split the images among texts with ``counts`` placeholders."""
    images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
    if any(isinstance(entry, (list, tuple)) for entry in images):
        rows = [list(entry or ()) for entry in images]
        found = [len(row) for row in rows]
    else:
        rows, rest = [], list(images)
        for count in counts:
            rows.append(rest[:count])
            rest = rest[count:]
        found = [len(row) for row in rows] or [0]
        found[-1] += len(rest)
    if found != (counts or [0]):
        raise DataError(
            f"the texts have {counts} image placeholders, but there are {found} images for them; the numbers must be "
            "equal.",
            kind="placeholders",
        )
    return rows
