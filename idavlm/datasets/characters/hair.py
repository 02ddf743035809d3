"""Hair: the part in front of the face and the part at the back of the body."""

from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.shapes import Sketch, arc, shade


def draw_back_hair(sketch: Sketch, look: CharacterLook, width: float, height: float, covered: bool) -> None:
    """Draw the hair at the back of head and body. If ``covered``, a hat hides the parts that stick out at the top."""
    colour, dark = look.hair_colour, shade(look.hair_colour, 0.82)
    style = look.hair_style
    if style == "long":
        sketch.ellipse((0, 0), width * 1.2, height * 1.12, dark)
        sketch.polygon(
            [
                (-width * 1.2, 0),
                (width * 1.2, 0),
                (width * 1.32, 29),
                (width * 0.6, 33),
                (-width * 0.6, 33),
                (-width * 1.32, 29),
            ],
            dark,
        )
    elif style == "bob":
        sketch.ellipse((0, 0), width * 1.22, height * 1.12, dark)
        sketch.polygon(
            [(-width * 1.22, 0), (width * 1.22, 0), (width * 1.28, height * 0.92), (-width * 1.28, height * 0.92)], dark
        )
    elif style == "curls":
        for x, y in arc((0, -1), width * 1.12, height * 1.08, 140, 400, 11):
            if not (covered and y < -6):
                sketch.circle((x, y), 6.6, dark)
    elif style == "ponytail":
        sketch.limb((width * 0.7, -height * 0.5), (width * 1.55, height * 0.1), 8, dark, 10)
        sketch.limb((width * 1.55, height * 0.1), (width * 1.4, height * 1.5), 10, dark, 3)
    elif style == "pigtails":
        for side in (-1, 1):
            sketch.limb((side * width * 1.15, 0), (side * width * 1.5, height * 1.1), 11, dark, 5)
            sketch.circle((side * width * 1.1, -1), 3.4, look.extra_colour)
    elif style == "bun" and not covered:
        sketch.circle((0, -height * 1.28), 7.5, colour)
        sketch.limb((-4, -height * 1.0), (4, -height * 1.0), 3, look.extra_colour)


def draw_front_hair(sketch: Sketch, look: CharacterLook, width: float, height: float, covered: bool) -> None:
    """Draw the hair in front of the face."""
    colour, dark = look.hair_colour, shade(look.hair_colour, 0.86)
    style = look.hair_style
    if style == "bald":
        return
    if style == "mohawk":
        _mohawk(sketch, look, height, covered)
        return
    if style == "spiky" and not covered:
        for x, y in arc((0, -2), width * 0.95, height * 0.95, 195, 345, 7):
            sketch.polygon([(x - 5, y + 4), (x * 1.38, y * 1.4), (x + 5, y + 4)], colour)
    if style in ("parted", "long", "ponytail"):
        sketch.polygon(
            [
                *arc((0, 0), width * 1.08, height * 1.1, 176, 364, 20),
                (width * 0.86, -1),
                (width * 0.62, -height * 0.5),
                (-width * 0.2, -height * 0.62),
                (-width * 0.78, -height * 0.2),
            ],
            colour,
        )
        sketch.stroke(arc((width * 0.1, -2), width * 0.8, height * 0.85, 225, 290, 8), 1.2, dark)
    elif style == "bob":
        sketch.dome((0, 0), width * 1.1, height * 1.1, colour, 192, 348)
        sketch.polygon([(-width * 1.05, -4), (-width * 0.75, -4), (-width * 0.85, 9), (-width * 1.2, 9)], colour)
        sketch.polygon([(width * 1.05, -4), (width * 0.75, -4), (width * 0.85, 9), (width * 1.2, 9)], colour)
    elif style == "curls":
        for x, y in arc((0, 1), width * 0.86, height * 0.82, 190, 350, 6):
            sketch.circle((x, y), 5.6, colour)
        sketch.dome((0, -2), width * 0.9, height * 0.95, colour, 200, 340)
    else:
        sketch.dome((0, 0), width * 1.08, height * 1.09, colour, 200, 340)
        for side in (-1, 1):
            sketch.polygon([(side * width * 1.03, -5.6), (side * width * 0.82, -5.6), (side * width * 0.93, 3)], colour)
    if style == "long":
        for side in (-1, 1):
            sketch.limb((side * width * 1.06, -3), (side * width * 1.16, 20), 6, colour, 4)


def _mohawk(sketch: Sketch, look: CharacterLook, height: float, covered: bool) -> None:
    sketch.ellipse((0, -height * 0.78), 5, 5, look.hair_colour)
    if covered:
        return
    for x in (-5, 0, 5):
        sketch.polygon(
            [(x * 0.6 - 4.5, -height * 0.7), (x * 1.7, -height * 1.75 + abs(x)), (x * 0.6 + 4.5, -height * 0.7)],
            look.hair_colour,
        )
