"""Hats and other things on heads."""

import numpy as np

from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.shapes import Sketch, arc, shade

HATS_OVER_HAIR = frozenset({"cap", "beanie", "top hat", "sun hat", "wizard hat", "helmet"})
"""Hats that hide a bun, spikes or a mohawk."""


def draw_hat(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    """Draw the look's hat on a head of half ``width`` and half ``height``; a peak points to ``facing``, -1 or 1."""
    if look.hat != "none":
        _HATS[look.hat](sketch, look, width, height, facing)


def _cap(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    sketch.dome((0, -1), width * 1.12, height * 1.16, look.hat_colour, 196, 344)
    sketch.dome((0, -1), width * 0.5, height * 1.16, look.hat_trim, 196, 344)
    sketch.limb((facing * 2, -6.5), (facing * width * 1.5, -4.5), 5, shade(look.hat_colour, 0.75), 3)
    sketch.circle((0, -height * 1.14), 2, look.hat_trim)


def _beanie(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    sketch.circle((0, -height * 1.36), 5, look.hat_trim)
    sketch.dome((0, -2), width * 1.12, height * 1.26, look.hat_colour, 185, 355)
    sketch.limb((-width * 0.98, -6), (width * 0.98, -6), 7, look.hat_trim)


def _top_hat(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    top = -height * 2.15
    sketch.polygon([(-width * 0.8, -8), (width * 0.8, -8), (width * 0.88, top), (-width * 0.88, top)], look.hat_colour)
    sketch.polygon([(-width * 0.8, -9), (width * 0.8, -9), (width * 0.82, -15), (-width * 0.82, -15)], look.hat_trim)
    sketch.limb((-width * 1.35, -8), (width * 1.35, -8), 4.5, look.hat_colour)


def _crown(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    low, middle, top = -7.5, -14, -height * 1.6
    xs = np.linspace(-0.92, 0.92, 7) * width
    points = [(x * (1.1 if number % 2 == 0 else 1), top if number % 2 == 0 else middle) for number, x in enumerate(xs)]
    sketch.polygon([*points, (width * 0.92, low), (-width * 0.92, low)], look.hat_colour)
    sketch.rectangle(-width * 0.92, low, width * 0.92, low - 3, look.hat_trim)
    for x, y in points[::2]:
        sketch.circle((x, y), 2, look.hat_trim)


def _sun_hat(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    sketch.ellipse((0, -7), width * 1.75, 5.6, shade(look.hat_colour, 0.85))
    sketch.dome((0, -7), width * 0.95, height * 0.95, look.hat_colour, 180, 360)
    sketch.polygon([(-width * 0.95, -7), (width * 0.95, -7), (width * 0.93, -12), (-width * 0.93, -12)], look.hat_trim)


def _wizard_hat(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    sketch.polygon(
        [
            (-width * 1.0, -7),
            (width * 1.0, -7),
            (width * 0.3, -height * 1.9),
            (facing * 7, -height * 2.5),
            (-width * 0.3, -height * 1.7),
        ],
        look.hat_colour,
    )
    sketch.ellipse((0, -7), width * 1.5, 4, shade(look.hat_colour, 0.8))
    for x, y in ((-5, -14), (5, -17), (0, -25)):
        sketch.circle((x, y), 2.2, look.hat_trim)


def _helmet(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    outer = arc((0, -1), width * 1.2, height * 1.22, 165, 375, 20)
    inner = arc((0, 1), width * 0.88, height * 0.62, 365, 175, 12)
    sketch.polygon(np.concatenate([outer, inner]), look.hat_colour)
    sketch.polygon(
        [(-3.5, -height * 1.24), (3.5, -height * 1.24), (4, -height * 0.58), (-4, -height * 0.58)], look.hat_trim
    )


def _bandana(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    sketch.polygon([(-facing * width, -7), (-facing * width * 1.55, -1), (-facing * width * 1.5, -9)], look.hat_trim)
    sketch.polygon(
        [
            *arc((0, -1), width * 1.09, height * 1.0, 197, 343, 8),
            *arc((0, 2), width * 1.05, height * 0.62, 340, 200, 8),
        ],
        look.hat_colour,
    )


def _flowers(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    for number, (x, y) in enumerate(arc((0, 1), width * 1.0, height * 0.95, 200, 340, 6)):
        colour = look.hat_trim if number % 2 else look.hat_colour
        sketch.circle((x, y), 4.8, colour)
        sketch.circle((x, y), 1.8, (255, 226, 90) if number % 2 else (255, 250, 240))


def _ears(sketch: Sketch, look: CharacterLook, width: float, height: float, facing: int) -> None:
    for side in (-1, 1):
        tip = np.array([side * width * 0.85, -height * 1.75])
        sketch.polygon(
            [(side * width * 0.98, -height * 0.5), tip, (side * width * 0.18, -height * 0.98)], look.hat_colour
        )
        sketch.polygon(
            [(side * width * 0.86, -height * 0.75), tip * 0.93, (side * width * 0.4, -height * 0.98)], look.hat_trim
        )
    sketch.stroke(arc((0, -1), width * 1.03, height * 1.05, 200, 340, 12), 3, look.hat_colour)


_HATS = {
    "cap": _cap,
    "beanie": _beanie,
    "top hat": _top_hat,
    "crown": _crown,
    "sun hat": _sun_hat,
    "wizard hat": _wizard_hat,
    "helmet": _helmet,
    "bandana": _bandana,
    "flowers": _flowers,
    "ears": _ears,
}
