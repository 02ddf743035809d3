"""Whole pictures: sprites on a background, under some light, with exact boxes."""

from collections.abc import Sequence
from random import Random

import numpy as np
from PIL import Image

from idavlm.datasets.album import Box
from idavlm.datasets.wesnoth.sprites import VISIBLE

ALONE = (0.55, 0.9)
"""Longer side of the one figure of a photo, in shares of the picture."""

_OPAQUE = [255 * (alpha >= VISIBLE) for alpha in range(256)]
_MAX_ENLARGEMENT = 3.0
_COLUMN_WIDTH = {2: 0.48, 3: 0.38, 4: 0.4}
_COLUMN_HEIGHT = {2: 0.75, 3: 0.62, 4: 0.47}


def paint(
    figures: Sequence[np.ndarray], stretches: Sequence[float], background: Image.Image, rng: Random
) -> tuple[Image.Image, list[Box]]:
    """Place figures on a background; two to four stand side by side, every other one of four further back.

    Args:
        figures: 1 to 4 sprites ``[H, W, 4]`` uint8, from left to right.
        stretches: width of each figure by its sprite's.
        background: a square RGB picture; it is drawn on.
        rng: sizes, places, sides and light.

    Returns:
        The picture and for each figure the box of its pixels that are at least half opaque, also where a neighbour
        hides some of them.
    """
    size, count = background.width, len(figures)
    brightness = rng.uniform(0.85, 1.12)
    light = [brightness * rng.uniform(0.94, 1.06) for _ in range(3)]
    back_first = rng.randrange(2)
    placed = []
    for place, (figure, stretch) in enumerate(zip(figures, stretches, strict=True)):
        behind = count == 4 and place % 2 == back_first
        sprite = _resized(figure, stretch, _scale(figure, stretch, count, size, rng), mirror=rng.random() < 0.5)
        placed.append((behind, sprite, _corner(sprite, place, count, behind, size, rng)))
    boxes: list[Box] = [(0, 0, 0, 0)] * count
    for index in sorted(range(count), key=lambda index: not placed[index][0]):
        _, sprite, (left, top) = placed[index]
        background.paste(sprite, (left, top), sprite)
        x1, y1, x2, y2 = sprite.getchannel("A").point(_OPAQUE).getbbox() or (0, 0, *sprite.size)
        boxes[index] = (left + x1, top + y1, left + x2, top + y2)
    table = np.outer(light, np.arange(256)).clip(0, 255).round().astype(int).ravel().tolist()
    return background.point(table), boxes


def _scale(figure: np.ndarray, stretch: float, count: int, size: int, rng: Random) -> float:
    height, width = figure.shape[:2]
    if count == 1:
        return min(size * rng.uniform(*ALONE) / max(width * stretch, height), _MAX_ENLARGEMENT * size / 128)
    most = min(size * _COLUMN_WIDTH[count] / (width * stretch), size * _COLUMN_HEIGHT[count] / height)
    return min(most * rng.uniform(0.82, 1), _MAX_ENLARGEMENT * size / 128)


def _resized(figure: np.ndarray, stretch: float, scale: float, mirror: bool) -> Image.Image:
    height, width = figure.shape[:2]
    # Premultiplied, so that the invisible colour around the figure does not shine through its edge.
    image = Image.fromarray(figure, "RGBA").convert("RGBa")
    image = image.resize(
        (max(round(width * stretch * scale), 2), max(round(height * scale), 2)), Image.Resampling.BICUBIC
    )
    image = image.convert("RGBA")
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image


def _corner(sprite: Image.Image, place: int, count: int, behind: bool, size: int, rng: Random) -> tuple[int, int]:
    """Left and top of a figure: alone anywhere, else in its column, with its feet on the ground."""
    room_x, room_y = size - sprite.width, size - sprite.height
    if count == 1:
        return rng.randint(0, max(room_x, 0)), rng.randint(0, max(room_y, 0))
    middle = (place + 0.5) * size / count + rng.uniform(-0.02, 0.02) * size
    ground = size * (rng.uniform(0.48, 0.54) if behind else rng.uniform(0.86, 0.99))
    return min(max(round(middle - sprite.width / 2), 0), room_x), min(max(round(ground) - sprite.height, 0), room_y)
