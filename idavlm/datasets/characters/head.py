"""The head: hair, face, beard, glasses and hat."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from idavlm.datasets.characters.activities import Activity
from idavlm.datasets.characters.hair import draw_back_hair, draw_front_hair
from idavlm.datasets.characters.hats import HATS_OVER_HAIR, draw_hat
from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.shapes import Sketch, arc, moved, shade

MOUTHS = ("smile", "grin", "open", "calm", "sad")
WHITE = (252, 252, 250)
DARK = (44, 30, 34)


@dataclass(frozen=True)
class Expression:
    """Expression of a face in one image."""

    mouth: str
    blink: bool
    brow_lift: float
    look: float
    """Direction of the face: -1 left, 1 right."""
    gaze_down: bool

    @classmethod
    def drawn(cls, rng: np.random.Generator, activity: Activity) -> "Expression":
        turn = activity.look * 0.7 + rng.uniform(-0.45, 0.45)
        mouth = str(rng.choice(MOUTHS, p=(0.4, 0.25, 0.12, 0.15, 0.08)))
        return cls(mouth, bool(rng.random() < 0.07), rng.uniform(-0.8, 1.2), turn, activity.gaze_down)


def head_sketches(look: CharacterLook, expression: Expression, tilt: float) -> tuple[Sketch, Sketch]:
    """Sketch the back layer (long hair) and the front layer of the head, both with the centre of the head as origin."""
    width, height = 15.0 * look.head_width, 15.5 * look.head_height
    back, front = Sketch(), Sketch()
    covered = look.hat in HATS_OVER_HAIR
    draw_back_hair(back, look, width, height, covered)
    shift = expression.look * 3.6
    for side in (-1, 1):
        front.circle((side * width * 0.97 - shift * 0.4, 2), 3.1, shade(look.skin, 0.9))
    front.ellipse((0, 0), width, height, look.skin)
    _draw_beard(front, look, width, height, shift)
    _draw_face(front, look, expression, shift)
    draw_front_hair(front, look, width, height, covered)
    _draw_glasses(front, look, shift)
    draw_hat(front, look, width, height, 1 if expression.look >= 0 else -1)
    tilted = Sketch(), Sketch()
    for upright, turned in zip((back, front), tilted, strict=True):
        turned.add(upright, angle=tilt)
    return tilted


def _draw_face(sketch: Sketch, look: CharacterLook, expression: Expression, shift: float) -> None:
    eye_y = 1.2 + 1.2 * expression.gaze_down
    closed = expression.blink or expression.gaze_down
    for side in (-1, 1):
        x = side * 5.6 + shift
        if closed:
            sketch.stroke(arc((x, eye_y), 2.4, 1.5, 10, 170, 6), 1.1, DARK)
        else:
            sketch.ellipse((x, eye_y), 2.7, 3.2, WHITE)
            sketch.ellipse((x + expression.look * 0.8, eye_y + 0.2), 1.75, 2.3, look.eye_colour)
        brow_y = eye_y - 4.8 - expression.brow_lift
        brow = shade(look.hair_colour, 0.75)
        sketch.limb((x - 2.3, brow_y + 0.3 * side), (x + 2.3, brow_y - 0.3 * side), look.brows, brow)
    for side in (-1, 1):
        sketch.ellipse((side * 9 + shift * 0.8, 6.2), 2.3, 1.5, _blush(look))
    sketch.ellipse((shift * 1.25, 4.6), 1.4, 1.1, shade(look.skin, 0.8))
    _draw_mouth(sketch, expression.mouth, (shift * 1.05, 8.4))


def _draw_mouth(sketch: Sketch, mouth: str, at: tuple[float, float]) -> None:
    x, y = at
    if mouth == "smile":
        sketch.stroke(arc((x, y - 1.6), 4, 2.8, 15, 165, 9), 1.3, DARK)
    elif mouth == "grin":
        sketch.dome((x, y - 1), 4.4, 4, DARK, 0, 180)
        sketch.polygon([(x - 3.9, y - 1), (x + 3.9, y - 1), (x + 3.3, y + 0.5), (x - 3.3, y + 0.5)], WHITE)
    elif mouth == "open":
        sketch.ellipse((x, y + 0.3), 2.2, 2.6, (120, 40, 48))
    elif mouth == "calm":
        sketch.limb((x - 2.6, y), (x + 2.6, y), 1.2, DARK)
    else:
        sketch.stroke(arc((x, y + 2.2), 3.4, 2.4, 200, 340, 9), 1.3, DARK)


def _blush(look: CharacterLook) -> tuple[int, int, int]:
    red, green, blue = look.skin
    return min(255, red + 12), int(green * 0.82), int(blue * 0.8)


def _draw_beard(sketch: Sketch, look: CharacterLook, width: float, height: float, shift: float) -> None:
    colour = shade(look.hair_colour, 0.9)
    if look.beard == "full":
        outer = arc((0, 0.5), width * 1.02, height * 1.12, 5, 175)
        inner = arc((shift * 0.5, 2.5), width * 0.72, height * 0.3, 175, 5)
        sketch.polygon(np.concatenate([outer, inner]), colour)
    elif look.beard == "goatee":
        sketch.ellipse((shift * 0.8, height * 0.9), 4.6, 5, colour)
    if look.beard in ("full", "moustache"):
        for side in (-1, 1):
            sketch.ellipse((shift + side * 2.8, 6.7), 3.6, 1.6, colour, angle=side * 14)


def _draw_glasses(sketch: Sketch, look: CharacterLook, shift: float) -> None:
    if look.glasses == "none":
        return
    colour = look.glasses_colour
    sketch.limb((-13 + shift * 0.5, 0.4), (13 + shift * 0.5, 0.4), 1.3, colour)
    for side in (-1, 1):
        centre = np.array([side * 5.8 + shift, 1.4])
        if look.glasses == "sunglasses":
            sketch.ellipse(centre, 4.8, 4, colour)
            sketch.limb(moved(centre, -1.5, -1.2), moved(centre, 0.5, -1.8), 1.2, shade(colour, 1.5))
        elif look.glasses == "round":
            sketch.stroke(arc(centre, 4.3, 4.3, 0, 360, 20), 1.5, colour)
        else:
            corners = centre + np.array([(-4.4, -3.4), (4.4, -3.4), (4.4, 3.4), (-4.4, 3.4), (-4.4, -4.1)])
            for start, end in pairwise(corners):
                sketch.limb(start, end, 1.5, colour)
