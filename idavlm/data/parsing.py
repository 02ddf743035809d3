"""Validation of records: a JSON object becomes a :class:`Sample`, or an error with file, line, field and remedy."""

import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from idavlm.data.errors import DataError, quote, shorten
from idavlm.data.schema import PART_TYPES, ROLES, SOURCES, TASK_TYPES, Box, Identity, Message, Part, Sample
from idavlm.utils.answer_parsing import says_absent

if TYPE_CHECKING:
    from idavlm.data.images import RecordImages

FIELDS = ("id", "source", "type", "identities", "messages", "boxes", "meta")
"""Fields of every record."""

EVALUATION_FIELDS = ("answer", "false_answers", "target")
"""Fields of evaluation records only."""

MAX_COORDINATE = 2**31
"""Limit on the coordinates of a box. No image format has more pixels in a row or column."""

_PART_FIELDS = {
    "text": {"type", "text"},
    "image": {"type", "image"},
    "box": {"type", "name", "image", "box", "relative"},
}
_DRIVE = re.compile(r"[A-Za-z]:")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


def parse_sample(
    record: Any,
    *,
    where: str = "record",
    image_root: "str | Path | RecordImages | None" = None,
    prompt: bool = False,
) -> Sample:
    """Check a record against the schema and return it as a :class:`Sample`.

    A record with ``"answer"`` is an evaluation record: its messages end with a user turn, and ``"type"`` names the
    task. Any other record is a training record: its messages end with an assistant turn, and ``"type"`` is optional.
    With ``prompt=True``, the record is a question to ask: its messages end with a user turn, and no answer is known.

    Image files are not opened. Missing files are reported when the sample is encoded.

    Args:
        record: the object read from JSON. Unknown fields are errors, because a misspelt ``identities`` would otherwise
            produce a sample without references. So are the fields that a reader lists in ``unused_fields``. ``meta``
            may hold anything and is ignored.
        where: file and line for messages, as ``"train.jsonl:17"``.
        image_root: folder that the image paths are relative to, or the images of the record; stored in
            ``Sample.image_root``. URLs are errors, unless it is a :class:`idavlm.data.RecordImages` that allows them.
        prompt: whether the record is a question without an answer.

    Raises:
        DataError: of kind ``"record"``, for the first field that violates the schema.
    """
    root = Path(image_root) if isinstance(image_root, str) else image_root
    try:
        return _parse(record, where, root, prompt, _Paths(getattr(root, "allow_urls", False)))
    except DataError as error:
        raise error.at(where) from None


def _parse(record: Any, where: str, image_root: "Path | RecordImages | None", prompt: bool, paths: "_Paths") -> Sample:
    _check(record, dict, "the record", "a JSON object")
    unused = record.get("unused_fields")
    if unused:
        raise DataError(
            f"the reader does not use the fields {shorten(', '.join(map(repr, unused)))}; remove them, choose the "
            "reader of the format, or let RecordDataset count them as warnings with unused_fields='warn'."
        )
    _check_fields(record, (*FIELDS, *EVALUATION_FIELDS, "unused_fields"), "the record")
    identities = [_identity(entry, f"identities[{i}]", paths) for i, entry in enumerate(_list(record, "identities"))]
    names = [identity.name for identity in identities]
    for name, count in Counter(unicodedata.normalize("NFC", name.strip()) for name in names).items():
        if count > 1:
            raise DataError(f"identities contains {quote(name)} {count} times; merge its photos into one entry.")
    source = record.get("source", "identity" if identities else "general")
    _check_choice(source, SOURCES, "source")
    if (source == "identity") != bool(identities):
        raise DataError(
            f"source={source!r}, but the record has {len(identities)} identities; use 'identity' for records with "
            "identities and 'general' for records without, or omit source."
        )
    identifier = _id(record.get("id", where))

    messages = _messages(record, paths, is_evaluation=record.get("answer") is not None, prompt=prompt)
    images = dict.fromkeys(image for message in messages for image in message.images)
    spellings = _spellings(names)
    boxes = [_box(entry, f"boxes[{i}]", images, spellings, paths) for i, entry in enumerate(_list(record, "boxes"))]
    images_of_name: dict[str, dict[str, None]] = defaultdict(dict)
    for number, box in enumerate(boxes):
        if box.image in images_of_name[box.name]:
            raise DataError(
                f"boxes[{number}] is a second box of {quote(box.name)} in {quote(box.image)}; keep one box per name "
                "and image."
            )
        images_of_name[box.name][box.image] = None
    spellings = _spellings([*images_of_name, *names])
    messages = [
        Message(
            message.role,
            [_resolve_box_part(part, images, images_of_name, spellings, f"messages[{i}]") for part in message.content],
        )
        for i, message in enumerate(messages)
    ]
    target = record.get("target")
    sample = Sample(
        id=identifier,
        source=source,
        identities=identities,
        messages=messages,
        boxes=boxes,
        task=record.get("type"),
        answer=record.get("answer"),
        false_answers=_list(record, "false_answers"),
        target=_known_name(target, spellings, "target") if isinstance(target, str) else target,
        where=where,
        image_root=image_root,
    )
    _check_task(record, sample)
    return sample


