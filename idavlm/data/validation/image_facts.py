"""What the checks know of an image: its size, a hash of its pixels, and a small grey copy; computed in parallel."""

import hashlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from idavlm.data.errors import DataError
from idavlm.data.images import ImageStore, RecordImages
from idavlm.data.schema import Sample

SIDE = 96
"""Longest side of the small copy of an image in pixels."""

BLANK = 1.5
"""Standard deviation of the grey values (0..255) below which an image counts as blank."""

ImageKey = tuple[str, str]
"""Identifies an image: its image root (or the record that holds it), and its path."""


def image_key(sample: Sample, path: str) -> ImageKey:
    """Key of an image of a sample."""
    root = sample.image_root
    if isinstance(root, RecordImages):
        return (sample.where, path) if path in root.images else (str(root.root), path)
    return str(root), path


def root_of_image(sample: Sample, path: str) -> Path | RecordImages:
    """The image root of one image of a sample, with the bytes of this image only."""
    root = sample.image_root
    if isinstance(root, RecordImages):
        return RecordImages(root.root, {path: root.images[path]} if path in root.images else {}, root.allow_urls)
    return root


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Facts of one image.

    Attributes:
        size: height and width of the upright image in pixels.
        digest: hash of the decoded pixels, 16 bytes. Files of other bytes and equal pixels have the same.
        average_hash: 64 bits; similar images have similar bits.
        mirrored_hash: the same of the mirrored image.
        is_blank: whether the image has one colour.
        grey: small grey copy, ``[h, w]`` uint8 with a longest side of :data:`SIDE`.
    """

    size: tuple[int, int]
    digest: bytes
    average_hash: int
    mirrored_hash: int
    is_blank: bool
    grey: np.ndarray


@dataclass(frozen=True, slots=True)
class ImageFault:
    """Why an image has no facts: ``check`` is ``"image_missing"`` or ``"image_damaged"``."""

    check: str
    message: str


def facts_of(root: Path | RecordImages, path: str) -> ImageFacts | ImageFault:
    """Open an image and return its facts, or why it cannot be used."""
    store = ImageStore(root)
    if not store.has(path):
        return ImageFault("image_missing", f"image {path!r} does not exist below {store.root}.")
    try:
        image = store.open(path)
    except DataError as error:
        return ImageFault("image_damaged", str(error))
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=b"%d" % image.width).digest()
    grey = small_grey(image)
    bits = _hash_bits(grey)
    return ImageFacts(
        size=(image.height, image.width),
        digest=digest,
        average_hash=_as_int(bits),
        mirrored_hash=_as_int(bits[:, ::-1]),
        is_blank=bool(grey.std() < BLANK),
        grey=grey,
    )


def small_grey(image: Image.Image) -> np.ndarray:
    """The small grey copy of an image."""
    scale = SIDE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC))


def _hash_bits(grey: np.ndarray) -> np.ndarray:
    """``[8, 8]`` bool: whether each cell of a grid is brighter than the median cell."""
    cells = np.asarray(Image.fromarray(grey).resize((8, 8), Image.Resampling.BOX), np.float32)
    return cells > np.median(cells)


def _as_int(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big")


class GreyCopies:
    """The small grey copies of all images in a temporary file, so that memory does not grow with their number."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="idavlm_validate_")  # noqa: SIM115
        self._shapes: list[tuple[int, int]] = []

    @property
    def count(self) -> int:
        """Number of images that are stored."""
        return len(self._shapes)

    def append(self, grey: np.ndarray) -> None:
        """Store the copy of the next image."""
        self._file.seek(len(self._shapes) * SIDE * SIDE)
        self._file.write(grey.tobytes())
        self._shapes.append(grey.shape)

    def __getitem__(self, number: int) -> np.ndarray:
        height, width = self._shapes[number]
        self._file.seek(number * SIDE * SIDE)
        return np.frombuffer(self._file.read(height * width), np.uint8).reshape(height, width)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def parallel_map(num_workers: int) -> Iterator[Map]:
    """A ``map`` over processes, in order. One worker is this process.

    Forked processes start at once and need no guarded main module. Without fork, this process does everything.
    """
    if num_workers == 1 or sys.platform != "linux":
        yield map
        return
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("fork")) as pool:

        def pooled(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
            jobs = list(jobs)
            return pool.map(function, jobs, chunksize=max(1, min(32, len(jobs) // (4 * num_workers))))

        yield pooled


def facts_of_all(jobs: Sequence[tuple[Path | RecordImages, str]], mapped: Map) -> Iterator[ImageFacts | ImageFault]:
    """:func:`facts_of` for each (root, path), in order."""
    return mapped(_facts_of_job, jobs)


def _facts_of_job(job: tuple[Path | RecordImages, str]) -> ImageFacts | ImageFault:
    return facts_of(*job)
