"""From a record (a dict of JSON) to a checked :class:`Sample`; every error names file, line, field and remedy."""

import math
import re
from pathlib import Path
from typing import Any

from idavlm.data.errors import DataError
from idavlm.data.schema import PART_TYPES, ROLES, SOURCES, TASK_TYPES, Box, Identity, Message, Part, Sample

TRAINING_FIELDS = ("id", "source", "identities", "messages", "boxes", "meta")
EVALUATION_FIELDS = ("type", "answer", "false_answers", "target")
_PART_FIELDS = {"text": {"type", "text"}, "image": {"type", "image"}, "box": {"type", "name", "image"}}
_DRIVE = re.compile(r"[A-Za-z]:")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


def parse_sample(record: Any, *, where: str = "record", image_root: str | Path | None = None) -> Sample:
    """Check a record against the schema and return it as a :class:`Sample`.

    Only text is looked at: whether pictures exist, and boxes lie within them, shows when they are opened.

    Args:
        record: the dict read from JSON. Unknown fields are errors (a misspelt ``identities`` would otherwise make a
            sample without references); ``meta`` may hold anything and is left out.
        where: file and line for messages, as ``"train.jsonl:17"``.
        image_root: folder the paths stand under; kept in ``Sample.image_root``.

    Raises:
        DataError: the first thing that does not fit, of kind ``"record"``.
    """
    try:
        return _parse(record, where, Path(image_root) if image_root is not None else None)
    except _Misfit as misfit:
        raise DataError(str(misfit), where=where) from None


class _Misfit(Exception):
    """What does not fit, still without its place."""


def _parse(record: Any, where: str, image_root: Path | None) -> Sample:
    _check(record, dict, "the record", "a JSON object")
    _no_strangers(record, (*TRAINING_FIELDS, *EVALUATION_FIELDS), "the record")
    identities = [_identity(entry, f"identities[{i}]") for i, entry in enumerate(_list(record, "identities"))]
    names = [identity.name for identity in identities]
    for name in names:
        if names.count(name) > 1:
            raise _Misfit(f"identities names {name!r} {names.count(name)} times; put all their photos into one entry.")
    source = record.get("source", "identity" if identities else "general")
    if source not in SOURCES:
        raise _Misfit(f"source={source!r} is not known; choose one of {', '.join(map(repr, SOURCES))}.")
    if (source == "identity") != bool(identities):
        raise _Misfit(
            f"source={source!r}, but the record has {len(identities)} identities; records with identities are "
            "'identity', records without are 'general'."
        )
    if not isinstance(record.get("id", ""), (str, int)):
        raise _Misfit(f"id={record['id']!r} must be a string or an integer.")

    task = record.get("type")
    messages = _messages(record, evaluation=task is not None)
    images = [image for message in messages for image in message.images]
    boxes = [_box(entry, f"boxes[{i}]", images) for i, entry in enumerate(_list(record, "boxes"))]
    _no_double_boxes(boxes)
    messages = [
        Message(message.role, [_place(part, boxes, f"messages[{i}]") for part in message.content])
        for i, message in enumerate(messages)
    ]
    sample = Sample(
        id=str(record.get("id", where)),
        source=source,
        identities=identities,
        messages=messages,
        boxes=boxes,
        task=task,
        answer=record.get("answer"),
        false_answers=_list(record, "false_answers"),
        target=record.get("target"),
        where=where,
        image_root=image_root,
    )
    _check_task(record, sample)
    return sample


def _identity(entry: Any, field: str) -> Identity:
    _check(entry, dict, field, 'an object {"name", "images"}')
    _no_strangers(entry, ("name", "images"), field)
    name = _text(entry.get("name"), f"{field}.name")
    images = entry.get("images")
    if not isinstance(images, list) or not images:
        raise _Misfit(f"{field}.images={images!r} of {name!r} must be a list of at least one photo.")
    return Identity(name, [_path(image, f"{field}.images[{i}]") for i, image in enumerate(images)])


def _messages(record: dict, *, evaluation: bool) -> list[Message]:
    entries = _list(record, "messages")
    messages = [_message(entry, f"messages[{i}]") for i, entry in enumerate(entries)]
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "user" not in turns:
        raise _Misfit(f"messages has no user turn (roles: {', '.join(roles) or 'none'}); add the question.")
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise _Misfit(
                f"messages[{number + len(roles) - len(turns)}].role={role!r} where {expected!r} is due; turns go "
                "user, assistant, user, assistant ... after at most one system turn."
            )
    last = "user" if evaluation else "assistant"
    if turns[-1] != last:
        remedy = (
            'a record with "type" is for evaluation: leave out the last assistant turn, its text belongs in "answer"'
            if evaluation
            else 'a training record ends with the answer; an evaluation record needs "type" and "answer"'
        )
        raise _Misfit(f"messages ends with a turn of {turns[-1]!r}, not {last!r}; {remedy}.")
    return messages


def _message(entry: Any, field: str) -> Message:
    _check(entry, dict, field, 'an object {"role", "content"}')
    _no_strangers(entry, ("role", "content"), field)
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise _Misfit(f"{field}.role={role!r} is not known; choose one of {', '.join(map(repr, ROLES))}.")
    if isinstance(content, str):
        parts = [Part("text", text=content)]
    elif isinstance(content, list):
        parts = [_part(part, f"{field}.content[{i}]") for i, part in enumerate(content)]
    else:
        raise _Misfit(f"{field}.content={content!r} must be a string or a list of parts.")
    if role != "user":
        if any(part.type == "image" for part in parts):
            raise _Misfit(f"{field} of {role!r} has an image; only user turns have images.")
        if not any(part.type == "box" or part.text.strip() for part in parts):
            raise _Misfit(f"{field} of {role!r} has no text; give it text or leave the turn out.")
    elif not any(part.type != "text" or part.text.strip() for part in parts):
        raise _Misfit(f"{field} of 'user' is empty; give it text or an image.")
    return Message(role, parts)


