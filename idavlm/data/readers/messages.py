"""Chat messages with images: transformers, TRL, OpenAI, LLaMA-Factory; and ms-swift's with boxes."""

import re
from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.data.readers.turns import (
    Fields,
    check_placeholders,
    image_of_number,
    images_of,
    path_of,
    text_of,
)

PLACEHOLDER = "<image>"

_IMAGE_KEYS = ("image", "url", "path")
_SWIFT_TAG = re.compile(r"(<image>|<ref-object>|<bbox>)")
_BOX_TYPES = ("real", "norm1")


def read_messages(record: Any, where: str) -> dict[str, Any]:
    """Read ``messages`` of ``{"role", "content"}``, or ``prompt`` and ``completion`` (TRL), with ``images``.

    A content is a string, in which ``<image>`` stands for the next image of ``images`` (or ``image``), or a list of
    parts: ``text``, ``image`` (the next image of ``images``, unless it names one itself), ``image_url``, and the
    identities of :mod:`idavlm.data.messages`. If nothing stands for the images, they precede the text of the first user
    turn, as in TRL and ms-swift. ``prompt`` and ``completion`` may be strings.
    """
    fields = Fields(record if isinstance(record, dict) else {}, where)
    return _read(fields, {})


def read_ms_swift(record: Any, where: str) -> dict[str, Any]:
    """Read ms-swift's format: ``messages`` with ``images``, and ``objects`` for ``<ref-object>`` and ``<bbox>``.

    ``objects.ref`` and ``objects.bbox`` fill their placeholders in order. A box is in pixels of the original image, or
    in 0..1 of its width and height (``"bbox_type": "norm1"``), and lies in image ``objects.image_id`` (by default 0).
    The processor writes it in its box format. If there are as many references as boxes, they belong together in order,
    and the box of an identity supervises the identity map, too.
    """
    fields = Fields(record if isinstance(record, dict) else {}, where)
    return _read(fields, _objects(fields))


def _objects(fields: Fields) -> dict[str, list]:
    """Check ``objects``. Return what fills each tag: references, and pairs of the reference of a box and its part."""
    objects = fields.take("objects")
    if objects is None:
        return {"<ref-object>": [], "<bbox>": []}
    if not isinstance(objects, dict):
        raise DataError(
            f"objects is {type(objects).__name__} {quote(objects)}; expected {{'ref', 'bbox'}}.", where=fields.where
        )
    fields.part(objects, "objects", ("ref", "bbox", "bbox_type", "image_id"))
    lists = {name: [] if objects.get(name) is None else objects[name] for name in ("ref", "bbox", "image_id")}
    for name, value in lists.items():
        if not isinstance(value, list):
            raise DataError(f"objects.{name}={quote(value)} must be a list.", where=fields.where)
    references = [text_of(name, f"objects.ref[{i}]", fields.where) for i, name in enumerate(lists["ref"])]
    kind = objects.get("bbox_type", "real") or "real"
    if kind not in _BOX_TYPES:
        raise DataError(
            f"objects.bbox_type={quote(kind)} is not known; choose one of {', '.join(map(repr, _BOX_TYPES))}.",
            where=fields.where,
        )
    numbers = lists["image_id"] or [0] * len(lists["bbox"])
    if len(numbers) != len(lists["bbox"]):
        raise DataError(
            f"objects.image_id has {len(numbers)} entries for {len(lists['bbox'])} boxes; pass one per box.",
            where=fields.where,
        )
    names = references if len(references) == len(numbers) else [""] * len(numbers)
    boxes = []
    for place, (box, number, name) in enumerate(zip(lists["bbox"], numbers, names, strict=True)):
        if not isinstance(box, list) or len(box) != 4:
            raise DataError(
                f"objects.bbox[{place}]={quote(box)} must be four numbers [x1, y1, x2, y2]; points are not supported.",
                where=fields.where,
            )
        part = {"type": "box", "image": number, "box": box} | ({"relative": True} if kind == "norm1" else {})
        boxes.append((name, part))
    return {"<ref-object>": references, "<bbox>": boxes}


