"""Virtual people: new identities made of the photographs of training people.

A virtual person has the upper face of one person, the lower face of another, and a face shape of their own; all of
it is the same in each of their photos, while pose, expression and light vary as they do in the photographs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import numpy as np

Photographs = Mapping[str, Mapping[str, np.ndarray]]

GRID = 4
"""Control points a side of the change of shape."""

MAX_SHIFT = 0.06
"""Largest shift of a control point, in shares of the photograph's height."""


@dataclass(frozen=True)
class Sitter:
    """An identity: ``photos`` ``[H, W]`` uint8 by the photographs they come from."""

    key: str
    photos: Mapping[str, np.ndarray]


def virtual_people(photographs: Photographs, count: int, rng: Random) -> list[Sitter]:
    """``count`` virtual people, of all pairs of people in turn.

    Args:
        photographs: of at least two people, all of one size.
    """
    people = list(photographs)
    pairs = [(upper, lower) for upper in people for lower in people if upper != lower]
    order = rng.sample(pairs, len(pairs))
    made = []
    for number in range(count):
        upper, lower = order[number % len(order)]
        shifts = [[[rng.uniform(-1, 1) for _ in range(GRID)] for _ in range(GRID)] for _ in range(2)]
        seam = rng.uniform(0.5, 0.66)
        photos = {}
        for name, photo in photographs[upper].items():
            other = _best_match(photo, photographs[lower], seam)
            photos[name] = reshape(join(photo, other, seam), np.asarray(shifts) * MAX_SHIFT * photo.shape[0])
        made.append(Sitter(f"{upper}-{lower}-{number}", photos))
    return made


def join(upper: np.ndarray, lower: np.ndarray, seam: float) -> np.ndarray:
    """The upper part of one photograph over the lower part of another, of the same brightness where they meet."""
    height = upper.shape[0]
    band = _band(height, seam)
    gain = np.clip(upper[band].mean() / max(lower[band].mean(), 1), 0.6, 1.6)
    share = np.clip((np.arange(height) - band.start) / (band.stop - band.start), 0, 1)[:, None]
    return (upper * (1 - share) + np.minimum(lower * gain, 255) * share).round().astype(np.uint8)


def reshape(photo: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Move the points of a photograph ``[H, W]`` by ``shifts`` ``[2, GRID, GRID]`` pixels (down, right), smoothly."""
    height, width = photo.shape
    rows, columns = _smooth_weights(height), _smooth_weights(width)
    down, right = (rows @ shift @ columns.T for shift in shifts)
    y = np.clip(np.arange(height)[:, None] + down, 0, height - 1.001)
    x = np.clip(np.arange(width)[None, :] + right, 0, width - 1.001)
    top, left = y.astype(np.int64), x.astype(np.int64)
    part_y, part_x = y - top, x - left
    source = photo.astype(np.float32)
    above = source[top, left] * (1 - part_x) + source[top, left + 1] * part_x
    below = source[top + 1, left] * (1 - part_x) + source[top + 1, left + 1] * part_x
    return (above * (1 - part_y) + below * part_y).round().astype(np.uint8)


def _best_match(photo: np.ndarray, others: Mapping[str, np.ndarray], seam: float) -> np.ndarray:
    """The photograph that fits best where the two are joined: most often the one of the same pose."""
    band = _band(photo.shape[0], seam)
    mine = photo[band].astype(np.float32)

    def misfit(other: np.ndarray) -> float:
        theirs = other[band].astype(np.float32)
        return float(np.abs(theirs - theirs.mean() - mine + mine.mean()).mean())

    return min(others.values(), key=misfit)


def _band(height: int, seam: float) -> slice:
    """Rows over which one photograph goes over into the other."""
    return slice(round((seam - 0.07) * height), round((seam + 0.07) * height))


def _smooth_weights(length: int) -> np.ndarray:
    """``[length, GRID]`` weights of the control points along a side, each with a bell around it."""
    positions = np.linspace(0, 1, length)[:, None]
    weights = np.exp(-(((positions - np.linspace(0, 1, GRID)) * (GRID - 1)) ** 2))
    return weights / weights.sum(1, keepdims=True)
