"""General images: grounds, landscapes, and portraits of training characters, and records about them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from idavlm.datasets.dataset_folder import save_jpeg
from idavlm.datasets.wesnoth.backgrounds import Ground, cut
from idavlm.datasets.wesnoth.sprites import Character

QUESTION = "What is in the picture?"


def general_records(
    splits: Mapping[str, Sequence[Character]],
    data: Path,
    grounds: Sequence[Ground],
    image_root: Path,
    *,
    count: int,
    size: int,
    rng: Random,
) -> list[dict[str, Any]]:
    """Write ``count`` images below ``image_root`` and return one record per image: half grounds, half portraits."""
    (image_root / "general").mkdir(parents=True, exist_ok=True)
    portraits = _portraits(splits, data)
    records = []
    for number in range(count):
        ground = rng.choice(grounds)
        image, answer = cut(ground, size, rng), ground.kind
        if portraits and rng.random() < 0.5:
            file, answer = rng.choice(portraits)
            portrait = _framed(file, size, rng)
            image.paste(portrait, (0, 0), portrait)
        path = f"general/{number}.jpg"
        save_jpeg(image, image_root / path)
        content = [{"type": "image", "image": path}, {"type": "text", "text": "\n" + QUESTION}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer.capitalize() + "."},
        ]
        records.append({"id": f"general-{number}", "source": "general", "messages": messages})
    return records


def _portraits(splits: Mapping[str, Sequence[Character]], data: Path) -> list[tuple[Path, str]]:
    """Files and races of the portraits of training characters, except those shared with a held-out character."""
    held_out = {
        profile
        for split, characters in splits.items()
        if split != "train"
        for character in characters
        for profile in character.profiles
    }
    files = {
        (data / "core" / "images" / profile, character.race)
        for character in splits["train"]
        for profile in character.profiles
        if profile not in held_out and character.race
    }
    return sorted((file, race) for file, race in files if file.is_file())


def _framed(file: Path, size: int, rng: Random) -> Image.Image:
    """Random square crop of the upper part of a portrait."""
    with Image.open(file) as image:
        portrait = image.convert("RGBA")
    side = rng.uniform(0.6, 1) * min(portrait.size)
    left, top = rng.uniform(0, portrait.width - side), rng.uniform(0, portrait.height - side) / 2
    return portrait.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
