"""Shirts and their patterns, skirts, robes, and accessories worn over them."""

import numpy as np

from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.pose import Joints
from idavlm.datasets.characters.shapes import Colour, Sketch, arc, between, moved, shade, star_points


class Torso:
    """The torso as a surface: points by their relative position across (u) and down (v)."""

    def __init__(self, look: CharacterLook, joints: Joints) -> None:
        axis = joints.hips - joints.chest
        axis = axis / np.hypot(*axis)
        across = np.array([axis[1], -axis[0]])
        top, bottom = 10.6 * look.build, (9.2 + 1.6 * (look.build - 0.8) * 4) * look.build**0.5
        hem = joints.hips + axis * 3.5
        hem_width = across * 2 * bottom
        self.origin, self.width = joints.chest - across * top, across * 2 * top
        self.down, self.widening = hem - across * bottom - self.origin, hem_width - self.width

    def at(self, u: float, v: float) -> np.ndarray:
        return self.origin + self.down * v + (self.width + self.widening * v) * u

    def patch(self, u0: float, v0: float, u1: float, v1: float) -> list[np.ndarray]:
        return [self.at(u0, v0), self.at(u1, v0), self.at(u1, v1), self.at(u0, v1)]


def draw_torso(sketch: Sketch, look: CharacterLook, joints: Joints) -> None:
    """Draw the neck, the shirt and its pattern."""
    torso = Torso(look, joints)
    colour, second = look.shirt_colour, look.second_colour
    sketch.limb(moved(joints.chest, 0, 1), joints.head, 7.5, shade(look.skin, 0.85))
    sketch.limb(joints.shoulders[0], joints.shoulders[1], 6.5, colour)
    sketch.polygon(torso.patch(0, 0.05, 1, 1), colour)
    _PATTERNS[look.shirt_pattern](sketch, torso, second, look)
    sketch.polygon(arc(torso.at(0.5, -0.02), 5, 4, 0, 180, 8), shade(look.skin, 0.92))


def draw_skirt(sketch: Sketch, look: CharacterLook, joints: Joints) -> None:
    """Draw a skirt to the knees or a robe to the feet, as wide as the legs are spread."""
    torso = Torso(look, joints)
    hips = joints.hips
    ends = joints.knees if look.lower == "skirt" else joints.feet
    length = max(max(end[1] for end in ends) - hips[1], 12) * (1.05 if look.lower == "skirt" else 0.86)
    wide = (6.5 if look.lower == "skirt" else 5) * look.build + 1.5
    reach = 15 * look.build
    left = max(min(end[0] for end in (*ends, hips)), hips[0] - reach) - wide
    right = min(max(end[0] for end in (*ends, hips)), hips[0] + reach) + wide
    low = hips[1] + length
    for colour, top in ((look.lower_colour, 0), (look.shoe_colour, 0.84)):
        start = between(torso.at(0, 0.86), (left, low), top)
        end = between(torso.at(1, 0.86), (right, low), top)
        sketch.polygon([start, end, (right, low), ((left + right) / 2, low + 1.6), (left, low)], colour)


def draw_extra_back(sketch: Sketch, look: CharacterLook, joints: Joints) -> None:
    """Draw the cape or backpack that is hidden by the body."""
    colour = look.extra_colour
    if look.extra == "cape":
        left, right = joints.shoulders
        end = max(joints.hips[1] + 16, joints.chest[1] + 20)
        sketch.polygon(
            [left, right, (right[0] + 9, end), (right[0], end + 3), (left[0], end + 3), (left[0] - 9, end)], colour
        )
    elif look.extra == "backpack":
        middle = between(joints.chest, joints.hips, 0.42)
        sketch.ellipse(middle, 15.5 * look.build**0.6, 14, shade(colour, 0.85))