def _read(fields: Fields, objects: dict[str, list]) -> dict[str, Any]:
    turns = _turns(fields)
    images = fields.images("images", "image")
    identities: dict[str, list[str]] = {}
    tag = _SWIFT_TAG if objects else re.compile(f"({PLACEHOLDER})")
    messages, waiting = [], []  # the parts that wait for an image
    filled = {name: iter(values) for name, values in objects.items()}
    counts = dict.fromkeys(objects, 0)
    for number, (role, content) in enumerate(turns):
        parts: list[dict[str, Any]] = []
        messages.append({"role": role, "content": parts})
        if isinstance(content, list):
            for place, part in enumerate(content):
                field = f"messages[{number}].content[{place}]"
                parts += _part(part, field, fields, waiting, identities)
            continue
        for piece in tag.split(text_of(content, f"messages[{number}].content", fields.where)):
            if piece == PLACEHOLDER:
                parts.append({"type": "image"})
                waiting.append((parts[-1], None))
            elif piece in objects:
                counts[piece] += 1
                value = next(filled[piece], None)
                if value is not None:
                    parts.append({"type": "text", "text": value} if piece == "<ref-object>" else value[1])
            elif piece:
                parts.append({"type": "text", "text": piece})
    for name, count in counts.items():
        if count != len(objects[name]):
            field = {"<ref-object>": "objects.ref", "<bbox>": "objects.bbox"}[name]
            raise DataError(
                f"the text has {count} {name} but {field!r} has {len(objects[name])} entries; the numbers must be "
                "equal.",
                where=fields.where,
                kind="placeholders",
            )
    _fill(messages, waiting, images, identities, fields.where)
    _place_boxes(fields, messages, objects.get("<bbox>", []), identities)
    return fields.new_record(messages, [{"name": name, "images": photos} for name, photos in identities.items()])


def _turns(fields: Fields) -> list[tuple[str, Any]]:
    if fields.record.get("prompt") is None and fields.record.get("completion") is None:
        turns = fields.turns("messages", "role", "content")
    else:
        turns = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            value = fields.take(name)
            if isinstance(value, str):
                turns.append((role, value))
            elif value is not None:
                turns += fields.turns(name, "role", "content")
    system = fields.text("system")
    return [("system", system), *turns] if system else turns


def _part(
    part: Any, field: str, fields: Fields, waiting: list[tuple[dict, str | None]], identities: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Return a part as parts of the schema. An image that is not named waits for one of ``images``."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        fields.part(part, field, ("type", "text"))
        return [{"type": "text", "text": text_of(part.get("text"), f"{field}.text", fields.where)}]
    if kind == "image_url":
        fields.part(part, field, ("type", "image_url"))
        url = part.get("image_url")
        if isinstance(url, dict):
            fields.part(url, f"{field}.image_url", ("url", "detail"))  # "detail" is for a server
            url = url.get("url")
        return [{"type": "image", "image": text_of(url, f"{field}.image_url.url", fields.where)}]
    if kind == "identity":
        fields.part(part, field, ("type", "name", "images"))
        name, photos = text_of(part.get("name"), f"{field}.name", fields.where), part.get("images")
        if not isinstance(photos, list) or not photos:
            raise DataError(f"{field}.images={quote(photos)} must be a list of at least one photo.", where=fields.where)
        identities.setdefault(name, []).extend(path_of(photo, f"{field}.images", fields.where) for photo in photos)
        return []
    if kind != "image":
        known = ", ".join(map(repr, ("text", "image", "image_url", "identity")))
        raise DataError(f"{field}.type={quote(kind)} is not known; choose one of {known}.", where=fields.where)
    fields.part(part, field, ("type", "identity", *_IMAGE_KEYS))
    named = [part[key] for key in _IMAGE_KEYS if part.get(key) not in (None, "")]
    if len(named) > 1:
        raise DataError(f"{field} names {len(named)} images; keep one of {', '.join(_IMAGE_KEYS)}.", where=fields.where)
    name = part.get("identity")
    if name is not None:
        name = text_of(name, f"{field}.identity", fields.where)
    found = {"type": "image", "image": path_of(named[0], field, fields.where)} if named else {"type": "image"}
    if not named:
        waiting.append((found, name))
    elif name is not None:
        identities.setdefault(name, []).append(found["image"])
    return [found] if name is None else []


def _fill(
    messages: list[dict],
    waiting: list[tuple[dict, str | None]],
    images: list[str],
    identities: dict[str, list[str]],
    where: str,
) -> None:
    """Give each waiting part its image. Images that nothing waits for precede the first user turn."""
    if not waiting:
        first = next((message for message in messages if message["role"] == "user"), None)
        if images and first is not None:
            first["content"][:0] = [{"type": "image", "image": image} for image in images]
        return
    check_placeholders(len(waiting), images, PLACEHOLDER, "images", where)
    for (part, name), image in zip(waiting, images, strict=True):
        if name is None:
            part["image"] = image
        else:
            identities.setdefault(name, []).append(image)


def _place_boxes(
    fields: Fields, messages: list[dict], boxes: list[tuple[str, dict]], identities: dict[str, list[str]]
) -> None:
    """Name the image of each box part. The boxes of identities become entries of ``boxes``, too."""
    images = images_of(messages)
    given = fields.record.get("identities")
    names = [entry.get("name") for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []
    found: list[dict[str, Any]] = []
    for place, (name, part) in enumerate(boxes):
        part["image"] = image_of_number(part["image"], images, f"objects.image_id[{place}]", fields.where)
        entry = {"name": name, **{key: value for key, value in part.items() if key != "type"}}
        if (name in identities or name in names) and entry not in found:
            found.append(entry)
    others = fields.record.get("boxes") or []
    if found and isinstance(others, list):
        fields.record = {**fields.record, "boxes": [*others, *found]}
