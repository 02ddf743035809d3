"""Features of a frozen vision tower, computed once per image and stored on disk."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idavlm.data import DataError, RecordImages, Sample
from idavlm.data.errors import quote
from idavlm.utils import check_positive

INDEX_VERSION = 2
"""Version of ``index.json``. Another one is refused: the first did not tell versions of an image file apart."""


class _Entry(NamedTuple):
    """What the index says of an image: its row, its original size, and the state and content of its file."""

    row: int
    height: int
    width: int
    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    sha256: str

    @property
    def state(self) -> tuple[int, int, int]:
        return self.num_bytes, self.mtime_ns, self.ctime_ns


class ImageFeatures:
    """A folder with the features of many images, mapped into memory and shared by processes.

    ``features.bin`` holds the features ``[images, P, Cv]``; ``index.json`` lists the images with their original sizes
    and the hashes of their files, and identifies the vision tower. With a frozen tower, training and evaluation can use
    them in place of image files::

        processor.image_loader = ImageFeatures.write(folder, model, processor, samples)

    Features belong to the content of a file. If a file has another size, modification time or status change time than
    when its features were written, its hash is compared (once per process), and other content is an error. A file that
    no longer exists is not compared, so the images themselves are not needed.

    Args:
        folder: folder that :meth:`write` has written.
        model, processor: must have the vision tower and the preparation of images that made the features.

    Attributes:
        shape: ``(images, P, Cv)``.

    Raises:
        FileNotFoundError: ``folder`` holds no complete set of features.
        ValueError: the features come from another tower, another preparation of images or another version of this
            class, or the folder is damaged.
    """

    def __init__(self, folder: str | Path, model, processor):
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{index} does not exist; ImageFeatures.write({str(folder)!r}, ...) makes it.")
        try:
            content = json.loads(index.read_text())
            version, tower = content.get("version", 1), content["tower"]
            if version == INDEX_VERSION:
                self.shape, dtype = tuple(content["shape"]), getattr(torch, content["dtype"])
                self._entries = {key: _Entry(*entry) for key, entry in content["images"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); write the features again.") from error
        if version != INDEX_VERSION:
            raise ValueError(
                f"{index} has version {version}, this version of idavlm reads version {INDEX_VERSION}; write the "
                "features again."
            )
        if tower != _fingerprint(model, processor):
            raise ValueError(
                f"{folder} holds features of another vision tower, or of images that were prepared differently; write "
                "them again with this model and processor."
            )
        features, expected = self.folder / "features.bin", math.prod(self.shape) * dtype.itemsize
        found = features.stat().st_size if features.is_file() else 0
        if found != expected:
            raise ValueError(
                f"{features} has {found} bytes, {expected} are expected; it is incomplete or of another set of "
                "features: write the features again."
            )
        self._dtype = dtype
        self._features = _mapped(features, self.shape, dtype, write=False)
        self._states = {key: entry.state for key, entry in self._entries.items()}

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes that are spawned: they map the file again, in place of a copy of its content."""
        return {name: value for name, value in self.__dict__.items() if name != "_features"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._features = _mapped(self.folder / "features.bin", self.shape, self._dtype, write=False)

    @classmethod
    def write(
        cls, folder: str | Path, model, processor, samples: Iterable[Sample], *, batch_size: int = 64
    ) -> "ImageFeatures":
        """Compute the features of each image of ``samples`` once, and open them.

        Raises:
            DataError: an image cannot be read, or its file changes meanwhile.
            OSError: there is no space on the disk.
            ValueError: the patches are not a square grid, so the model could not recover their positions.
        """
        check_positive(batch_size=batch_size)
        folder, entries, features = Path(folder), {}, None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        images = list(dict.fromkeys((sample.image_root, path) for sample in samples for path in sample.images))
        if not images:
            raise ValueError("samples hold no images; pass the samples whose images will be used.")
        was_training = model.training
        model.eval()
        try:
            for start in range(0, len(images), batch_size):
                loaded = [_load(processor, *image) for image in images[start : start + batch_size]]
                with torch.no_grad():
                    pixels = torch.stack([pixels for pixels, *_ in loaded]).to(model.device)
                    batch, grid_size = model.image_features(pixels)
                if grid_size is None or grid_size[0] != grid_size[1]:
                    raise ValueError(f"an image has a grid of {grid_size} patches; stored features need a square grid.")
                if features is None:
                    shape = (len(images), *batch.shape[1:])
                    _allocate(folder / "features.bin", math.prod(shape) * batch.dtype.itemsize)
                    features = _mapped(folder / "features.bin", shape, batch.dtype, write=True)
                features[start : start + len(batch)] = batch
                for row, (_, size, state, sha256) in enumerate(loaded, start):
                    entries[_key(*images[row])] = _Entry(row, *size, *state, sha256)
        finally:
            model.train(was_training)
        content = {
            "version": INDEX_VERSION,
            "tower": _fingerprint(model, processor),
            "shape": shape,
            "dtype": str(features.dtype).removeprefix("torch."),
            "images": entries,
        }
        _write_index(folder, json.dumps(content))  # last: an incomplete set has no index
        return cls(folder, model, processor)

    def size(self, root: Path | None, path: str) -> tuple[int, int]:
        """Return the (height, width) of the original image."""
        entry = self._entry(root, path)
        return entry.height, entry.width

    def _entry(self, root: Path | None, path: str) -> _Entry:
        entry = self._entries.get(_key(root, path))
        if entry is None:
            raise DataError(
                f"image {quote(path)} below {root} has no features in {self.folder}; write the features of "
                "all samples.",
                kind="image",
                file=path,
            )
        return entry

    def __call__(self, root: Path | None, path: str) -> tuple[Tensor, tuple[int, int]]:
        """Return the features ``[P, Cv]`` of an image, and the (height, width) of the original.

        Raises:
            DataError: there are no features of this image, or the file has other content than when they were written.
        """
        key, entry = _key(root, path), self._entry(root, path)
        state = _state(Path(key))
        if state not in (None, self._states[key]):
            if state[0] != entry.num_bytes or _sha256(Path(key)) != entry.sha256:
                raise DataError(
                    f"image {quote(path)} below {root}: {self.folder} holds features of another version of the file; "
                    "write the features again.",
                    kind="image",
                    file=path,
                )
            self._states[key] = state
        return self._features[entry.row], (entry.height, entry.width)


def _load(processor, root: Path | None, path: str) -> tuple[Tensor, tuple[int, int], tuple[int, int, int], str]:
    """Load an image: pixels, original (height, width), and the state and hash of its file."""
    file = Path(_key(root, path))
    before = _state(file)
    pixels, size = processor.load_image(root, path)
    sha256 = _sha256(file)
    if before is None or _state(file) != before:
        raise DataError(
            f"image {quote(path)} below {root} changed while its features were computed; write the features again "
            "when the images do not change any more.",
            kind="image",
            file=path,
        )
    return pixels, size, before, sha256


def _state(file: Path) -> tuple[int, int, int] | None:
    """Size, modification time and status change time of a file; None if it does not exist.

    The last one changes whenever a file is written, even if the modification time is set back.
    """
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _allocate(file: Path, num_bytes: int) -> None:
    """Create a file whose space on the disk is reserved. Writing to a mapped file on a full disk kills the process."""
    file.unlink(missing_ok=True)  # not truncated: another process may have mapped it
    try:
        with file.open("wb") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, num_bytes)
            except (AttributeError, OSError) as error:
                unsupported = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
                if isinstance(error, OSError) and error.errno not in unsupported:
                    raise
                for start in range(0, num_bytes, 2**20):
                    stream.write(bytes(min(2**20, num_bytes - start)))
    except OSError as error:
        file.unlink(missing_ok=True)
        raise _no_space(file.parent, num_bytes, error) from error


