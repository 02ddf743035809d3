"""Complete images: characters or objects on a background, under random light, with exact boxes."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from idavlm.datasets.album import PixelBox
from idavlm.datasets.characters.activities import Activity
from idavlm.datasets.characters.body import figure
from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.objects import draw_thing, named_colour
from idavlm.datasets.characters.places import PLACES, VARIANTS, background
from idavlm.datasets.characters.shapes import Drawn, Sketch

OVERLAP = 0.1
"""Maximum overlap of neighbours in a crowded scene, as a share of their total width."""


class Placed(NamedTuple):
    """A sketch with its position in the image: ``x`` of its origin and ``y`` of its ground, in pixels."""

    sketch: Sketch
    scale: float
    x: float
    y: float
    mirror: bool


def draw_characters(
    looks: Sequence[CharacterLook], activities: Sequence[Activity], rng: np.random.Generator, size: int
) -> tuple[Image.Image, list[PixelBox]]:
    """Draw characters side by side, from left to right in the given order. A single character fills most of the image.

    Args:
        looks: looks of 1 to 4 characters.
        activities: activity of each character.
        rng: decides everything that differs between two images of the same characters.
        size: width and height of the image in pixels.

    Returns:
        The image, RGB, and a box ``(x1, y1, x2, y2)`` per character. The box encloses the pixels of which the figure
        and the object it holds cover at least half, including pixels that are hidden by a neighbour.
    """
    mirrors = [bool(rng.random() < 0.5) for _ in looks]
    sketches = [figure(look, activity, rng) for look, activity in zip(looks, activities, strict=True)]
    places = place_figures(sketches, mirrors, rng, size)
    image = _random_background(rng, size)
    boxes: list[PixelBox] = [(0, 0, 0, 0)] * len(places)
    # Figures in front are drawn last.
    for number in sorted(range(len(places)), key=lambda number: places[number].y):
        boxes[number] = tight_box(paste_sketch(image, places[number]), size)
    return in_light(image, rng), boxes


def draw_objects(thing: str, colour: str, count: int, place: str, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw ``count`` objects of one colour at a place, without overlap."""
    image = background(place, int(rng.integers(VARIANTS)), size, rng)
    columns = rng.permutation(max(count, 2) if count < 4 else count)[:count]
    column_width = size / max(count, 2 if count < 4 else count)
    for column in columns:
        scale = min(column_width, size * 0.42) / 30 * rng.uniform(0.85, 1.05)
        x = (column + 0.5) * column_width + rng.uniform(-0.5, 0.5) * max(column_width - 28 * scale, 0)
        y = size * rng.uniform(0.74, 0.95)
        sketch = draw_thing(thing, named_colour(colour, rng))
        paste_sketch(image, Placed(sketch, scale, x, y, bool(rng.random() < 0.5)))
    return in_light(image, rng)


def place_figures(
    sketches: Sequence[Sketch], mirrors: Sequence[bool], rng: np.random.Generator, size: int
) -> list[Placed]:
    """Choose scale and position of every figure: inside the image, side by side with little overlap."""
    count = len(sketches)
    bounds = np.array([sketch.bounds() for sketch in sketches])
    lefts = np.where(mirrors, -bounds[:, 2], bounds[:, 0])
    widths, heights = bounds[:, 2] - bounds[:, 0], -bounds[:, 1]
    share = rng.uniform(0.8, 0.95) if count == 1 else rng.uniform(0.56, 0.74)
    scales = share * size / np.mean(heights) * rng.uniform(0.93, 1.07, count)
    room = size * 0.98
    widest = room / ((scales * widths).sum() * (1 - OVERLAP * (count > 1)))
    tallest = size * 0.9 / (scales * heights).max()
    scales = scales * min(1, widest, tallest)
    spare = room - (scales * widths).sum()
    gaps = (
        rng.dirichlet(np.full(count + 1, 2.0)) * spare if spare > 0 else np.full(count + 1, spare / max(count - 1, 1))
    )
    if spare <= 0:
        gaps[0] = gaps[-1] = 0
    places, edge = [], size * 0.01
    for number in range(count):
        edge += gaps[number]
        ground = size * (rng.uniform(0.93, 0.97) if count == 1 else rng.uniform(0.86, 0.97))
        x = edge - lefts[number] * scales[number]
        places.append(Placed(sketches[number], float(scales[number]), float(x), float(ground), mirrors[number]))
        edge += scales[number] * widths[number]
    return places


def tight_box(drawn: Drawn, size: int) -> PixelBox:
    """Box of the pixels of which a drawn layer covers at least half, clipped to the image."""
    x1, y1, x2, y2 = drawn.layer.getchannel("A").point(_HALF).getbbox()
    left, top = drawn.left, drawn.top
    return max(x1 + left, 0), max(y1 + top, 0), min(x2 + left, size), min(y2 + top, size)


def in_light(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the image under light of random brightness, contrast and tint."""
    gains = rng.uniform(0.82, 1.14) * rng.uniform(0.94, 1.06, 3)
    lift = rng.uniform(0, 14)
    values = np.arange(256) * (gains[:, None] - lift / 255) + lift
    return image.point(np.clip(values, 0, 255).astype(int).ravel().tolist())


def _random_background(rng: np.random.Generator, size: int) -> Image.Image:
    place = tuple(PLACES)[rng.integers(len(PLACES))]
    return background(place, int(rng.integers(VARIANTS)), size, rng)


def paste_sketch(image: Image.Image, placed: Placed) -> Drawn:
    """Paste a sketch and its shadow on the ground."""
    drawn = placed.sketch.draw(placed.scale, (placed.x, placed.y), mirror=placed.mirror)
    wide, high = max(int(drawn.layer.width * 0.86), 4), max(int(placed.scale * 9), 3)
    shadow = _shadow().resize((wide, high), Image.Resampling.BILINEAR)
    at = int(drawn.left + drawn.layer.width / 2 - wide / 2), int(placed.y - high / 2)
    image.paste((24, 22, 44), (*at, at[0] + wide, at[1] + high), shadow)
    image.paste(drawn.layer, (drawn.left, drawn.top), drawn.layer)
    return drawn


@lru_cache(maxsize=1)
def _shadow() -> Image.Image:
    """A soft ellipse, mode ``L``."""
    y, x = np.mgrid[-1:1:32j, -1:1:64j]
    soft = np.clip(1.15 - np.hypot(x, y), 0, 0.6) / 0.6
    return Image.fromarray((soft * 105).astype(np.uint8)).filter(ImageFilter.BoxBlur(1))


_HALF = [0] * 128 + [255] * 128
