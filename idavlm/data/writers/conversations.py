"""Conversations of ``{"from", "value"}``: LLaVA, LLaMA-Factory's ShareGPT, Qwen-VL."""

from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.data.introductions import read_introduction
from idavlm.data.schema import Sample
from idavlm.data.writers.losses import Losses
from idavlm.data.writers.turns import BoxText, images_of_turns, text_with_placeholders, turns_of

_HUMAN = {"user": "human", "assistant": "gpt", "system": "system"}


def write_llava(sample: Sample, losses: Losses, box_text: BoxText | None) -> dict[str, Any]:
    """Write LLaVA's format: ``image`` (a path, or a list of several) and ``conversations`` with ``<image>``."""
    turns = turns_of(sample, losses, box_text)
    images = images_of_turns(turns)
    if turns[0].role == "system":
        losses.add("the system turn stays a turn, which LLaVA's own code does not expect")
    conversations = [{"from": _HUMAN[turn.role], "value": text_with_placeholders(turn)} for turn in turns]
    image = {"image": images[0] if len(images) == 1 else images} if images else {}
    return {"id": sample.id, **image, "conversations": conversations}


def write_sharegpt(sample: Sample, losses: Losses, box_text: BoxText | None) -> dict[str, Any]:
    """Write LLaMA-Factory's ShareGPT format: ``conversations``, ``images`` and ``system``."""
    turns = turns_of(sample, losses, box_text)
    record: dict[str, Any] = {"id": sample.id}
    if turns[0].role == "system":
        record["system"] = text_with_placeholders(turns.pop(0))
    record["conversations"] = [{"from": _HUMAN[turn.role], "value": text_with_placeholders(turn)} for turn in turns]
    if turns[0].role == "assistant":
        losses.add("the greeting before the first question stays, and LLaMA-Factory leaves out such records")
    return record | {"images": images_of_turns(turns)}


def write_qwen_vl(sample: Sample, losses: Losses, box_text: BoxText | None) -> dict[str, Any]:
    """Write Qwen-VL's format: ``<img>path</img>`` in the text. ``NAME is <img>path</img>`` introduces an identity."""
    turns = turns_of(sample, losses, box_text, keeps_introductions=True)
    for identity in sample.identities:
        found = read_introduction([f"{identity.name} is ", ""])
        if found is None or found.names != [identity.name]:
            losses.add("an identity stays text, because its name does not read as one")
    for image in images_of_turns(turns):
        if "<" in image or ">" in image or image != image.strip():
            raise DataError(f"the path {quote(image)} cannot stand between <img> and </img>.", where=sample.where)
    conversations = []
    for turn in turns:
        text = "".join(f"<img>{part.image}</img>" if part.type == "image" else part.text for part in turn.content)
        conversations.append({"from": turn.role, "value": text})
    return {"id": sample.id, "conversations": conversations}
