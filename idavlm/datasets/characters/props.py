"""Objects that characters hold or use, placed relative to the joints."""

from collections.abc import Callable

import numpy as np

from idavlm.datasets.characters.look import clothes_colour
from idavlm.datasets.characters.pose import Joints
from idavlm.datasets.characters.shapes import Sketch, arc, between, moved, shade

WOOD = (150, 98, 56)
METAL = (92, 96, 108)
Layers = tuple[Sketch, Sketch]


def _book(joints: Joints, rng: np.random.Generator) -> Layers:
    front = Sketch()
    left, right = joints.hands
    middle = moved(between(left, right, 0.5), 0, -1)
    cover = clothes_colour(rng)
    for side in (-1, 1):
        outer = moved(middle, side * 13.5, -5)
        front.polygon(
            [moved(middle, 0, -6), moved(outer, 0, -7), moved(outer, 0, 9), moved(middle, 0, 9)],
            shade(cover, 0.8 if side < 0 else 1),
        )
        front.polygon(
            [
                moved(middle, 0, -8.5),
                moved(outer, -side * 1.5, -8.5),
                moved(outer, -side * 1.5, -5),
                moved(middle, 0, -5),
            ],
            (250, 246, 232),
        )
    return Sketch(), front


def _cup(joints: Joints, rng: np.random.Generator) -> Layers:
    front = Sketch()
    x, y = moved(joints.hands[1], -2.5, -4.5)
    colour = clothes_colour(rng)
    front.stroke(arc((x + 5.5, y), 4, 4, -90, 90, 8), 2, colour)
    front.polygon([(x - 5.5, y - 6), (x + 5.5, y - 6), (x + 4.2, y + 6), (x - 4.2, y + 6)], colour)
    front.ellipse((x, y - 6), 5.5, 1.6, shade(colour, 0.6))
    return Sketch(), front


def _stool(joints: Joints, rng: np.random.Generator) -> Layers:
    back = Sketch()
    x, y = joints.hips
    colour = clothes_colour(rng)
    back.rectangle(x - 11, y + 4, x + 11, 0, shade(colour, 0.75))
    back.limb((x - 12, y + 5), (x + 12, y + 5), 5, colour)
    return back, Sketch()


def _box(joints: Joints, rng: np.random.Generator) -> Layers:
    front = Sketch()
    x, y = moved(between(*joints.hands, 0.5), 0, 4)
    colour = shade((186, 132, 74), rng.uniform(0.75, 1.1))
    front.rectangle(x - 17, y - 20, x + 17, y, shade(colour, 0.55))
    front.rectangle(x - 15.4, y - 18.8, x + 15.4, y - 1.6, colour)
    front.polygon([(x - 17, y - 20), (x + 17, y - 20), (x + 14, y - 25), (x - 14, y - 25)], shade(colour, 0.72))
    front.rectangle(x - 3, y - 25, x + 3, y - 8, (246, 236, 208))
    return Sketch(), front


def _ball(joints: Joints, rng: np.random.Generator) -> Layers:
    back = Sketch()
    centre = joints.feet[1] + np.array([13.5, -4])
    back.circle(centre, 8.5, clothes_colour(rng))
    back.stroke(arc(centre, 8.5, 8.5, 200, 340, 8) * (1, 0.5) + (0, centre[1] * 0.5 + 2), 2.4, (252, 252, 250))
    return back, Sketch()


def _umbrella(joints: Joints, rng: np.random.Generator) -> Layers:
    back, front = Sketch(), Sketch()
    hand = joints.hands[1]
    top = np.array([hand[0] - 3, joints.head[1] - 22])
    colours = clothes_colour(rng), clothes_colour(rng)
    front.limb(moved(hand, 0, 4), top, 2, METAL)
    wide = 27.0
    front.polygon([*arc(top, wide, 15, 180, 360, 20)], colours[0])
    front.polygon([*arc(top, wide * 0.33, 15, 180, 360, 12)], colours[1])
    front.limb(top - (0, 14), top - (0, 18), 1.6, METAL)
    return back, front


def _guitar(joints: Joints, rng: np.random.Generator) -> Layers:
    front = Sketch()
    low, high = joints.hands
    along = (high - low) / max(np.hypot(*(high - low)), 1e-6)
    colour = clothes_colour(rng)
    body = low + along * -1
    end = high + along * 9
    front.circle(body - along * 4, 9.5, shade(colour, 0.92))
    front.circle(body + along * 6, 7, shade(colour, 0.92))
    front.limb(body, end, 3, WOOD)
    front.limb(end - along * 2, end + along * 3, 5, shade(WOOD, 0.7))
    front.circle(body + along * 1.5, 3, (60, 40, 30))
    return Sketch(), front


def _broom(joints: Joints, rng: np.random.Generator) -> Layers:
    front = Sketch()
    upper, lower = joints.hands
    foot = np.array([lower[0] + (lower[0] - upper[0]) * 0.9 + 3, -9.0])
    front.limb(upper + (upper - lower) * 0.5, foot, 2.4, WOOD)
    colour = clothes_colour(rng)
    front.polygon([moved(foot, -4, -1), moved(foot, 4, -1), moved(foot, 10, 9), moved(foot, -7, 9)], colour)
    front.polygon([moved(foot, -4, -1), moved(foot, 4, -1), moved(foot, 5, 2), moved(foot, -5, 2)], shade(colour, 0.7))
    return Sketch(), front


def _barbell(joints: Joints, rng: np.random.Generator) -> Layers:
    back = Sketch()
    left, right = joints.hands
    y = (left[1] + right[1]) / 2
    colour = clothes_colour(rng)
    back.limb((left[0] - 9, y), (right[0] + 9, y), 2.4, METAL)
    for x in (left[0] - 9, right[0] + 9):
        back.limb((x, y - 9), (x, y + 9), 6, colour)
    return back, Sketch()


PROPS: dict[str, Callable[[Joints, np.random.Generator], Layers]] = {
    "book": _book,
    "cup": _cup,
    "stool": _stool,
    "box": _box,
    "ball": _ball,
    "umbrella": _umbrella,
    "guitar": _guitar,
    "broom": _broom,
    "barbell": _barbell,
}
"""Functions that sketch an object: the layer at the back of the figure, and the layer in front of body and head."""
