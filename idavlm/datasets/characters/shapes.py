"""Figures of coloured polygons: composed in arbitrary units, measured, moved, and drawn antialiased at any size."""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

OVERSAMPLING = 3


class Shape(NamedTuple):
    points: np.ndarray
    colour: Colour


class Drawn(NamedTuple):
    """A drawn sketch: an RGBA layer with its top left pixel at (``left``, ``top``) of the image."""

    layer: Image.Image
    left: int
    top: int


class Sketch:
    """A list of polygons; later ones are in front. x points right, y down; the caller chooses the unit."""

    def __init__(self) -> None:
        self.shapes: list[Shape] = []

    def polygon(self, points: ArrayLike, colour: Colour) -> None:
        """Add a polygon through ``points`` ``[N, 2]``."""
        self.shapes.append(Shape(np.asarray(points, dtype=np.float64), colour))

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.polygon(((left, top), (right, top), (right, bottom), (left, bottom)), colour)

    def ellipse(self, centre: Point, width: float, height: float, colour: Colour, angle: float = 0) -> None:
        """Add an ellipse of the given half ``width`` and half ``height``, turned by ``angle`` degrees."""
        points = (_SMALL_CIRCLE if max(width, height) < 5 else _CIRCLE) * (width, height)
        self.polygon((turned(points, angle) if angle else points) + centre, colour)

    def circle(self, centre: Point, radius: float, colour: Colour) -> None:
        self.ellipse(centre, radius, radius, colour)

    def dome(self, centre: Point, width: float, height: float, colour: Colour, start: float, end: float) -> None:
        """Add the segment of an ellipse between ``start`` and ``end`` degrees (0 right, 90 down)."""
        self.polygon(arc(centre, width, height, start, end), colour)

    def limb(self, start: Point, end: Point, width: float, colour: Colour, end_width: float | None = None) -> None:
        """Add a stroke with round ends, ``width`` wide at ``start`` and ``end_width`` at ``end``."""
        x, y = end[0] - start[0], end[1] - start[1]
        length = math.hypot(x, y) or 1
        x, y = x / length, y / length
        round_end = _HALF_CIRCLE @ ((x, y), (-y, x))
        half, half_end = width / 2, (width if end_width is None else end_width) / 2
        self.polygon(np.concatenate([round_end * half_end + end, round_end * -half + start]), colour)

    def stroke(self, points: ArrayLike, width: float, colour: Colour) -> None:
        """Add a line of constant ``width`` through ``points``, with flat ends."""
        points = np.asarray(points, dtype=np.float64)
        along = np.gradient(points, axis=0)
        normal = np.stack([-along[:, 1], along[:, 0]], 1) / np.maximum(np.hypot(*along.T), 1e-9)[:, None]
        self.polygon(np.concatenate([points + normal * width / 2, (points - normal * width / 2)[::-1]]), colour)

    def add(self, other: "Sketch", at: Point = (0, 0), angle: float = 0) -> None:
        """Add another sketch, turned by ``angle`` degrees about its origin, its origin moved to ``at``."""
        rotation = _rotation(angle)
        self.shapes += [
            Shape(points @ rotation + at if angle else points + at, colour) for points, colour in other.shapes
        ]

    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of all polygons."""
        points = np.concatenate([shape.points for shape in self.shapes])
        return (*points.min(0), *points.max(0))

    def draw(self, scale: float, at: Point, *, mirror: bool = False) -> Drawn:
        """Draw with ``scale`` pixels per unit and the origin at pixel ``at``, antialiased by oversampling."""
        sizes = [len(shape.points) for shape in self.shapes]
        points = np.concatenate([shape.points for shape in self.shapes]) * (-scale if mirror else scale, scale) + at
        left, top = np.floor(points.min(0)).astype(int) - 1
        right, bottom = np.ceil(points.max(0)).astype(int) + 1
        # All pixels are opaque or empty, so the layer is already premultiplied and can be averaged directly.
        layer = Image.new("RGBX", ((right - left) * OVERSAMPLING, (bottom - top) * OVERSAMPLING))
        flat = ((points - (left, top)) * OVERSAMPLING).ravel().tolist()
        pen = ImageDraw.Draw(layer)
        start = 0
        for size, shape in zip(sizes, self.shapes, strict=True):
            pen.polygon(flat[start : start + 2 * size], fill=(*shape.colour, 255))
            start += 2 * size
        small = layer.reduce(OVERSAMPLING)
        return Drawn(Image.frombytes("RGBa", small.size, small.tobytes()).convert("RGBA"), int(left), int(top))


def arc(centre: Point, width: float, height: float, start: float, end: float, points: int = 16) -> np.ndarray:
    """``[points, 2]`` along an ellipse's edge from ``start`` to ``end`` degrees (0 right, 90 down, 270 up)."""
    return _unit_arc(start, end, points) * (width, height) + centre


def star_points(points: int, outer: float, inner: float, centre: Point) -> np.ndarray:
    """``[2 * points, 2]`` corners of a star with one point up."""
    radii = np.where(np.arange(2 * points) % 2, inner, outer)
    return _unit_arc(-90, 270 - 180 / points, 2 * points) * radii[:, None] + centre


def turned(points: ArrayLike, angle: float) -> np.ndarray:
    """Rotate points clockwise (y points down) by ``angle`` degrees about the origin."""
    return np.asarray(points, dtype=np.float64) @ _rotation(angle)


def moved(point: ArrayLike, right: float, down: float) -> Point:
    """Move a point by ``right`` and ``down``."""
    return point[0] + right, point[1] + down


def between(start: ArrayLike, end: ArrayLike, share: float) -> np.ndarray:
    """Interpolate between two points: ``start`` for share 0, ``end`` for share 1."""
    return np.asarray(start) * (1 - share) + np.asarray(end) * share


def shade(colour: Sequence[float], factor: float) -> Colour:
    """Darken ``colour`` (``factor`` < 1) or mix it with white (``factor`` > 1)."""
    if factor <= 1:
        return tuple(int(value * factor) for value in colour)
    return tuple(int(value + (255 - value) * (factor - 1)) for value in colour)


def mix(first: Iterable[float], second: Iterable[float], share: float) -> Colour:
    """Interpolate between two colours: ``first`` for share 0, ``second`` for share 1."""
    return tuple(int(a + (b - a) * share) for a, b in zip(first, second, strict=True))


@cache
def _unit_arc(start: float, end: float, points: int) -> np.ndarray:
    angles = np.radians(np.linspace(start, end, points))
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _rotation(angle: float) -> np.ndarray:
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return np.array([[cosine, sine], [-sine, cosine]])


_SMALL_CIRCLE = _unit_arc(0, 330, 12)
_CIRCLE = _unit_arc(0, 360 - 360 / 28, 28)
_HALF_CIRCLE = _unit_arc(-90, 90, 7)