def _id(value: Any) -> str:
    if isinstance(value, str):
        return _unicode(value, "id")
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise DataError(f"id={quote(value)} must be a string or an integer of at most 64 bits.")
    return str(value)


def _identity(entry: Any, field: str, paths: "_Paths") -> Identity:
    _check(entry, dict, field, 'an object {"name", "images"}')
    _check_fields(entry, ("name", "images"), field)
    name = _text(entry.get("name"), f"{field}.name")
    images = entry.get("images")
    if not isinstance(images, list) or not images:
        raise DataError(f"{field}.images={quote(images)} of {quote(name)} must be a list of at least one photo.")
    return Identity(name, [paths.check(image, f"{field}.images[{i}]") for i, image in enumerate(images)])


def _messages(record: dict, paths: "_Paths", *, is_evaluation: bool, prompt: bool) -> list[Message]:
    entries = _list(record, "messages")
    messages = [_message(entry, f"messages[{i}]", paths) for i, entry in enumerate(entries)]
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[:2] == ["assistant", "user"]:  # a greeting, as in ShareGPT
        turns = turns[1:]
    if "user" not in turns:
        raise DataError(f"messages has no user turn (roles: {shorten(', '.join(roles)) or 'none'}); add the question.")
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise DataError(
                f"messages[{number + len(roles) - len(turns)}].role={role!r}, expected {expected!r}; after at most one "
                "system turn and one greeting of the assistant, user and assistant turns alternate."
            )
    last = "user" if is_evaluation or prompt else "assistant"
    if turns[-1] != last:
        remedy = (
            'a record with "answer" is an evaluation record: remove the last assistant turn'
            if is_evaluation
            else "a prompt ends with the question: remove the last assistant turn"
            if prompt
            else 'a training record ends with the answer of the assistant; an evaluation record needs "answer"'
        )
        raise DataError(f"messages ends with a turn of {turns[-1]!r}, expected {last!r}; {remedy}.")
    return messages


def _message(entry: Any, field: str, paths: "_Paths") -> Message:
    _check(entry, dict, field, 'an object {"role", "content"}')
    _check_fields(entry, ("role", "content"), field)
    role, content = entry.get("role"), entry.get("content")
    _check_choice(role, ROLES, f"{field}.role")
    if isinstance(content, str):
        parts = [Part("text", text=_unicode(content, f"{field}.content"))]
    elif isinstance(content, list):
        parts = [_part(part, f"{field}.content[{i}]", paths) for i, part in enumerate(content)]
    else:
        raise DataError(f"{field}.content={quote(content)} must be a string or a list of parts.")
    if role != "user":
        if any(part.type == "image" for part in parts):
            raise DataError(f"{field} of {role!r} has an image; only user turns have images.")
        if not any(part.type == "box" or part.text.strip() for part in parts):
            raise DataError(f"{field} of {role!r} has no text; add text or remove the turn.")
    elif not any(part.type != "text" or part.text.strip() for part in parts):
        raise DataError(f"{field} of 'user' is empty; add text or an image.")
    return Message(role, parts)


