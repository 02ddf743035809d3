"""What IDA-VLM's scripts share (``ID_reference_data``): names, box text, mirrored crops, templates. To compare.

The rules are reproduced with their mistakes: two people may share a name, boxes are in 0..1000 where Qwen-VL uses
0..999, and a reference holds the pixels of the scene. What is not reproduced is chance without a seed.
"""

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Any

from idavlm.datasets.tuning.annotations import check_unicode

NAMES = (
    *("James", "John", "Robert", "Michael", "William", "David", "Richard", "Joseph", "Thomas", "Charles"),
    *("Daniel", "Matthew", "Anthony", "Mark", "Donald", "Steven", "Paul", "Andrew", "Joshua", "Kenneth"),
    *("Kevin", "Brian", "George", "Edward", "Ronald", "Timothy", "Jason", "Jeffrey", "Ryan", "Jacob"),
    *("Gary", "Nicholas", "Eric", "Jonathan", "Stephen", "Larry", "Justin", "Scott", "Brandon", "Benjamin"),
    *("Samuel", "Gregory", "Frank", "Alexander", "Raymond", "Patrick", "Jack", "Dennis", "Jerry", "Tyler"),
    *("Mary", "Patricia", "Jennifer", "Linda", "Elizabeth", "Barbara", "Susan", "Jessica", "Sarah", "Karen"),
    *("Lisa", "Nancy", "Betty", "Margaret", "Sandra", "Ashley", "Kimberly", "Emily", "Donna", "Michelle"),
    *("Carol", "Amanda", "Dorothy", "Jessica", "Melissa", "Deborah", "Stephanie", "Rebecca", "Sharon", "Laura"),
    *("Cynthia", "Kathleen", "Amy", "Angela", "Elizabeth", "Shirley", "Anna", "Brenda", "Pamela", "Sharon"),
    *("Emma", "Nicole", "Helen", "Samantha", "Katherine", "Christine", "Debra", "Rachel", "Carolyn", "Janet"),
)
"""100 entries, of which three occur twice, as in the published list."""

CAPTION_TEMPLATES = (
    "Can you provide a description of the image <image>?",
    "Describe the image <image>.",
    "What is happening in the photo <image>?",
    "Please explain what you see in <image>.",
    "Give a short account of the scene <image>.",
)
"""Requests for a caption; ``<image>`` stands for the image. The published template file is not available."""

SEVERAL_CAPTION_TEMPLATES = (
    "Can you provide a description of the images <image>?",
    "Describe what happens in the images <image>.",
    "Please explain what you see in these images: <image>",
)


def box_text(name: str, box: Sequence[float], size: tuple[float, float]) -> str:
    """``<ref>NAME</ref><box>(x1,y1),(x2,y2)</box>`` in 0..1000 of (width, height) ``size``."""
    width, height = size
    x1, y1, x2, y2 = (int(1000 * value / side) for value, side in zip(box, (width, height) * 2, strict=True))
    return f"<ref>{name}</ref><box>({x1},{y1}),({x2},{y2})</box>"


def is_mirrored(seed: int, path: str, box: Sequence[float]) -> bool:
    """Whether the crop of a box is mirrored. Records share a crop in the published data, and thus its mirroring."""
    digest = hashlib.sha256(f"{seed} {path} {list(box)}".encode()).digest()
    return digest[0] < 128


def image_tag(path: str) -> str:
    """Qwen-VL's tag of an image."""
    return f"<img>{path}</img>"


def conversation(
    name: str, texts: Sequence[str], *, data: str, annotation: str, image_keys: Sequence[str], people: dict[str, str]
) -> dict[str, Any]:
    """Return a record of Qwen-VL's format: alternating turns, and the ``meta`` of other records."""
    for text in (name, *texts, *people, *people.values()):
        check_unicode(text, "a text", annotation)
    turns = [{"from": ("user", "assistant")[n % 2], "value": text} for n, text in enumerate(texts)]
    meta = {"data": data, "annotation": annotation.rpartition("/")[2], "images": list(image_keys), "people": people}
    return {"id": name, "conversations": turns, "meta": meta}


def caption_request(rng: Random, images: Sequence[str]) -> str:
    """A request for a caption with the tags of its images."""
    template = rng.choice(CAPTION_TEMPLATES if len(images) == 1 else SEVERAL_CAPTION_TEMPLATES)
    return template.replace("<image>", "".join(f"{image_tag(image)}\n" for image in images))
