"""Images of built records: scenes are linked or copied, references are cropped so that no pixel is the scene's own."""

import errno
import os
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from random import Random

from PIL import Image, ImageEnhance

from idavlm.data.images import ImageStore, RecordImages
from idavlm.datasets.dataset_folder import save_jpeg
from idavlm.datasets.tuning.records import Reference, Scene

SCENE_MODES = ("link", "copy")
"""How scenes get into the image root of a built data set: by hard links, which take no space, or as copies."""

_CACHED = 3
_MIN_PART = 0.85
_SCALES = (0.6, 0.9)
_COLOURS = (0.75, 1.25)
_MIN_SIDE = 16


def changed_crop(image: Image.Image, box: list[float], rng: Random) -> Image.Image:
    """Cut a reference out of the image that is asked about, so that equal pixels do not give the answer away.

    A random part of at least 85 % of the width and height of the box is cut out, mirrored in half of the cases, scaled
    to 60 to 90 % of its size, and changed in brightness, contrast and saturation by up to 25 %. Scaling alone makes
    every pixel a mixture of several.

    Args:
        image: the RGB image.
        box: ``[x1, y1, x2, y2]`` in pixels.
        rng: source of the choices.
    """
    x1, y1, x2, y2 = box
    width, height = ((high - low) * rng.uniform(_MIN_PART, 1) for low, high in ((x1, x2), (y1, y2)))
    left, top = rng.uniform(x1, x2 - width), rng.uniform(y1, y2 - height)
    part = image.crop(
        (int(left), int(top), max(int(left) + 1, round(left + width)), max(int(top) + 1, round(top + height)))
    )
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.uniform(*_SCALES)
    size = tuple(max(_MIN_SIDE, round(side * scale)) for side in part.size)
    part = part.resize(size, Image.Resampling.BICUBIC)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        part = change(part).enhance(rng.uniform(*_COLOURS))
    return part


class PartImages:
    """Reads the images of a source and writes those of one part of a built data set.

    Args:
        source: image root of the source.
        out: image root of the built data set. Scenes are below ``scenes/``, crops below ``crops/``.
        part: number of the part. Its crops have a folder of their own, in which they are numbered.
        scenes: one of :data:`SCENE_MODES`.
        read_embedded: function from a path to the bytes of an image that the annotation file holds, or to None.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        part: int,
        scenes: str,
        read_embedded: Callable[[str], bytes | None] | None = None,
    ) -> None:
        self.source = source
        self.out = out
        self.part = part
        self.scenes = scenes
        self.read_embedded = read_embedded
        self._num_crops = 0
        self._folders: set[Path] = set()
        self._placed: set[str] = set()
        store = partial(_store, source, read_embedded)
        # Several annotations of one image follow one another in all sources. The caches hold no method of this object:
        # in a cycle of references, the decoded images of each part would stay until a full garbage collection.
        self._open = lru_cache(_CACHED)(lambda path: store(path).open(path))
        self._size = lru_cache(_CACHED * 64)(lambda path: store(path).size(path))

    def open(self, path: str) -> Image.Image:
        """Return an image of the source as upright RGB.

        Raises:
            DataError: the image is missing or cannot be decoded.
        """
        return self._open(path)

    def size(self, path: str) -> tuple[int, int]:
        """Return (width, height) of an image of the source.

        Raises:
            DataError: the image is missing or cannot be read.
        """
        height, width = self._size(path)
        return width, height

    def scene(self, path: str, *, shot: str = "", scene: str = "", place: bool = True) -> Scene:
        """Return an image of the source as a scene, and put it into the built data set.

        Args:
            path: path of the image in the source.
            shot: key of its shot.
            scene: key of its scene of a film.
            place: whether the image is put into the data set now. Otherwise :meth:`place` has to do it, once it is
                known that the record is kept.

        Raises:
            DataError: the image is missing or cannot be read.
            ValueError: a hard link is impossible, for example between two file systems.
        """
        if path not in self._placed:
            self.size(path)  # the image is readable and inside the root
            if place:
                self.place(path)
        return Scene(f"scenes/{path}", path, shot, scene)

    def place(self, path: str) -> None:
        """Put an image of the source into the built data set, unless it is there.

        Raises:
            ValueError: a hard link is impossible, for example between two file systems.
        """
        if path not in self._placed:
            self._place(path, self.out / "scenes" / path)
            self._placed.add(path)

    def _place(self, path: str, target: Path) -> None:
        self._make_folder(target.parent)
        data = self.read_embedded(path) if self.read_embedded is not None else None
        if data is not None:
            _replace(target, lambda part: part.write_bytes(data))
        elif self.scenes == "link":
            _link((self.source / path).resolve(), target)
        elif not _is_copy(self.source / path, target):
            _replace(target, lambda part: shutil.copy2(self.source / path, part))

    def whole(self, path: str, *, shot: str = "", scene: str = "", place: bool = True) -> Reference:
        """Return a whole image of the source as a reference; arguments and errors as in :meth:`scene`."""
        image = self.scene(path, shot=shot, scene=scene, place=place)
        return Reference(image.image, path, None, shot, scene)

    def crop(self, path: str, box: list[float], rng: Random) -> Reference:
        """Write a changed crop, see :func:`changed_crop`, and return it as a reference."""
        name = f"crops/{self.part:05d}/{self._num_crops}.jpg"
        self._num_crops += 1
        self._make_folder((self.out / name).parent)
        save_jpeg(changed_crop(self.open(path), box, rng), self.out / name)
        return Reference(name, path, [round(value, 2) for value in box])

    def published_crop(self, path: str, box: list[float], name: str, *, mirrored: bool) -> str:
        """Write a crop as IDA-VLM's scripts do: the pixels of the scene, at most mirrored. Returns its path.

        Several records may have crops of the same name. The last one that is written stays.
        """
        crop = self.open(path).crop(tuple(round(value) for value in box))
        if mirrored:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        target = self.out / "crops" / name
        self._make_folder(target.parent)
        _replace(target, lambda part: save_jpeg(crop, part))
        return f"crops/{name}"

    def _make_folder(self, folder: Path) -> None:
        if folder not in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            self._folders.add(folder)


def _store(source: Path, read_embedded: Callable[[str], bytes | None] | None, path: str) -> ImageStore:
    """The store of an image of the source: a folder, or the bytes that the annotation file holds."""
    data = read_embedded(path) if read_embedded is not None else None
    return ImageStore(source if data is None else RecordImages(source, {path: data}))


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file that other processes may write at the same time."""
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _is_copy(source: Path, target: Path) -> bool:
    """Whether another part has copied a file: copies have its size and time."""
    if not target.exists():
        return False
    first, second = source.stat(), target.stat()
    return (first.st_size, first.st_mtime_ns) == (second.st_size, second.st_mtime_ns)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        if not target.samefile(source):  # the source was replaced since an interrupted build
            target.unlink(missing_ok=True)
            _link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        raise ValueError(
            f"scenes='link': {source} cannot be linked to {target} ({error.strerror}); pass scenes='copy' "
            "(--scenes copy), or an output folder in the file system of the images."
        ) from None