def _part(entry: Any, field: str, paths: "_Paths") -> Part:
    _check(entry, dict, field, 'an object with a "type"')
    kind = entry.get("type")
    _check_choice(kind, PART_TYPES, f"{field}.type")
    _check_fields(entry, _PART_FIELDS[kind], field)
    if kind == "text":
        _check(entry.get("text"), str, f"{field}.text", "a string")
        return Part("text", text=_unicode(entry["text"], f"{field}.text"))
    if kind == "image":
        return Part("image", image=paths.check(entry.get("image"), f"{field}.image"))
    image = paths.check(entry["image"], f"{field}.image") if "image" in entry else ""
    if entry.get("box") is None:
        return Part("box", name=_text(entry.get("name"), f"{field}.name"), image=image)
    name = _text(entry["name"], f"{field}.name") if entry.get("name") is not None else ""
    box, relative = _coordinates(entry, field, name)
    return Part("box", name=name, image=image, box=box, relative=relative)


def _box(entry: Any, field: str, images: dict[str, None], spellings: dict[str, str], paths: "_Paths") -> Box:
    _check(entry, dict, field, 'an object {"name", "image", "box"}')
    _check_fields(entry, ("name", "image", "box", "relative", "label"), field)
    name = _known_name(_text(entry.get("name"), f"{field}.name"), spellings, f"{field}.name")
    image = paths.check(entry.get("image"), f"{field}.image")
    if image not in images:
        raise DataError(
            f"{field}.image={quote(image)} is not an image of the messages "
            f"({shorten(', '.join(images)) or 'they have none'}); boxes are for scenes, not for reference photos."
        )
    label = _text(entry["label"], f"{field}.label") if "label" in entry else ""
    return Box(name, image, *_coordinates(entry, field, name), label)


def _coordinates(entry: dict, field: str, name: str) -> tuple[list[float], bool]:
    """Check ``box`` and ``relative`` of a box or box part."""
    box, relative = entry.get("box"), entry.get("relative", False)
    if not isinstance(relative, bool):
        raise DataError(f"{field}.relative={quote(relative)} must be true or false.")
    largest = 1 if relative else MAX_COORDINATE
    if not isinstance(box, list) or len(box) != 4 or not all(_is_coordinate(value, largest) for value in box):
        unit = "0..1 of width and height" if relative else f"pixels, each at most {MAX_COORDINATE}"
        raise DataError(f"{field}.box={quote(box)} of {quote(name)} must be four numbers [x1, y1, x2, y2] in {unit}.")
    x1, y1, x2, y2 = np.array(box, np.float32).tolist()  # the precision of encoded boxes
    if not (x1 < x2 and y1 < y2 and x2 > 0 and y2 > 0):
        raise DataError(
            f"{field}.box={box} of {quote(name)} is empty in 32-bit precision; expected [x1, y1, x2, y2] with x1 < x2 "
            "and y1 < y2."
        )
    return box, relative


def _spellings(names: list[str]) -> dict[str, str]:
    """The names of a record by what they have in common with other spellings of them."""
    return {_folded(name): name for name in names} | {unicodedata.normalize("NFC", name): name for name in names}


