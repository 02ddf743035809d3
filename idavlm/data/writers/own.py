"""Records of the schema itself."""

from dataclasses import fields
from typing import Any

from idavlm.data.schema import Box, Part, Sample
from idavlm.data.writers.losses import Losses
from idavlm.data.writers.turns import BoxText


def write_idavlm(sample: Sample, losses: Losses, box_text: BoxText | None) -> dict[str, Any]:
    """Write a sample as a record of the schema, which holds everything: ``parse_sample`` returns the sample again."""
    record: dict[str, Any] = {"id": sample.id, "source": sample.source}
    if sample.task is not None:
        record["type"] = sample.task
    if sample.identities:
        record["identities"] = [
            {"name": identity.name, "images": list(identity.images)} for identity in sample.identities
        ]
    record["messages"] = [
        {"role": message.role, "content": [_part(part) for part in message.content]} for message in sample.messages
    ]
    if sample.boxes:
        record["boxes"] = [_box(box) for box in sample.boxes]
    if sample.is_evaluation:
        record["answer"] = sample.answer
        if sample.false_answers:
            record["false_answers"] = list(sample.false_answers)
        if sample.target is not None:
            record["target"] = sample.target
    if sample.meta is not None:
        record["meta"] = sample.meta
    return record


def _part(part: Part) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type == "image":
        return {"type": "image", "image": part.image}
    found: dict[str, Any] = {"type": "box", "image": part.image}
    found |= {"name": part.name} if part.name else {}
    if part.box is not None:
        found |= {"box": list(part.box)} | ({"relative": True} if part.relative else {})
    return found


def _box(box: Box) -> dict[str, Any]:
    """The fields of a box; those with their default are left out."""
    values = {field.name: (getattr(box, field.name), field.default) for field in fields(Box)}
    return {name: value for name, (value, default) in values.items() if value != default}
