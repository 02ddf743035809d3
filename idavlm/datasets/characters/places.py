"""Backgrounds: rooms and landscapes of gradients and simple shapes, drawn once and then cropped."""

from functools import lru_cache

import numpy as np
from PIL import Image

from idavlm.datasets.characters.look import hsv
from idavlm.datasets.characters.shapes import Colour, Sketch, arc, mix, moved, shade

PLACES = {
    "room": "in a room",
    "park": "in a park",
    "beach": "on a beach",
    "street": "on a street",
    "snow": "in a snowy field",
    "night": "in a city at night",
    "desert": "in a desert",
    "mountains": "in the mountains",
    "forest": "in a forest",
    "stage": "on a stage",
}
"""Places, and the text for the location of an object there."""

VARIANTS = 14
"""Number of drawings per place; random crops, mirroring and light vary them further."""

MARGIN = 1.3
"""Size of the drawing of a place relative to the image."""

HORIZON = 58.0
"""Approximate height of the horizon, in percent of the height of the drawing."""


def background(place: str, variant: int, size: int, rng: np.random.Generator) -> Image.Image:
    """Random crop, mirrored with probability 1/2, of one variant of a place: RGB, ``size`` x ``size``."""
    whole = _place(place, variant, int(size * MARGIN))
    spare = whole.width - size
    left, top = int(rng.integers(spare + 1)), int(rng.integers(spare // 3, spare + 1))
    crop = whole.crop((left, top, left + size, top + size))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


@lru_cache(maxsize=len(PLACES) * VARIANTS)
def _place(place: str, variant: int, size: int) -> Image.Image:
    rng = np.random.default_rng([list(PLACES).index(place), variant])
    sketch = Sketch()
    sky, ground = _DRAW[place](sketch, rng)
    canvas = _gradients(size, sky, ground)
    drawn = sketch.draw(size / 100, (0, 0))
    canvas.paste(drawn.layer, (drawn.left, drawn.top), drawn.layer)
    return canvas


def _gradients(size: int, sky: tuple[Colour, Colour], ground: tuple[Colour, Colour]) -> Image.Image:
    """Colour gradients of the sky, down to the horizon, and of the ground below it."""
    rows = np.arange(size) / size * 100
    above = np.clip(rows / HORIZON, 0, 1)[:, None]
    below = np.clip((rows - HORIZON) / (100 - HORIZON), 0, 1)[:, None]
    upper = np.array(sky[0]) * (1 - above) + np.array(sky[1]) * above
    lower = np.array(ground[0]) * (1 - below) + np.array(ground[1]) * below
    column = np.where(rows[:, None] < HORIZON, upper, lower)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(column[:, None], (size, size, 3)).astype(np.uint8)))


Gradients = tuple[tuple[Colour, Colour], tuple[Colour, Colour]]


def _day_sky(rng: np.random.Generator) -> tuple[Colour, Colour]:
    if rng.random() < 0.25:
        return hsv(rng.uniform(0.75, 0.95), 0.4, 0.85), hsv(rng.uniform(0.05, 0.12), 0.45, 1)
    return hsv(rng.uniform(0.53, 0.6), rng.uniform(0.4, 0.65), 0.95), hsv(rng.uniform(0.5, 0.58), 0.14, 1)


def _clouds(sketch: Sketch, rng: np.random.Generator) -> None:
    if rng.random() < 0.5:
        sketch.circle((rng.uniform(10, 90), rng.uniform(8, 22)), rng.uniform(4, 7), (255, 240, 170))
    for _ in range(rng.integers(0, 4)):
        x, y, wide = rng.uniform(0, 100), rng.uniform(6, 30), rng.uniform(5, 10)
        for dx, dy, share in ((-0.8, 0.2, 0.6), (0.8, 0.2, 0.6), (0, 0, 1)):
            sketch.ellipse((x + dx * wide, y + dy * 5), wide * share, wide * share * 0.55, (250, 252, 255))


def _hills(sketch: Sketch, rng: np.random.Generator, colour: Colour, height: float) -> None:
    for _ in range(3):
        x, wide = rng.uniform(0, 100), rng.uniform(25, 45)
        sketch.dome(
            (x, HORIZON + 0.5), wide, height * rng.uniform(0.5, 1), shade(colour, rng.uniform(0.92, 1.1)), 180, 360
        )