def _known_name(name: str, spellings: dict[str, str], field: str) -> str:
    """Return the record's spelling of ``name``; ``name`` itself if it is unlike all names of the record.

    NFC and NFD spell the same name. A difference only in case or white space is a mistake.
    """
    composed = unicodedata.normalize("NFC", name)
    known = spellings.get(composed, spellings.get(_folded(name), name))
    if unicodedata.normalize("NFC", known) != composed:
        raise DataError(f"{field}={quote(name)} is nearly the name {quote(known)}; write both alike.")
    return known


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def _is_coordinate(value: Any, largest: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= largest


def _resolve_box_part(
    part: Part,
    images: dict[str, None],
    images_of_name: dict[str, dict[str, None]],
    spellings: dict[str, str],
    field: str,
) -> Part:
    """Complete a box part with the image of its box. Exactly one box must match; other parts are returned unchanged."""
    if part.type != "box":
        return part
    if part.box is not None:
        image = part.image or (next(iter(images)) if len(images) == 1 else "")
        if image not in images:
            raise DataError(
                f"{field} has a box part with a box in {quote(image)}, which is not an image of the messages "
                f'({shorten(", ".join(images)) or "they have none"}); name its "image".'
            )
        return replace(part, image=image)
    name = _known_name(part.name, spellings, f"{field} has a box part whose name")
    images = images_of_name.get(name, {})
    if part.image in images:
        return Part("box", name=name, image=part.image)
    if len(images) == 1 and not part.image:
        return Part("box", name=name, image=next(iter(images)))
    if images and not part.image:
        raise DataError(
            f"{field} has a box part of {quote(part.name)}, which has boxes in several images "
            f'({shorten(", ".join(images))}); add "image" to the part.'
        )
    existing = ", ".join(f"{name!r} in {image}" for name, images in images_of_name.items() for image in images)
    image = f" in {quote(part.image)}" if part.image else ""
    raise DataError(
        f"{field} has a box part of {quote(part.name)}{image}, but boxes has no such entry (it has "
        f"{shorten(existing) or 'none'}); add one."
    )


def _check_task(record: dict, sample: Sample) -> None:
    if sample.task is not None:
        _check_choice(sample.task, TASK_TYPES, "type")
    if sample.is_evaluation and any(box.relative for box in sample.boxes):
        raise DataError('boxes of an evaluation record are in pixels; convert those with "relative": true.')
    if not sample.is_evaluation:
        for name in EVALUATION_FIELDS:
            if record.get(name) is not None:
                raise DataError(
                    f'{name} is a field of evaluation records, but the record has no "answer"; add it or remove {name}.'
                )
        return
    if sample.task is None:
        raise DataError(
            'a record with "answer" is an evaluation record and needs "type"; choose one of '
            f"{', '.join(map(repr, TASK_TYPES))}."
        )
    _check(sample.answer, str, "answer", "a string")
    _unicode(sample.answer, "answer")
    if not sample.answer.strip() and sample.task != "location":
        raise DataError(
            f"answer={quote(sample.answer)} of a {sample.task} record is empty; only location records may have no text."
        )
    for number, text in enumerate(sample.false_answers):
        _text(text, f"false_answers[{number}]")
        if text == sample.answer:
            raise DataError(f"false_answers[{number}]={quote(text)} equals the correct answer; remove it.")
    if sample.target is not None:
        _text(sample.target, "target")
    is_absent = sample.target is not None and bool(sample.message_images) and says_absent(sample.answer)
    if sample.task == "location" and sample.target_box is None and not is_absent:
        raise DataError(
            f"target={quote(sample.target)} of a location record has no box in the last image; add it to boxes, or set "
            'answer to "not here" if the target is not in the image.'
        )
    if sample.task == "location" and sample.target_box is not None and says_absent(sample.answer):
        raise DataError(
            f"answer={quote(sample.answer)} says that target={quote(sample.target)} is not in the last image, but "
            "boxes has its box; remove one of them."
        )


@dataclass(frozen=True)
class _Paths:
    """Checks the paths of images."""

    allow_urls: bool

    def check(self, path: Any, field: str) -> str:
        """Check that a path does not leave the image root. Symbolic links are checked when the file is opened."""
        _text(path, field)
        if _SCHEME.match(path):
            if self.allow_urls:
                return path
            raise DataError(
                f"{field}={quote(path)} is a URL; URLs are not supported here: download the image and use its path, "
                "or pass allow_urls=True to RecordDataset."
            )
        if path.startswith(("/", "\\")) or _DRIVE.match(path):
            raise DataError(f"{field}={quote(path)} is absolute; use a path relative to the image root.")
        if ".." in path and ".." in re.split(r"[/\\]", path):
            raise DataError(f"{field}={quote(path)} leaves the image root ('..'); move the image below the root.")
        return path


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise DataError(f"{field}={quote(value)} must be a non-empty string without NUL characters.")
    return _unicode(value, field)


def _unicode(text: str, field: str) -> str:
    """Check that a text can be encoded. JSON may hold one half of a surrogate pair, which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{field}={quote(text)} is not valid Unicode: character {error.start} is half of a surrogate pair; remove "
            "it."
        ) from None
    return text


def _list(record: dict, field: str) -> list:
    value = record.get(field, [])
    _check(value, list, field, "a list")
    return value


def _check_choice(value: Any, choices: tuple[str, ...], field: str) -> None:
    if value not in choices:
        raise DataError(f"{field}={quote(value)} is not known; choose one of {', '.join(map(repr, choices))}.")


def _check(value: Any, kind: type, field: str, expected: str) -> None:
    if not isinstance(value, kind):
        raise DataError(f"{field} is {type(value).__name__} {quote(value)}; expected {expected}.")


def _check_fields(entry: dict, allowed: tuple | set, field: str) -> None:
    unknown = entry.keys() - set(allowed)
    if unknown:
        names = shorten(", ".join(sorted(map(repr, map(str, unknown)))))
        raise DataError(f"{field} has unknown fields {names}; allowed are {', '.join(sorted(allowed))}.")
