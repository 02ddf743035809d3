"""New colours for sprites: team colours as the game makes them, and whole palettes, which make new identities."""

from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

Colour = tuple[int, int, int]

TEAM_MARK: tuple[str, ...] = (
    *("F49AC1", "3F0016", "55002A", "690039", "7B0045", "8C0051", "9E005D", "B10069", "C30074", "D6007F"),
    *("EC008C", "EE3D96", "EF5BA1", "F172AC", "F287B6", "F4ADCD", "F6ADCD", "F8C1D9", "FAD5E5", "FDE9F1"),
)
"""The shades of magenta that stand for a team's colour; the first is the reference (core/team-colors.cfg)."""

_MARKS = np.array([[int(mark[i : i + 2], 16) for i in (0, 2, 4)] for mark in TEAM_MARK])


def _codes(colours: np.ndarray) -> np.ndarray:
    """Colours ``[..., 3]`` as single numbers 0xRRGGBB."""
    return colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)


_MARK_CODES = _codes(_MARKS)
_MARK_ORDER = np.argsort(_MARK_CODES)

RED: Colour = (255, 0, 0)
TEAM_COLOURS: tuple[Colour, ...] = (
    *(RED, (46, 65, 155), (98, 182, 100), (147, 0, 157), (255, 126, 0), (90, 90, 90), (137, 83, 32)),
    *((225, 225, 225), (48, 203, 192), (255, 243, 90)),
)
"""The colours players choose from."""


@lru_cache
def team_palette(colour: Colour) -> np.ndarray:
    """What becomes of the shades of :data:`TEAM_MARK` in a team of this colour: ``[len(TEAM_MARK), 3]`` uint8.

    A shade as bright as the reference becomes the colour, darker ones go towards black, brighter ones towards white,
    in proportion of their mean brightness.
    """
    means = _MARKS.mean(1)
    dark = np.minimum(means / means[0], 1)[:, None]
    light = np.clip((means - means[0]) / (255 - means[0]), 0, 1)[:, None]
    return (np.asarray(colour) * dark * (1 - light) + 255 * light).round().astype(np.uint8)


@dataclass(frozen=True)
class Recolouring:
    """How all sprites of one identity are coloured.

    Attributes:
        team: the team's colour.
        matrix: ``[3, 3]`` rows that make red, green and blue of the sprite's red, green and blue; None to leave them.
        gamma: below 1 makes middle tones brighter, above 1 darker.
        stretch: width by height, against the sprite's.
    """

    team: Colour = RED
    matrix: tuple[tuple[float, float, float], ...] | None = None
    gamma: float = 1.0
    stretch: float = 1.0

    @classmethod
    def draw(cls, rng: Random) -> "Recolouring":
        """Another palette, far from the sprite's own: hue turned, channels weighted, brighter or darker; the figure
        a little wider or narrower. Greys (bones, armour) take a tint."""
        matrix = _hue_rotation(rng.uniform(50, 310)) * rng.uniform(0.75, 1.35) + np.full((3, 3), 1 / 3) * rng.uniform(
            -0.1, 0.1
        )
        tint = np.array([rng.uniform(0.6, 1.2) for _ in range(3)])
        return cls(
            team=rng.choice(TEAM_COLOURS),
            matrix=tuple(tuple(row) for row in (matrix * tint[:, None]).tolist()),
            gamma=rng.uniform(0.75, 1.35),
            stretch=rng.uniform(0.85, 1.18),
        )

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """The sprite ``[H, W, 4]`` uint8 in these colours (``stretch`` is the painter's business)."""
        result = pixels.copy()
        codes = _codes(pixels[..., :3])
        place = np.searchsorted(_MARK_CODES, codes, sorter=_MARK_ORDER).clip(max=len(_MARK_CODES) - 1)
        mark = _MARK_ORDER[place]
        marked = _MARK_CODES[mark] == codes
        result[marked, :3] = team_palette(self.team)[mark[marked]]
        if self.matrix is not None:
            colours = result[..., :3].astype(np.float32) @ np.asarray(self.matrix, dtype=np.float32).T
            colours = 255 * (colours.clip(0, 255) / 255) ** self.gamma
            result[..., :3] = colours.round().astype(np.uint8)
        return result


def _hue_rotation(degrees: float) -> np.ndarray:
    """Turns colours about the axis of greys."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    along = np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return along + cosine * (np.eye(3) - along) + sine * across
