"""Subjects of the photographs, and virtual subjects: new identities made of the photographs of training subjects.

A virtual subject has the upper face of one subject, the lower face of another, and a face shape of its own. All of
these are the same in all its photos, while pose, expression and light vary as in the photographs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import numpy as np

Photographs = Mapping[str, Mapping[str, np.ndarray]]
"""Photographs ``[H, W]`` uint8 by subject and file."""

GRID = 4
"""Control points per side of the deformation."""

MAX_SHIFT = 0.06
"""Maximum shift of a control point, as a share of the height of the photograph."""


@dataclass(frozen=True)
class Subject:
    """An identity: ``photos`` ``[H, W]`` uint8 by the file of the original photograph."""

    key: str
    photos: Mapping[str, np.ndarray]


def virtual_subjects(photographs: Photographs, count: int, rng: Random) -> list[Subject]:
    """Create ``count`` virtual subjects from all pairs of subjects in turn.

    Args:
        photographs: photographs of at least two subjects, all of the same size.
        count: number of virtual subjects.
        rng: source of all random choices.
    """
    subjects = list(photographs)
    pairs = [(upper, lower) for upper in subjects for lower in subjects if upper != lower]
    order = rng.sample(pairs, len(pairs))
    made = []
    for number in range(count):
        upper, lower = order[number % len(order)]
        shifts = [[[rng.uniform(-1, 1) for _ in range(GRID)] for _ in range(GRID)] for _ in range(2)]
        seam = rng.uniform(0.5, 0.66)
        photos, unused = {}, dict(photographs[lower])
        for name, photo in photographs[upper].items():
            if not unused:
                break
            other = unused.pop(_best_match(photo, unused, seam))
            photos[name] = reshape(join(photo, other, seam), np.asarray(shifts) * MAX_SHIFT * photo.shape[0])
        made.append(Subject(f"{upper}-{lower}-{number}", photos))
    return made


def join(upper: np.ndarray, lower: np.ndarray, seam: float) -> np.ndarray:
    """Join the upper part of one photograph with the lower part of another; the brightness is matched at the seam."""
    height = upper.shape[0]
    band = _band(height, seam)
    gain = np.clip(upper[band].mean() / max(lower[band].mean(), 1), 0.6, 1.6)
    share = np.clip((np.arange(height) - band.start) / (band.stop - band.start), 0, 1)[:, None]
    return (upper * (1 - share) + np.minimum(lower * gain, 255) * share).round().astype(np.uint8)


def reshape(photo: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Deform a photograph ``[H, W]`` smoothly by ``shifts`` ``[2, GRID, GRID]`` in pixels (down, right)."""
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


def _best_match(photo: np.ndarray, others: Mapping[str, np.ndarray], seam: float) -> str:
    """File of the photograph that fits best at the seam; usually one with the same pose."""
    band = _band(photo.shape[0], seam)
    seam_pixels = photo[band].astype(np.float32)

    def distance(file: str) -> float:
        other_pixels = others[file][band].astype(np.float32)
        return float(np.abs(other_pixels - other_pixels.mean() - seam_pixels + seam_pixels.mean()).mean())

    return min(others, key=distance)


def _band(height: int, seam: float) -> slice:
    """Rows in which the two photographs are blended."""
    return slice(round((seam - 0.07) * height), round((seam + 0.07) * height))


def _smooth_weights(length: int) -> np.ndarray:
    """``[length, GRID]`` Gaussian weights of the control points along a side; each row sums to 1."""
    positions = np.linspace(0, 1, length)[:, None]
    weights = np.exp(-(((positions - np.linspace(0, 1, GRID)) * (GRID - 1)) ** 2))
    return weights / weights.sum(1, keepdims=True)
