"""Complete images: sprites on a background, under random light, with exact boxes."""

from collections.abc import Sequence
from random import Random

import numpy as np
from PIL import Image

from idavlm.datasets.album import PixelBox
from idavlm.datasets.wesnoth.sprites import VISIBLE

ALONE = (0.55, 0.9)
"""Range of the longer side of a single figure, as a share of the image size."""

_OPAQUE = [255 * (alpha >= VISIBLE) for alpha in range(256)]
_MAX_ENLARGEMENT = 3.0
_COLUMN_WIDTH = {2: 0.48, 3: 0.38, 4: 0.4}
_COLUMN_HEIGHT = {2: 0.75, 3: 0.62, 4: 0.47}


def paint(
    figures: Sequence[np.ndarray], stretches: Sequence[float], background: Image.Image, rng: Random
) -> tuple[Image.Image, list[PixelBox]]:
    """Paint figures on a background. Two to four figures are side by side; of four, every second is further back.

    Args:
        figures: 1 to 4 sprites ``[H, W, 4]`` uint8, from left to right.
        stretches: horizontal scale of each figure relative to its sprite.
        background: a square RGB image; it is modified.
        rng: decides sizes, positions, mirroring and light.

    Returns:
        The image, and per figure the box of its pixels that are at least half opaque, including pixels that are hidden
        by a neighbour.
    """
    size, count = background.width, len(figures)
    brightness = rng.uniform(0.85, 1.12)
    light = [brightness * rng.uniform(0.94, 1.06) for _ in range(3)]
    back_first = rng.randrange(2)
    placed = []
    for place, (figure, stretch) in enumerate(zip(figures, stretches, strict=True)):
        is_back = count == 4 and place % 2 == back_first
        sprite = _resized(figure, stretch, _scale(figure, stretch, count, size, rng), mirror=rng.random() < 0.5)
        placed.append((is_back, sprite, _corner(sprite, place, count, is_back, size, rng)))
    boxes: list[PixelBox] = [(0, 0, 0, 0)] * count
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
    # Resize premultiplied pixels, so that the invisible colour around the figure does not bleed into its edge.
    image = Image.fromarray(figure, "RGBA").convert("RGBa")
    image = image.resize(
        (max(round(width * stretch * scale), 2), max(round(height * scale), 2)), Image.Resampling.BICUBIC
    )
    image = image.convert("RGBA")
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image


def _corner(sprite: Image.Image, place: int, count: int, is_back: bool, size: int, rng: Random) -> tuple[int, int]:
    """Left and top of a figure: anywhere if it is alone, otherwise in its column with the feet on the ground."""
    room_x, room_y = size - sprite.width, size - sprite.height
    if count == 1:
        return rng.randint(0, max(room_x, 0)), rng.randint(0, max(room_y, 0))
    middle = (place + 0.5) * size / count + rng.uniform(-0.02, 0.02) * size
    ground = size * (rng.uniform(0.48, 0.54) if is_back else rng.uniform(0.86, 0.99))
    return min(max(round(middle - sprite.width / 2), 0), room_x), min(max(round(ground) - sprite.height, 0), room_y)