def _write_index(folder: Path, text: str) -> None:
    complete = folder / f"index.json.{os.getpid()}"
    try:
        complete.write_text(text)
        complete.replace(folder / "index.json")
    except OSError as error:
        complete.unlink(missing_ok=True)
        raise _no_space(folder, len(text), error) from error


def _no_space(folder: Path, num_bytes: int, error: OSError) -> OSError:
    """The same error with the folder and the bytes that it needs."""
    free = shutil.disk_usage(folder).free
    reason = f"{error.strerror}: the features need {num_bytes:,} more bytes in {folder}, where {free:,} are free"
    return OSError(error.errno, f"{reason}; free space or choose another folder")


def _key(root: "Path | RecordImages | None", path: str) -> str:
    if isinstance(root, RecordImages):
        raise DataError(
            f"image {quote(path)} is held by its record or is a URL; ImageFeatures needs image files: write it to "
            "a folder.",
            kind="image",
            file=path,
        )
    return str(Path(root or "", path))


def _mapped(path: Path, shape: Iterable[int], dtype: torch.dtype, *, write: bool) -> Tensor:
    return torch.from_file(str(path), shared=write, size=math.prod(shape), dtype=dtype).view(*shape)


def _fingerprint(model, processor) -> str:
    """Return a hash of everything that the features depend on."""
    config = model.config
    digest = hashlib.sha256(repr((config.vision_feature_layer, config.vision_feature_select)).encode())
    digest.update(processor.image_processor.to_json_string().encode())
    for name, tensor in model.vision_tower.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
