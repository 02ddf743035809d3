"""Recolouring of sprites: team colours as in the game, and random palettes, which create new identities."""

from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

Colour = tuple[int, int, int]

TEAM_SHADES: tuple[str, ...] = (
    *("F49AC1", "3F0016", "55002A", "690039", "7B0045", "8C0051", "9E005D", "B10069", "C30074", "D6007F"),
    *("EC008C", "EE3D96", "EF5BA1", "F172AC", "F287B6", "F4ADCD", "F6ADCD", "F8C1D9", "FAD5E5", "FDE9F1"),
)
"""Shades of magenta that the game replaces by the team colour; the first is the base shade (core/team-colors.cfg)."""

_SHADES = np.array([[int(shade[i : i + 2], 16) for i in (0, 2, 4)] for shade in TEAM_SHADES])


def _codes(colours: np.ndarray) -> np.ndarray:
    """Convert colours ``[..., 3]`` to numbers 0xRRGGBB."""
    return colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)


_SHADE_CODES = _codes(_SHADES)
_SHADE_ORDER = np.argsort(_SHADE_CODES)

RED: Colour = (255, 0, 0)
TEAM_COLOURS: tuple[Colour, ...] = (
    *(RED, (46, 65, 155), (98, 182, 100), (147, 0, 157), (255, 126, 0), (90, 90, 90), (137, 83, 32)),
    *((225, 225, 225), (48, 203, 192), (255, 243, 90)),
)
"""Team colours of the game."""


@lru_cache
def team_palette(colour: Colour) -> np.ndarray:
    """Replacements of the shades :data:`TEAM_SHADES` for a team colour: ``[len(TEAM_SHADES), 3]`` uint8.

    The base shade becomes the team colour. Darker shades are interpolated towards black and brighter shades towards
    white, in proportion to their mean brightness.
    """
    means = _SHADES.mean(1)
    dark = np.minimum(means / means[0], 1)[:, None]
    light = np.clip((means - means[0]) / (255 - means[0]), 0, 1)[:, None]
    return (np.asarray(colour) * dark * (1 - light) + 255 * light).round().astype(np.uint8)


@dataclass(frozen=True)
class Recolouring:
    """Colour transformation of all sprites of one identity. The default is the original palette.

    Attributes:
        team: team colour.
        matrix: ``[3, 3]`` colour matrix, applied to (red, green, blue); None for the identity.
        gamma: exponent of the values; below 1, midtones become brighter, above 1 darker.
        stretch: horizontal scale of the figure.
    """

    team: Colour = RED
    matrix: tuple[tuple[float, float, float], ...] | None = None
    gamma: float = 1.0
    stretch: float = 1.0

    @classmethod
    def draw(cls, rng: Random) -> "Recolouring":
        """Draw a palette that differs clearly from the original: rotated hue, scaled channels, other brightness.

        Greys (bones, armour) are tinted, and the figure becomes slightly wider or narrower.
        """
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
        """Recolour a sprite ``[H, W, 4]`` uint8. ``stretch`` is not applied here but when the image is painted."""
        result = pixels.copy()
        codes = _codes(pixels[..., :3])
        place = np.searchsorted(_SHADE_CODES, codes, sorter=_SHADE_ORDER).clip(max=len(_SHADE_CODES) - 1)
        shade = _SHADE_ORDER[place]
        is_team = _SHADE_CODES[shade] == codes
        result[is_team, :3] = team_palette(self.team)[shade[is_team]]
        if self.matrix is not None:
            colours = result[..., :3].astype(np.float32) @ np.asarray(self.matrix, dtype=np.float32).T
            colours = 255 * (colours.clip(0, 255) / 255) ** self.gamma
            result[..., :3] = colours.round().astype(np.uint8)
        return result


def _hue_rotation(degrees: float) -> np.ndarray:
    """Matrix that rotates colours about the grey axis."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    along = np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return along + cosine * (np.eye(3) - along) + sine * across