def draw_extra_front(sketch: Sketch, look: CharacterLook, joints: Joints) -> None:
    """Draw a scarf, tie or belt, the straps of a backpack, or the clasp of a cape."""
    torso = Torso(look, joints)
    colour = look.extra_colour
    if look.extra == "scarf":
        sketch.limb(torso.at(0.62, 0.05), torso.at(0.7, 0.55), 5.5, shade(colour, 0.8))
        sketch.limb(torso.at(0.2, 0.0), torso.at(0.8, 0.0), 7, colour)
    elif look.extra == "tie":
        sketch.polygon(
            [torso.at(0.44, 0.04), torso.at(0.56, 0.04), torso.at(0.6, 0.6), torso.at(0.5, 0.72), torso.at(0.4, 0.6)],
            colour,
        )
    elif look.extra == "belt":
        sketch.polygon(torso.patch(0, 0.8, 1, 0.97), colour)
        sketch.polygon(torso.patch(0.42, 0.8, 0.58, 0.97), shade(colour, 1.6))
    elif look.extra == "backpack":
        for u in (0.14, 0.74):
            sketch.polygon(torso.patch(u, 0, u + 0.13, 0.6), colour)
    elif look.extra == "cape":
        sketch.limb(torso.at(0.1, 0.03), torso.at(0.9, 0.03), 4, shade(colour, 0.85))


def _solid(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    sketch.polygon(torso.patch(0, 0.9, 1, 1), shade(look.shirt_colour, 0.8))


def _stripes(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    for v in (0.16, 0.46, 0.76):
        sketch.polygon(torso.patch(0, v, 1, v + 0.15), second)


def _bars(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    for u in (0.08, 0.42, 0.76):
        sketch.polygon(torso.patch(u, 0.03, u + 0.16, 1), second)


def _dots(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    for row, v in enumerate((0.22, 0.5, 0.78)):
        for u in (0.2, 0.5, 0.8) if row % 2 else (0.35, 0.66):
            sketch.circle(torso.at(u, v), 2.3, second)


def _checks(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    for row in range(4):
        for column in range(row % 2, 4, 2):
            sketch.polygon(torso.patch(column / 4, row / 4 + 0.03, column / 4 + 0.25, row / 4 + 0.25), second)


def _sash(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    sketch.polygon(
        [
            torso.at(0, 0.03),
            torso.at(0.3, 0.03),
            torso.at(1, 0.75),
            torso.at(1, 1),
            torso.at(0.88, 1),
            torso.at(0, 0.3),
        ],
        second,
    )


def _halves(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    sketch.polygon(torso.patch(0.5, 0.03, 1, 1), second)


def _hoop(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    sketch.polygon(torso.patch(0, 0.32, 1, 0.66), second)


def _jacket(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    for u0, u1, lapel in ((0, 0.3, 0.4), (1, 0.7, 0.6)):
        sketch.polygon(
            [torso.at(u0, 0.02), torso.at(lapel, 0.02), torso.at(u1, 0.5), torso.at(u1, 1), torso.at(u0, 1)], second
        )


def _overalls(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    colour = look.lower_colour
    sketch.polygon(torso.patch(0.18, 0.38, 0.82, 0.8), colour)
    sketch.polygon(torso.patch(0, 0.72, 1, 1), colour)
    for u in (0.18, 0.7):
        sketch.polygon(torso.patch(u, 0.02, u + 0.12, 0.4), colour)
    sketch.circle(torso.at(0.5, 0.58), 2.6, second)


def _star(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    sketch.polygon(star_points(5, 7.5, 3.3, centre=torso.at(0.5, 0.5)), second)


def _zigzag(sketch: Sketch, torso: Torso, second: Colour, look: CharacterLook) -> None:
    top = [torso.at(u, v) for u, v in zip(np.linspace(0, 1, 7), (0.35, 0.6) * 3 + (0.35,), strict=True)]
    low = [torso.at(u, v) for u, v in zip(np.linspace(0, 1, 7), (0.6, 0.85) * 3 + (0.6,), strict=True)]
    sketch.polygon([*top, *low[::-1]], second)


_PATTERNS = {
    "solid": _solid,
    "stripes": _stripes,
    "bars": _bars,
    "dots": _dots,
    "checks": _checks,
    "sash": _sash,
    "halves": _halves,
    "hoop": _hoop,
    "jacket": _jacket,
    "overalls": _overalls,
    "star": _star,
    "zigzag": _zigzag,
}