def _part(entry: Any, field: str) -> Part:
    _check(entry, dict, field, 'an object with a "type"')
    kind = entry.get("type")
    if kind not in PART_TYPES:
        raise _Misfit(f"{field}.type={kind!r} is not known; choose one of {', '.join(map(repr, PART_TYPES))}.")
    _no_strangers(entry, _PART_FIELDS[kind], field)
    if kind == "text":
        _check(entry.get("text"), str, f"{field}.text", "a string")
        return Part("text", text=entry["text"])
    if kind == "image":
        return Part("image", image=_path(entry.get("image"), f"{field}.image"))
    image = _path(entry["image"], f"{field}.image") if "image" in entry else ""
    return Part("box", name=_text(entry.get("name"), f"{field}.name"), image=image)


def _box(entry: Any, field: str, images: list[str]) -> Box:
    _check(entry, dict, field, 'an object {"name", "image", "box"}')
    _no_strangers(entry, ("name", "image", "box"), field)
    name = _text(entry.get("name"), f"{field}.name")
    image = _path(entry.get("image"), f"{field}.image")
    if image not in images:
        raise _Misfit(
            f"{field}.image={image!r} is no image of the messages ({', '.join(images) or 'they have none'}); boxes "
            "belong to scenes."
        )
    box = entry.get("box")
    numbers = isinstance(box, list) and len(box) == 4
    if not numbers or any(isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) for x in box):
        raise _Misfit(f"{field}.box={box!r} of {name!r} must be four numbers [x1, y1, x2, y2] in pixels.")
    if not (box[0] < box[2] and box[1] < box[3] and box[2] > 0 and box[3] > 0):
        raise _Misfit(f"{field}.box={box} of {name!r} is empty; expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2.")
    return Box(name, image, box)


def _no_double_boxes(boxes: list[Box]) -> None:
    seen = set()
    for number, box in enumerate(boxes):
        if (box.name, box.image) in seen:
            raise _Misfit(f"boxes[{number}] is a second box of {box.name!r} in {box.image!r}; one a person and image.")
        seen.add((box.name, box.image))


def _place(part: Part, boxes: list[Box], field: str) -> Part:
    """Give a box part the image it leaves out, and make sure that there is exactly one such box."""
    if part.type != "box":
        return part
    found = [box.image for box in boxes if box.name == part.name and part.image in ("", box.image)]
    if len(found) == 1:
        return Part("box", name=part.name, image=found[0])
    if found:
        raise _Misfit(
            f'{field} has a box part of {part.name!r}, who has boxes in {", ".join(found)}; add "image" to say which.'
        )
    known = ", ".join(f"{box.name!r} in {box.image}" for box in boxes) or "none"
    place = f" in {part.image!r}" if part.image else ""
    raise _Misfit(f"{field} has a box part of {part.name!r}{place}, but boxes has no such entry (it has {known}).")


def _check_task(record: dict, sample: Sample) -> None:
    if sample.task is None:
        given = [name for name in EVALUATION_FIELDS if record.get(name) is not None]
        if given:
            raise _Misfit(f'{given[0]} belongs to evaluation records; add "type" or leave it out.')
        return
    if sample.task not in TASK_TYPES:
        raise _Misfit(f"type={sample.task!r} is not known; choose one of {', '.join(map(repr, TASK_TYPES))}.")
    _check(sample.answer, str, "answer", "a string")
    if not sample.answer.strip() and sample.task != "location":
        raise _Misfit(f"answer={sample.answer!r} of a {sample.task} record is empty; only location may leave it so.")
    for number, text in enumerate(sample.false_answers):
        _text(text, f"false_answers[{number}]")
        if text == sample.answer:
            raise _Misfit(f"false_answers[{number}]={text!r} is the right answer; leave it out.")
    if sample.target is not None:
        _text(sample.target, "target")
    if sample.task == "location" and sample.target_box is None:
        raise _Misfit(f"target={sample.target!r} of a location record has no box in the last image; add it to boxes.")


def _path(path: Any, field: str) -> str:
    """An image path that stays below its root; symbolic links are followed when it is opened."""
    _text(path, field)
    if _SCHEME.match(path):
        raise _Misfit(f"{field}={path[:80]!r} is a URL; URLs are off: download the picture and give its path.")
    if path.startswith(("/", "\\")) or _DRIVE.match(path):
        raise _Misfit(f"{field}={path!r} is absolute; give it relative to the image root.")
    if ".." in path and ".." in re.split(r"[/\\]", path):
        raise _Misfit(f"{field}={path!r} leaves the image root ('..'); move the picture below the root.")
    return path


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise _Misfit(f"{field}={value!r} must be a string that is not empty.")
    return value


def _list(record: dict, field: str) -> list:
    value = record.get(field, [])
    _check(value, list, field, "a list")
    return value


def _check(value: Any, kind: type, field: str, expected: str) -> None:
    if not isinstance(value, kind):
        raise _Misfit(f"{field} is {type(value).__name__} {str(value)[:80]!r}; expected {expected}.")


def _no_strangers(entry: dict, known: tuple | set, field: str) -> None:
    if not entry.keys() <= set(known):
        strangers = ", ".join(map(repr, sorted(map(str, entry.keys() - set(known)))))
        raise _Misfit(f"{field} has unknown fields {strangers}; known are {', '.join(sorted(known))}.")