def _tree(sketch: Sketch, x: float, y: float, size: float, leaves: Colour) -> None:
    sketch.limb((x, y), (x, y - size * 0.6), size * 0.14, (112, 78, 52))
    for dx, dy, radius in ((-0.22, -0.7, 0.26), (0.22, -0.7, 0.26), (0, -0.92, 0.3)):
        sketch.circle((x + dx * size, y + dy * size), radius * size, shade(leaves, 1 + dx * 0.3))


def _fir(sketch: Sketch, x: float, y: float, size: float, leaves: Colour) -> None:
    sketch.limb((x, y), (x, y - size * 0.3), size * 0.1, (96, 66, 48))
    for level in range(3):
        low, wide = y - size * (0.15 + level * 0.27), size * (0.3 - level * 0.07)
        sketch.polygon([(x - wide, low), (x + wide, low), (x, low - size * 0.45)], shade(leaves, 0.9 + 0.12 * level))


def _house(
    sketch: Sketch, x: float, wide: float, high: float, wall: Colour, lit: Colour, roof: bool, rng: np.random.Generator
) -> None:
    top = HORIZON - high
    sketch.rectangle(x, HORIZON + 1, x + wide, top, wall)
    if roof:
        sketch.polygon([(x - 1.5, top), (x + wide + 1.5, top), (x + wide / 2, top - wide * 0.4)], shade(wall, 0.65))
    columns, rows = max(1, int(wide // 7)), max(1, int(high // 10))
    for row in range(rows):
        for column in range(columns):
            if rng.random() < 0.85:
                left, up = x + (column + 0.5) * wide / columns - 1.8, top + (row + 0.5) * high / rows - 2.4
                sketch.rectangle(left, up, left + 3.6, up + 4.8, lit)


def _room(sketch: Sketch, rng: np.random.Generator) -> Gradients:
    wall, floor = (
        hsv(rng.random(), rng.uniform(0.12, 0.35), rng.uniform(0.78, 0.97)),
        hsv(rng.uniform(0.04, 0.12), 0.4, rng.uniform(0.5, 0.8)),
    )
    left = rng.uniform(8, 60)
    sketch.rectangle(left, 12, left + 26, 42, (250, 250, 248))
    sky = hsv(0.55, 0.3, 1)
    for x in (left + 2, left + 13.8):
        sketch.rectangle(x, 14, x + 10.2, 40, sky)
    other = (left + 40) % 84
    if rng.random() < 0.5:
        sketch.rectangle(other, 16, other + 14, 34, (120, 86, 60))
        sketch.rectangle(
            other + 1.5,
            17.5,
            other + 12.5,
            32.5,
            hsv(rng.random(), 0.4, 0.9),
        )
    else:
        sketch.limb((other + 6, HORIZON), (other + 6, 30), 1.4, (90, 80, 76))
        sketch.polygon([(other, 32), (other + 12, 32), (other + 9, 22), (other + 3, 22)], hsv(rng.random(), 0.4, 1))
    sketch.rectangle(0, HORIZON - 2, 100, HORIZON + 0.6, shade(wall, 1.5))
    sketch.ellipse((50, 85), 42, 11, hsv(rng.random(), 0.35, 0.8))
    return (shade(wall, 0.95), wall), (shade(floor, 0.9), floor)


def _park(sketch: Sketch, rng: np.random.Generator) -> Gradients:
    green = hsv(rng.uniform(0.22, 0.36), rng.uniform(0.4, 0.65), rng.uniform(0.6, 0.8))
    _clouds(sketch, rng)
    _hills(sketch, rng, mix(green, (190, 220, 230), 0.4), 16)
    for _ in range(rng.integers(2, 5)):
        leaves = hsv(rng.uniform(0.18, 0.4), 0.55, rng.uniform(0.5, 0.75))
        _tree(sketch, rng.uniform(0, 100), HORIZON + rng.uniform(1, 6), rng.uniform(22, 36), leaves)
    x = rng.uniform(20, 80)
    path = [(x, HORIZON + 3), (x + 6, HORIZON + 3), (x + 40, 101), (x - 5, 101)]
    sketch.polygon(path, hsv(0.11, 0.28, 0.88))
    for _ in range(8):
        sketch.circle((rng.uniform(0, 100), rng.uniform(66, 99)), 0.9, hsv(rng.random(), 0.5, 1))
    return _day_sky(rng), (green, shade(green, 0.82))


def _beach(sketch: Sketch, rng: np.random.Generator) -> Gradients:
    _clouds(sketch, rng)
    sea = hsv(rng.uniform(0.5, 0.6), 0.6, rng.uniform(0.65, 0.85))
    sketch.rectangle(0, 44, 100, 62, sea)
    for _ in range(5):
        x, y = rng.uniform(0, 95), rng.uniform(46, 56)
        sketch.limb((x, y), (x + rng.uniform(4, 12), y), 0.9, shade(sea, 1.4))
    sketch.polygon(
        [*zip(np.linspace(0, 100, 12), 60.5 + rng.uniform(-1, 1, 12), strict=True), (100, 64), (0, 64)], (245, 250, 250)
    )
    x = rng.uniform(5, 95)
    if rng.random() < 0.5:
        sketch.limb((x, 70), (x + 5, 34), 2.4, (140, 100, 66))
        for angle in (190, 220, 260, 300, 340):
            sketch.stroke(
                arc((x + 5 + 8 * np.cos(np.radians(angle)), 37), 9, 7, 180 if angle > 260 else 360, 270, 6),
                2.2,
                (62, 140, 84),
            )
    else:
        sketch.polygon([(x, 45), (x + 12, 45), (x + 9, 49), (x + 3, 49)], hsv(rng.random(), 0.6, 0.8))
        sketch.polygon([(x + 6, 44), (x + 6, 28), (x + 14, 43)], (250, 250, 246))
    sand = hsv(rng.uniform(0.1, 0.13), rng.uniform(0.25, 0.42), 0.95)
    return _day_sky(rng), (sand, shade(sand, 0.88))


def _street(sketch: Sketch, rng: np.random.Generator) -> Gradients:
    _clouds(sketch, rng)
    x = -rng.uniform(0, 10)
    while x < 100:
        wide = rng.uniform(16, 28)
        wall = hsv(rng.random(), rng.uniform(0.2, 0.45), rng.uniform(0.7, 0.95))
        _house(sketch, x, wide, rng.uniform(24, 44), wall, hsv(0.55, 0.2, 0.95), rng.random() < 0.5, rng)
        x += wide + rng.uniform(0, 3)
    sketch.rectangle(0, HORIZON, 100, 68, (196, 192, 188))
    for x in range(-5, 100, 22):
        sketch.polygon([(x, 83), (x + 12, 83), (x + 11, 85.5), (x - 1, 85.5)], (236, 232, 214))
    return _day_sky(rng), ((128, 128, 134), (108, 108, 116))


def _snow(sketch: Sketch, rng: np.random.Generator) -> Gradients:
    _hills(sketch, rng, (222, 232, 244), 18)
    for _ in range(rng.integers(3, 6)):
        x, y, size = rng.uniform(0, 100), HORIZON + rng.uniform(0, 5), rng.uniform(20, 34)
        _fir(sketch, x, y, size, (70, 122, 108))
        sketch.polygon(
            [(x - size * 0.1, y - size * 0.94), (x + size * 0.1, y - size * 0.94), (x, y - size * 1.14)],
            (250, 252, 255),
        )
    for _ in range(26):
        sketch.circle((rng.uniform(0, 100), rng.uniform(0, 100)), rng.uniform(0.5, 1), (255, 255, 255))
    return (hsv(0.58, rng.uniform(0.2, 0.4), rng.uniform(0.75, 0.92)), (226, 234, 244)), (
        (240, 244, 250),
        (212, 222, 238),
    )


def _night(sketch: Sketch, rng: np.random.Generator) -> Gradients:
    for _ in range(24):
        sketch.circle((rng.uniform(0, 100), rng.uniform(0, 40)), rng.uniform(0.3, 0.8), (250, 246, 210))
    sketch.circle((rng.uniform(12, 88), rng.uniform(10, 22)), rng.uniform(4, 7), (250, 240, 196))
    x = -rng.uniform(0, 10)
    while x < 100:
        wide = rng.uniform(12, 22)
        _house(
            sketch,
            x,
            wide,
            rng.uniform(16, 42),
            hsv(rng.uniform(0.6, 0.75), 0.4, rng.uniform(0.3, 0.42)),
            (250, 214, 120),
            False,
            rng,
        )
        x += wide + rng.uniform(0, 4)
    for x in (rng.uniform(5, 45), rng.uniform(55, 95)):
        sketch.limb((x, 66), (x, 36), 1.2, (50, 48, 62))
        sketch.circle((x, 35), 3, (255, 236, 160))
    return (hsv(rng.uniform(0.6, 0.7), 0.65, 0.3), hsv(rng.uniform(0.65, 0.85), 0.45, 0.55)), (
        (96, 92, 122),
        (74, 72, 100),
    )


def _desert(sketch: Sketch, rng: np.random.Generator) -> Gradients:
    sand = hsv(rng.uniform(0.06, 0.11), rng.uniform(0.4, 0.6), 0.92)
    sketch.circle((rng.uniform(10, 90), rng.uniform(10, 30)), rng.uniform(5, 9), (255, 246, 200))
    _hills(sketch, rng, shade(sand, 0.9), 20)
    for _ in range(rng.integers(1, 4)):
        x, y, size = rng.uniform(4, 96), HORIZON + rng.uniform(2, 10), rng.uniform(14, 26)
        green = hsv(rng.uniform(0.3, 0.42), 0.5, 0.58)
        sketch.limb((x, y), (x, y - size), 3.4, green)
        for side, low in ((-1, 0.45), (1, 0.6)):
            sketch.limb((x, y - size * low), (x + side * 5, y - size * low), 2.6, green)
            sketch.limb((x + side * 5, y - size * low), (x + side * 5, y - size * (low + 0.28)), 2.6, green)
    return (hsv(rng.uniform(0.52, 0.6), 0.4, 0.95), hsv(rng.uniform(0.08, 0.13), 0.3, 1)), (sand, shade(sand, 0.85))


def _mountains(sketch: Sketch, rng: np.random.Generator) -> Gradients:
    _clouds(sketch, rng)
    rock = hsv(rng.uniform(0.55, 0.75), rng.uniform(0.15, 0.35), rng.uniform(0.5, 0.7))
    for x in (*rng.uniform(0, 100, 2), rng.uniform(30, 70)):
        wide, high = rng.uniform(26, 40), rng.uniform(30, 48)
        tip = np.array([x, HORIZON - high])
        sketch.polygon([(x - wide, HORIZON + 1), tip, (x + wide, HORIZON + 1)], shade(rock, rng.uniform(0.85, 1.15)))
        sketch.polygon(
            [
                tip,
                moved(tip, -wide * 0.28, high * 0.28),
                moved(tip, 0, high * 0.2),
                moved(tip, wide * 0.28, high * 0.28),
            ],
            (248, 250, 255),
        )
    green = hsv(rng.uniform(0.2, 0.38), 0.45, rng.uniform(0.55, 0.75))
    for _ in range(5):
        _fir(sketch, rng.uniform(0, 100), HORIZON + rng.uniform(1, 4), rng.uniform(9, 16), shade(green, 0.7))
    return _day_sky(rng), (green, shade(green, 0.85))


def _forest(sketch: Sketch, rng: np.random.Generator) -> Gradients:
    green = hsv(rng.uniform(0.22, 0.4), 0.5, rng.uniform(0.42, 0.6))
    for depth in (0.35, 0.6, 1):
        for _ in range(7):
            leaves = mix((214, 232, 210), shade(green, rng.uniform(0.8, 1.15)), depth)
            draw = _fir if rng.random() < 0.6 else _tree
            draw(sketch, rng.uniform(0, 100), HORIZON + depth * 4, rng.uniform(34, 52), leaves)
    for _ in range(5):
        x, y = rng.uniform(0, 100), rng.uniform(66, 98)
        sketch.limb((x, y), (x, y - 2), 1.1, (250, 240, 224))
        sketch.dome((x, y - 2), 2, 1.8, (206, 66, 52), 180, 360)
    return (hsv(0.4, 0.15, 0.95), hsv(0.3, 0.2, 0.95)), (green, shade(green, 0.8))


def _stage(sketch: Sketch, rng: np.random.Generator) -> Gradients:
    curtain = hsv(rng.random(), rng.uniform(0.5, 0.75), rng.uniform(0.5, 0.7))
    for number, x in enumerate(np.linspace(0, 100, 13)):
        sketch.limb((x, -4), (x, HORIZON - 3), 9, shade(curtain, 1 if number % 2 else 0.84))
    wood = hsv(rng.uniform(0.06, 0.1), 0.45, rng.uniform(0.6, 0.8))
    for y in (66, 74, 83, 93):
        sketch.limb((0, y), (100, y), 0.6, shade(wood, 0.8))
    light = mix(wood, (255, 244, 200), 0.5)
    sketch.ellipse((50, 85), 36, 10, light)
    return (shade(curtain, 0.7), shade(curtain, 0.7)), (wood, shade(wood, 0.9))


_DRAW = {
    "room": _room,
    "park": _park,
    "beach": _beach,
    "street": _street,
    "snow": _snow,
    "night": _night,
    "desert": _desert,
    "mountains": _mountains,
    "forest": _forest,
    "stage": _stage,
}
