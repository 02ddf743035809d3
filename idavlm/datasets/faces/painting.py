"""Images of photographs on a coloured wall, with exact boxes and words for the positions."""

import colorsys
from collections.abc import Sequence
from random import Random

import numpy as np
from PIL import Image, ImageOps

from idavlm.datasets.album import PixelBox

PLACES: dict[int, tuple[str, ...]] = {
    1: ("",),
    2: ("on the left", "on the right"),
    3: ("on the left", "in the middle", "on the right"),
    4: ("at the top left", "at the top right", "at the bottom left", "at the bottom right"),
}
"""Positions of the photographs in an image, by their number; a single photograph has none."""

WALLS: dict[str, tuple[float, float, float]] = {
    "red": (0.99, 0.55, 0.7),
    "orange": (0.08, 0.6, 0.9),
    "yellow": (0.15, 0.55, 0.95),
    "green": (0.35, 0.45, 0.65),
    "blue": (0.6, 0.5, 0.75),
    "purple": (0.78, 0.4, 0.65),
    "pink": (0.92, 0.3, 0.95),
    "white": (0.1, 0.03, 0.97),
    "grey": (0.6, 0.04, 0.55),
}
"""Colours of walls by name: hue, saturation and value."""

_ROWS = {1: 1, 2: 1, 3: 1, 4: 2}
_WIDTHS = {1: (0.5, 0.82), 2: (0.36, 0.44), 3: (0.27, 0.3), 4: (0.3, 0.36)}
_MAT = 2


def hang(photos: Sequence[np.ndarray], wall: str, size: int, rng: Random) -> tuple[Image.Image, list[PixelBox]]:
    """Hang photographs on a wall: one anywhere, two or three side by side, four in two rows.

    Args:
        photos: 1 to 4 photographs ``[H, W]`` uint8.
        wall: a key of :data:`WALLS`.
        size: width and height of the image in pixels.
        rng: decides sizes, positions, mirroring, framing and light.

    Returns:
        The image, RGB, and the box of each photograph, without its white mat.
    """
    image = _wall(wall, size, rng)
    count = len(photos)
    rows = _ROWS[count]
    columns = count // rows
    boxes: list[PixelBox] = []
    for place, photo in enumerate(photos):
        cell_width, cell_height = size // columns, size // rows
        widest = min(cell_width - 2 * _MAT, int((cell_height - 2 * _MAT) * photo.shape[1] / photo.shape[0]))
        hung = _augment(photo, min(round(size * rng.uniform(*_WIDTHS[count])), widest), rng)
        left = place % columns * cell_width + rng.randint(_MAT, cell_width - hung.width - _MAT)
        top = place // columns * cell_height + rng.randint(_MAT, cell_height - hung.height - _MAT)
        image.paste(ImageOps.expand(hung, _MAT, 245), (left - _MAT, top - _MAT))
        boxes.append((left, top, left + hung.width, top + hung.height))
    return image, boxes


def _wall(name: str, size: int, rng: Random) -> Image.Image:
    """A wall with a brightness gradient."""
    hue, saturation, value = WALLS[name]
    value = min(max(value + rng.uniform(-0.04, 0.03), 0), 1)
    ends = [colorsys.hsv_to_rgb(hue, saturation, value * shade) for shade in (1, rng.uniform(0.75, 0.95))]
    slope = np.linspace(0, 1, size)[:, None] if rng.random() < 0.5 else np.linspace(1, 0, size)[:, None]
    column = np.asarray(ends[0]) * (1 - slope) + np.asarray(ends[1]) * slope
    pixels = np.repeat((column * 255).round().astype(np.uint8)[:, None], size, 1)
    return Image.fromarray(pixels if rng.random() < 0.5 else np.ascontiguousarray(pixels.transpose(1, 0, 2)))


def _augment(photo: np.ndarray, width: int, rng: Random) -> Image.Image:
    """Randomly crop, mirror and change brightness and contrast of a photograph; resize it to ``width`` pixels."""
    image = Image.fromarray(photo)
    kept = rng.uniform(0.86, 1)
    left, top = (rng.uniform(0, extent * (1 - kept)) for extent in image.size)
    area = (left, top, left + kept * image.width, top + kept * image.height)
    image = image.resize((width, int(width * image.height / image.width)), Image.Resampling.BICUBIC, area, 3)
    contrast, brightness = rng.uniform(0.8, 1.2), rng.uniform(-22, 22)
    image = image.point([min(max(round((value - 110) * contrast + 110 + brightness), 0), 255) for value in range(256)])
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
