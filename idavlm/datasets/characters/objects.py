"""Objects of one colour for general images: about 20 units tall, on the ground at y = 0."""

import numpy as np

from idavlm.datasets.characters.look import hsv
from idavlm.datasets.characters.shapes import Colour, Sketch, arc, shade, star_points

COLOURS = {
    "red": (0.0, 0.85, 0.85),
    "orange": (0.075, 0.9, 0.98),
    "yellow": (0.145, 0.85, 0.98),
    "green": (0.36, 0.75, 0.65),
    "blue": (0.6, 0.8, 0.85),
    "purple": (0.77, 0.6, 0.7),
    "pink": (0.92, 0.42, 1.0),
    "white": (0.1, 0.03, 0.97),
    "black": (0.7, 0.15, 0.16),
}
"""Colours by name: hue, saturation and value."""

LEAF = (84, 148, 74)
GLASS = (196, 228, 240)
DARK = (52, 48, 56)


def named_colour(name: str, rng: np.random.Generator) -> Colour:
    """Draw a random colour that is commonly called ``name``."""
    hue, saturation, value = COLOURS[name]
    return hsv(
        hue + rng.uniform(-0.015, 0.015), saturation + rng.uniform(-0.03, 0.05), value + rng.uniform(-0.05, 0.03)
    )


def draw_thing(thing: str, colour: Colour) -> Sketch:
    """Sketch one of :data:`THINGS`."""
    sketch = Sketch()
    THINGS[thing][1](sketch, colour)
    return sketch


def _apple(sketch: Sketch, colour: Colour) -> None:
    for side in (-1, 1):
        sketch.ellipse((side * 3.4, -8), 6.6, 8, shade(colour, 1 if side > 0 else 0.9))
    sketch.limb((0, -14), (1.5, -19), 1.6, (110, 76, 48))
    sketch.ellipse((5, -18), 3.6, 1.7, LEAF, -24)


def _car(sketch: Sketch, colour: Colour) -> None:
    sketch.polygon([(-9, -9), (-6, -16), (6, -16), (10, -9)], colour)
    sketch.polygon([(-7, -9.5), (-5, -14.4), (-0.6, -14.4), (-0.6, -9.5)], GLASS)
    sketch.polygon([(0.8, -9.5), (0.8, -14.4), (5, -14.4), (7.4, -9.5)], GLASS)
    sketch.limb((-12.5, -6.4), (12.5, -6.4), 6.6, colour)
    for x in (-7.5, 7.5):
        sketch.circle((x, -3.4), 3.6, DARK)
        sketch.circle((x, -3.4), 1.5, (200, 200, 206))


def _house(sketch: Sketch, colour: Colour) -> None:
    sketch.rectangle(-9, 0, 9, -12, colour)
    sketch.polygon([(-11.5, -11.5), (11.5, -11.5), (0, -21)], shade(colour, 0.6))
    sketch.rectangle(-2.4, 0, 2.4, -7, (120, 84, 58))
    for x in (-6, 6):
        sketch.rectangle(x - 1.8, -9.5, x + 1.8, -5.6, GLASS)


def _boat(sketch: Sketch, colour: Colour) -> None:
    sketch.polygon([(-12, -6), (12, -6), (8, 0), (-8, 0)], colour)
    sketch.limb((0, -6), (0, -21), 1.2, (110, 76, 48))
    sketch.polygon([(1, -20), (1, -7.4), (9, -7.4)], (250, 248, 240))
    sketch.polygon([(-1, -18), (-1, -7.4), (-7, -7.4)], (232, 228, 216))


def _star(sketch: Sketch, colour: Colour) -> None:
    sketch.polygon(star_points(5, 11, 4.8, centre=(0, -9.6)), colour)


def _ball(sketch: Sketch, colour: Colour) -> None:
    sketch.circle((0, -9), 9, colour)
    sketch.circle((-3, -12), 2.6, shade(colour, 1.5))
    sketch.stroke(arc((0, -9), 9, 3, 10, 170, 12), 1.4, shade(colour, 0.7))


def _flower(sketch: Sketch, colour: Colour) -> None:
    sketch.limb((0, 0), (0, -13), 1.6, LEAF)
    sketch.ellipse((3.4, -4), 3.6, 1.6, LEAF, -30)
    for x, y in arc((0, -14.5), 4.8, 4.8, 0, 300, 6):
        sketch.circle((x, y), 3.1, colour)
    sketch.circle((0, -14.5), 2.7, (250, 206, 80) if colour[2] > 60 or colour[0] < 200 else (120, 80, 50))


def _fish(sketch: Sketch, colour: Colour) -> None:
    sketch.polygon([(6, -8), (13, -13.5), (13, -2.5)], shade(colour, 0.8))
    sketch.ellipse((-1, -8), 10, 6.4, colour)
    sketch.polygon([(-2, -13.4), (4, -13), (4, -17)], shade(colour, 0.8))
    sketch.circle((-6, -9.4), 1.9, (252, 252, 250))
    sketch.circle((-6.4, -9.4), 1, DARK)


def _cup(sketch: Sketch, colour: Colour) -> None:
    sketch.stroke(arc((7, -8), 5, 5, -90, 90, 10), 2.4, shade(colour, 0.85))
    sketch.polygon([(-8, -16), (8, -16), (6, 0), (-6, 0)], colour)
    sketch.ellipse((0, -16), 8, 2, shade(colour, 0.6))


def _balloon(sketch: Sketch, colour: Colour) -> None:
    sketch.limb((0, -7), (1, 0), 0.8, (120, 110, 110))
    sketch.ellipse((0, -14.5), 7, 8.2, colour)
    sketch.polygon([(-2, -5), (2, -5), (0, -8)], shade(colour, 0.8))
    sketch.ellipse((-2.6, -17.4), 1.5, 2.4, shade(colour, 1.5), 20)


def _mushroom(sketch: Sketch, colour: Colour) -> None:
    sketch.limb((0, -2), (0, -9), 6, (246, 236, 216))
    sketch.dome((0, -8), 10.5, 11, colour, 180, 360)
    for x, y in ((-5, -11), (0.5, -15), (5.4, -10.6)):
        sketch.circle((x, y), 1.7, shade(colour, 1.75))


def _tent(sketch: Sketch, colour: Colour) -> None:
    sketch.polygon([(-13, 0), (13, 0), (0, -18)], colour)
    sketch.polygon([(-4.5, 0), (4.5, 0), (0, -12)], shade(colour, 0.5))


THINGS = {
    "apple": ("apples", _apple),
    "car": ("cars", _car),
    "house": ("houses", _house),
    "boat": ("boats", _boat),
    "star": ("stars", _star),
    "ball": ("balls", _ball),
    "flower": ("flowers", _flower),
    "fish": ("fish", _fish),
    "cup": ("cups", _cup),
    "balloon": ("balloons", _balloon),
    "mushroom": ("mushrooms", _mushroom),
    "tent": ("tents", _tent),
}
"""Objects by name: the plural and the function that sketches the object."""
