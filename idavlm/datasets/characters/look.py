"""The look of a drawn character: attributes that depend on a seed and are the same in every image."""

import colorsys
from dataclasses import dataclass

import numpy as np

from idavlm.datasets.characters.shapes import Colour

SKIN_TONES: tuple[Colour, ...] = (
    (255, 224, 196),
    (247, 205, 170),
    (232, 183, 142),
    (210, 156, 112),
    (173, 118, 78),
    (134, 86, 56),
    (98, 62, 42),
)
HAIR_TONES: tuple[Colour, ...] = (
    (34, 28, 30),
    (74, 46, 30),
    (122, 76, 42),
    (196, 146, 70),
    (240, 208, 120),
    (190, 76, 34),
    (150, 150, 156),
    (236, 234, 230),
)
HAIR_STYLES = ("bald", "short", "parted", "spiky", "mohawk", "curls", "bob", "long", "bun", "ponytail", "pigtails")
HATS = ("none", "cap", "beanie", "top hat", "crown", "sun hat", "wizard hat", "helmet", "bandana", "flowers", "ears")
BEARDS = ("none", "moustache", "goatee", "full")
GLASSES = ("none", "round", "square", "sunglasses")
SHIRT_PATTERNS = (
    *("solid", "stripes", "bars", "dots", "checks", "sash", "halves"),
    *("hoop", "jacket", "overalls", "star", "zigzag"),
)
LOWER_GARMENTS = ("trousers", "shorts", "skirt", "robe")
EXTRAS = ("none", "cape", "scarf", "tie", "belt", "backpack")


@dataclass(frozen=True)
class CharacterLook:
    """Attributes that are the same in all images of one character. Colours are RGB in 0..255."""

    skin: Colour
    hair_style: str
    hair_colour: Colour
    beard: str
    brows: float
    head_width: float
    head_height: float
    height: float
    build: float
    shirt_pattern: str
    shirt_colour: Colour
    second_colour: Colour
    sleeves: str
    lower: str
    lower_colour: Colour
    shoe_colour: Colour
    hat: str
    hat_colour: Colour
    hat_trim: Colour
    glasses: str
    glasses_colour: Colour
    extra: str
    extra_colour: Colour
    eye_colour: Colour

    @classmethod
    def from_seed(cls, *seed: int) -> "CharacterLook":
        """Return the look for a seed of one or several non-negative integers."""
        rng = np.random.default_rng(seed)
        shirt = clothes_colour(rng)
        hat = clothes_colour(rng)
        return cls(
            skin=_jittered(rng, SKIN_TONES),
            hair_style=str(rng.choice(HAIR_STYLES)),
            hair_colour=clothes_colour(rng) if rng.random() < 0.35 else _jittered(rng, HAIR_TONES),
            beard=str(rng.choice(BEARDS, p=(0.64, 0.1, 0.1, 0.16))),
            brows=rng.uniform(0.9, 2.4),
            head_width=rng.uniform(0.9, 1.1),
            head_height=rng.uniform(0.92, 1.08),
            height=rng.uniform(0.8, 1.2),
            build=rng.uniform(0.82, 1.3),
            shirt_pattern=str(rng.choice(SHIRT_PATTERNS)),
            shirt_colour=shirt,
            second_colour=contrasting_colour(rng, shirt),
            sleeves=str(rng.choice(("long", "short", "second"))),
            lower=str(rng.choice(LOWER_GARMENTS, p=(0.5, 0.17, 0.2, 0.13))),
            lower_colour=clothes_colour(rng),
            shoe_colour=clothes_colour(rng),
            hat=str(rng.choice(HATS, p=(0.3, *(0.07,) * 10))),
            hat_colour=hat,
            hat_trim=contrasting_colour(rng, hat),
            glasses=str(rng.choice(GLASSES, p=(0.64, 0.12, 0.12, 0.12))),
            glasses_colour=clothes_colour(rng) if rng.random() < 0.5 else (40, 36, 40),
            extra=str(rng.choice(EXTRAS, p=(0.3, 0.18, 0.18, 0.1, 0.12, 0.12))),
            extra_colour=clothes_colour(rng),
            eye_colour=_jittered(rng, ((60, 40, 30), (40, 80, 120), (50, 90, 60), (30, 26, 30))),
        )


def clothes_colour(rng: np.random.Generator) -> Colour:
    """Draw a colour for clothes: any hue, mostly saturated; one in seven is white, grey or black."""
    if rng.random() < 1 / 7:
        value = rng.choice((0.2, 0.5, 0.95)) + rng.uniform(-0.05, 0.05)
        return hsv(rng.random(), rng.uniform(0, 0.08), value)
    # Greens and violets cover more of the hue circle than of real clothes, and are garish if saturated.
    hue = float(
        np.interp(rng.random(), (0, 0.22, 0.36, 0.5, 0.64, 0.82, 1), (-0.03, 0.11, 0.17, 0.42, 0.55, 0.67, 0.97))
    )
    strength = 0.85 if 0.17 < hue < 0.45 or hue > 0.68 else 1
    return hsv(hue, rng.uniform(0.5, 0.92) * strength, rng.uniform(0.5, 0.98))


def contrasting_colour(rng: np.random.Generator, other: Colour) -> Colour:
    """Draw a colour for clothes that contrasts with ``other``."""
    for _ in range(20):
        colour = clothes_colour(rng)
        if np.abs(np.subtract(colour, other)).sum() > 220:
            return colour
    return (250, 250, 250) if sum(other) < 380 else (40, 40, 60)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Convert hue (period 1), saturation and value (both clamped to 0..1) to RGB in 0..255."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return int(red * 255), int(green * 255), int(blue * 255)


def _jittered(rng: np.random.Generator, tones: tuple[Colour, ...]) -> Colour:
    tone = tones[rng.integers(len(tones))]
    return tuple(int(min(max(value + rng.uniform(-10, 10), 0), 255)) for value in tone)
