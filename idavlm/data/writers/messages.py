"""Chat messages with images: transformers, TRL and LLaMA-Factory; and ms-swift's with boxes."""

import re
from typing import Any

from idavlm.data.schema import Part, Sample
from idavlm.data.writers.losses import Losses
from idavlm.data.writers.turns import (
    BoxText,
    answered_messages,
    check_text,
    images_of_turns,
    introduction_parts,
    note_boxes,
    note_fields,
    turns_of,
)


def write_messages(sample: Sample, losses: Losses, box_text: BoxText | None) -> dict[str, Any]:
    """Write ``messages`` of ``{"role", "content"}`` with parts ``text`` and ``image``, and ``images`` (TRL)."""
    turns = turns_of(sample, losses, box_text)
    messages = []
    for turn in turns:
        parts: list[dict[str, str]] = []
        for part in turn.content:
            if part.type == "image":
                parts.append({"type": "image"})
            elif parts and parts[-1]["type"] == "text":  # some chat templates strip or separate text parts
                parts[-1]["text"] += part.text
            else:
                parts.append({"type": "text", "text": part.text})
        messages.append({"role": turn.role, "content": parts})
    return {"id": sample.id, "messages": messages, "images": images_of_turns(turns)}


def write_ms_swift(sample: Sample, losses: Losses, box_text: BoxText | None) -> dict[str, Any]:
    """Write ms-swift's format: ``messages``, ``images`` and ``objects`` for ``<bbox>`` and ``<ref-object>``.

    The boxes of the messages stay boxes. If each of them follows a mention of its name that no other box follows, in
    the same order, these mentions become ``<ref-object>``, so that names and boxes belong together.
    """
    introduction = introduction_parts(sample)
    if introduction:
        losses.add("identities became lines of text, NAME is <image>")
    note_fields(sample, losses)
    messages, images, boxes = [], [], []
    texts: list[list[Part]] = []
    for message in answered_messages(sample, losses):
        content = list(message.content)
        if message.role == "user":
            content, introduction = introduction + content, []
        texts.append(content)
        messages.append(message.role)
        images += [part.image for part in content if part.type == "image"]
        boxes += [sample.box_of_part(part) for part in content if part.type == "box"]
    for content in texts:
        for part in content:
            check_text(part, sample)
    note_boxes(sample, boxes, losses)
    relative = {box.relative for box in boxes}
    if len(relative) > 1:
        losses.add("boxes in pixels and in 0..1 cannot be in one record")
        return write_messages(sample, Losses(), box_text)
    references = _mentions(texts, sample)
    if boxes and references is None:
        losses.add("boxes stand without their names")
    record: dict[str, Any] = {
        "id": sample.id,
        "messages": [
            {"role": role, "content": _tagged(content, place, references or {})}
            for place, (role, content) in enumerate(zip(messages, texts, strict=True))
        ],
        "images": images,
    }
    if boxes:
        objects: dict[str, Any] = {"ref": [box.name for box in boxes] if references else []}
        objects["bbox"] = [list(box.box) for box in boxes]
        objects["bbox_type"] = "norm1" if True in relative else "real"
        objects["image_id"] = [images.index(box.image) for box in boxes]
        record["objects"] = objects
    return record


def _mentions(texts: list[list[Part]], sample: Sample) -> dict[tuple[int, int], list[tuple[int, int]]] | None:
    """For each text part, start and end of the mention of each box's name; None if a box has no mention of its own.

    The mention is the last one between the box before and the box itself.
    """
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    waiting: list[tuple[int, int, str]] = []
    any_box = False
    for turn, content in enumerate(texts):
        for place, part in enumerate(content):
            if part.type == "text":
                waiting.append((turn, place, part.text))
            elif part.type == "box":
                any_box = True
                name = sample.box_of_part(part).name
                pattern = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)") if name else None
                mention = None
                for where in reversed(waiting):
                    matches = list(pattern.finditer(where[2])) if pattern else []
                    if matches:
                        mention = where[:2], matches[-1].span()
                        break
                if mention is None:
                    return None
                found.setdefault(mention[0], []).append(mention[1])
                waiting = []
    return found if any_box else None


def _tagged(content: list[Part], turn: int, references: dict[tuple[int, int], list[tuple[int, int]]]) -> str:
    pieces = []
    for place, part in enumerate(content):
        text = {"image": "<image>", "box": "<bbox>"}.get(part.type, part.text)
        for start, end in reversed(references.get((turn, place), [])):
            text = f"{text[:start]}<ref-object>{text[end:]}"
        pieces.append(text)
    return "".join(pieces)
