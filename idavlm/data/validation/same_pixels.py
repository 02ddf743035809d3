"""Whether two images show the same pixels: as a whole, or one as a part of the other; scaled, mirrored, compressed.

Other photos of the same person, scene or shot do not count: only copies of one image file do.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

GRID = 24
"""Side of the copies by which whole images are compared."""

MEAN_DIFFERENCE, CELL_DIFFERENCE = 4.0, 16.0
"""Limits on the difference of two copies of one image, of 255: mean of all pixels, and mean of the worst 4 x 4 cell."""

ASPECT = 0.04
"""Limit on the relative difference of the aspect ratios of two copies of one image."""

SMALLEST = 12
"""Longest side of a crop in the small copy of the scene, in pixels, below which it is not searched for."""

DISTORTION = 0.12
"""Relative difference of aspect ratios from which on a crop counts as scaled to another one."""

STEP = 1.12
"""Ratio between the sizes at which a crop is searched for."""

CANDIDATE = 0.72
"""Correlation in the small copies from which on a crop is compared in the images themselves."""

AREA = 64
"""Longest side, in pixels, of the area around a box in which a crop is searched for."""

DETAIL = 32
"""Longest side of a crop, in pixels, at which the images themselves are compared. Finer details are lost by JPEG."""

CORRELATION, CELL_CORRELATION = 0.94, 0.6
"""Correlation of grey values from which on pixels are the same: of the whole crop, and of each cell of a 3 x 3 grid.
Two photos that were taken one after the other differ in some cells."""

CELLS = 3
"""Cells of a side of this grid, and least number of cells that have enough content to be compared."""

LEAST_DEVIATION = 3.0
"""Standard deviation of grey values (0..255) below which a region has too little content to be compared."""


class Place(NamedTuple):
    """Where a crop may come from: ``box`` in pixels of the scene, correlation, and whether it is mirrored."""

    box: tuple[float, float, float, float]
    correlation: float
    mirrored: bool


def is_same_image(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two grey images ``[h, w]`` are copies of one image, mirrored or not."""
    ratio = (a.shape[1] / a.shape[0]) / (b.shape[1] / b.shape[0])
    if abs(ratio - 1) > ASPECT:
        return False
    first, second = (_resized(image, (GRID, GRID)) for image in (a, b))
    if min(first.std(), second.std()) < LEAST_DEVIATION:
        return False
    for copy in (second, second[:, ::-1]):
        difference = np.abs(first - copy)
        cells = difference.reshape(GRID // 4, 4, GRID // 4, 4).mean((1, 3))
        if difference.mean() <= MEAN_DIFFERENCE and cells.max() <= CELL_DIFFERENCE:
            return True
    return False


def find_crop(crop: np.ndarray, scene: np.ndarray, box: tuple[float, ...] | None, scale: float) -> Place | None:
    """Find where the small copy of a photo may be cut out of the small copy of a scene.

    Args:
        crop: ``[h, w]`` uint8.
        scene: ``[H, W]`` uint8.
        box: box of the identity in pixels of the scene, around which the crop is searched for, up to twice its size;
            None to search the whole scene.
        scale: size of ``scene`` relative to the scene in pixels, whose boxes are returned.

    Returns:
        The best place, or None if nothing correlates.
    """
    area, left, top = scene, 0.0, 0.0
    if box is not None:
        x1, y1, x2, y2 = (edge * scale for edge in box)
        across, down = (x2 - x1) / 2, (y2 - y1) / 2
        left, top = max(0.0, x1 - across), max(0.0, y1 - down)
        right, bottom = min(scene.shape[1], x2 + across), min(scene.shape[0], y2 + down)
        if right - left < 3 or bottom - top < 3:
            return None
        cut = Image.fromarray(scene).crop((int(left), int(top), int(np.ceil(right)), int(np.ceil(bottom))))
        left, top = int(left), int(top)
        zoom = AREA / max(cut.size)
        area = np.asarray(cut.resize([max(4, round(side * zoom)) for side in cut.size], Image.Resampling.BICUBIC))
        scale *= zoom
        left, top = left * zoom, top * zoom
    smallest = SMALLEST if box is None else AREA // 4
    sizes = _sizes(crop.shape, area.shape, smallest)
    if box is not None:  # a crop of the box may have been scaled to another aspect ratio
        shape = (box[3] - box[1], box[2] - box[0])
        if abs(shape[0] * crop.shape[1] / (shape[1] * crop.shape[0]) - 1) > DISTORTION:
            sizes += _sizes(shape, area.shape, smallest)
    found = _best_match(crop, area, sizes)
    if found is None:
        return None
    (x1, y1, x2, y2), correlation, mirrored = found
    edges = ((x1 + left) / scale, (y1 + top) / scale, (x2 + left) / scale, (y2 + top) / scale)
    return Place(edges, correlation, mirrored)


def is_cut_from(crop: Image.Image, scene: Image.Image, place: Place) -> bool:
    """Whether ``crop`` has the pixels of ``scene`` near ``place``, in the images themselves."""
    x1, y1, x2, y2 = place.box
    zoom = DETAIL / max(x2 - x1, y2 - y1)
    across, down = 0.15 * (x2 - x1), 0.15 * (y2 - y1)
    edges = (max(0, x1 - across), max(0, y1 - down), min(scene.width, x2 + across), min(scene.height, y2 + down))
    size = [max(8, round((edges[i + 2] - edges[i]) * zoom)) for i in (0, 1)]
    area = np.asarray(scene.convert("L").resize(size, Image.Resampling.BOX if zoom < 1 else 3, box=edges))
    template = np.asarray(crop.convert("L"))
    template = template[:, ::-1] if place.mirrored else template
    shape = (y2 - y1, x2 - x1)
    if abs(shape[0] * crop.width / (shape[1] * crop.height) - 1) <= DISTORTION:
        shape = template.shape  # exactly, where the small copies only tell it roughly
    sides = (DETAIL * (0.9 + 0.025 * step) / max(shape) for step in range(9))
    sizes = [(round(shape[0] * side), round(shape[1] * side)) for side in sides]
    sizes = [size for size in sizes if size[0] <= area.shape[0] and size[1] <= area.shape[1] and min(size) >= 6]
    found = _best_match(template, area, sizes, mirror=False) if sizes else None
    if found is None or found[1] < CORRELATION:
        return False
    (x1, y1, x2, y2), _, _ = found
    window = area[y1:y2, x1:x2].astype(np.float32)
    small = _resized(template, (window.shape[0], window.shape[1]))
    found = []
    for cell, other in zip(_cells(small), _cells(window), strict=True):
        if min(cell.std(), other.std()) >= LEAST_DEVIATION:
            found.append(_correlation(cell, other))
    return len(found) >= CELLS and min(found) >= CELL_CORRELATION


def _cells(image: np.ndarray) -> list[np.ndarray]:
    return [cell for row in np.array_split(image, CELLS) for cell in np.array_split(row, CELLS, axis=1)]


def _sizes(crop: tuple[float, ...], area: tuple[int, ...], smallest: int) -> list[tuple[int, int]]:
    """Heights and widths of a crop within an area, from the largest on."""
    height, width = crop
    fit = min(area[0] / height, area[1] / width)
    sizes = []
    while max(height, width) * fit >= smallest and min(height, width) * fit >= 4:
        sizes.append((max(4, int(height * fit)), max(4, int(width * fit))))
        fit /= STEP
    return sizes


def _best_match(
    crop: np.ndarray, area: np.ndarray, sizes: list[tuple[int, int]], *, mirror: bool = True
) -> tuple[tuple[int, int, int, int], float, bool] | None:
    """The place in ``area`` with the highest correlation: box ``(x1, y1, x2, y2)``, correlation, mirrored."""
    if not sizes:
        return None
    area = area.astype(np.float32)
    area = area - area.mean()
    shape = area.shape
    templates = np.zeros((len(sizes), 1 + mirror, *shape), np.float32)
    for number, (height, width) in enumerate(sizes):
        small = _resized(crop, (height, width))
        if small.std() < LEAST_DEVIATION:
            continue
        small = small - small.mean()
        small /= np.sqrt((small**2).sum())
        templates[number, 0, :height, :width] = small
        if mirror:
            templates[number, 1, :height, :width] = small[:, ::-1]
    spectrum = np.fft.rfft2(area)
    products = np.fft.irfft2(np.conj(np.fft.rfft2(templates)) * spectrum, s=shape)
    sums, squares = _integral(area), _integral(area**2)
    best: tuple[tuple[int, int, int, int], float, bool] | None = None
    for number, (height, width) in enumerate(sizes):
        count = height * width
        variance = _windows(squares, height, width) - _windows(sums, height, width) ** 2 / count
        deviation = np.sqrt(np.maximum(variance, count * LEAST_DEVIATION**2))
        for mirrored in range(1 + mirror):
            rows, columns = deviation.shape
            values = products[number, mirrored, :rows, :columns] / deviation
            place = int(values.argmax())
            value = float(values.flat[place])
            if best is None or value > best[1]:
                y, x = divmod(place, columns)
                best = (x, y, x + width, y + height), value, bool(mirrored)
    return best


def _integral(values: np.ndarray) -> np.ndarray:
    return np.pad(values.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))


def _windows(integral: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sums over all windows of ``height`` x ``width``."""
    return (
        integral[height:, width:]
        - integral[:-height, width:]
        - integral[height:, :-width]
        + integral[:-height, :-width]
    )


def _resized(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A grey image ``[h, w]`` as float32 ``shape``."""
    grown = image.shape[0] < shape[0]
    method = Image.Resampling.BICUBIC if grown else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((shape[1], shape[0]), method), np.float32)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm else 0.0
