"""Loading the images of messages: paths, PIL images, bytes and, if allowed, URLs."""

import base64
import binascii
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from idavlm.data.errors import DataError
from idavlm.data.images import MAX_PIXELS, ImageStore, _to_rgb, size_problem

MAX_DOWNLOAD = 64 * 2**20
"""Limit on the bytes of an image that is downloaded."""

TIMEOUT = 30
"""Seconds after which a download fails."""

_NO_RANGE = ("F", "I")


class PhotoLoader:
    """Loads images that are passed in Python: upright RGB images, as :class:`ImageStore` reads files.

    Args:
        image_root: folder that relative paths are relative to, and that they must not leave. None for the working
            directory. Absolute paths are not restricted.
        allow_urls: whether ``https://...``, ``http://...`` and base64 data are loaded.
        max_pixels, resized_size: limits as in :class:`ImageStore`.
    """

    def __init__(
        self,
        image_root: str | Path | None = None,
        *,
        allow_urls: bool = False,
        max_pixels: int = MAX_PIXELS,
        resized_size: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    ) -> None:
        self.image_root = image_root
        self.allow_urls = allow_urls
        self.limits = {"max_pixels": max_pixels, "resized_size": resized_size}

    def load(self, image: Any, *, field: str, key: str = "image") -> Any:
        """Load an image.

        Args:
            image: a path, a PIL image, the bytes of an image file, ``{"bytes", "path"}`` (as in ``datasets``), a URL,
                or base64 text. Arrays and tensors are returned unchanged.
            field: name of the argument, for errors.
            key: ``"base64"`` if a string is base64 text.

        Raises:
            DataError: of kind ``"image"``, with the path or field: there is no image, it cannot be read, or it is a URL
                and URLs are not allowed.
        """
        if isinstance(image, dict):  # an undecoded image of datasets
            image = image.get("bytes") or image.get("path")
        if isinstance(image, Image.Image):
            return self._upright(image, field)
        if isinstance(image, (bytes, bytearray)):
            return self._decode(bytes(image), field)
        if isinstance(image, Path):
            return self._open(str(image))
        if isinstance(image, str):
            if key == "base64" or "://" in image or image.startswith("data:"):
                return self._decode(self._fetch(image, key, field), field)
            return self._open(image)
        if image is None:
            raise DataError(f"{field} has no image; add a path, a PIL image or bytes.", kind="image")
        if hasattr(image, "shape"):
            return image
        raise DataError(
            f"{field} is {type(image).__name__} {image!r:.80}; expected a path, a PIL image or bytes.", kind="image"
        )

    def size(self, path: str | Path) -> tuple[int, int]:
        """Return the (height, width) of the image in a file, see :meth:`ImageStore.size`."""
        store, path = self._store(str(path))
        return store.size(path)

    def _open(self, path: str) -> Image.Image:
        store, path = self._store(path)
        return store.open(path)

    def _store(self, path: str) -> tuple[ImageStore, str]:
        """The folder that a path is read from, and the path in it."""
        file = Path(path)
        if file.is_absolute():
            file = file.resolve()
            return ImageStore(file.anchor, **self.limits), str(file)
        return ImageStore(Path.cwd() if self.image_root is None else self.image_root, **self.limits), path

    def _decode(self, data: bytes, field: str) -> Image.Image:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "image").write_bytes(data)
            try:
                return ImageStore(folder, **self.limits).open("image")
            except DataError as error:
                raise DataError(f"{field}: {error}", kind="image") from error

    def _upright(self, image: Image.Image, field: str) -> Image.Image:
        if image.mode in _NO_RANGE or image.mode.startswith("I;16"):
            raise DataError(
                f"{field} is a PIL image of mode {image.mode!r}, whose range of brightness is unknown; convert it to "
                "'RGB'.",
                kind="image",
            )
        problem = size_problem((image.height, image.width), **self.limits)
        if problem:
            raise DataError(f"{field} {problem}.", kind="image")
        try:
            return _to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # a lazy image is decoded here
            raise DataError(f"{field} is a damaged image ({error}); replace or remove it.", kind="image") from error

    def _fetch(self, text: str, key: str, field: str) -> bytes:
        if not self.allow_urls:
            raise DataError(
                f"{field}={text[:80]!r} is a URL or base64 text; pass a path, a PIL image or bytes, or set "
                "allow_urls=True.",
                kind="image",
            )
        if key == "base64" or text.startswith("data:"):
            try:
                return base64.b64decode(text.rpartition(",")[2], validate=True)
            except binascii.Error as error:
                raise DataError(f"{field} is not valid base64 text ({error}).", kind="image") from error
        if not text.startswith(("https://", "http://")):
            raise DataError(f"{field}={text[:80]!r} must begin with https:// or http://.", kind="image")
        try:
            with urllib.request.urlopen(text, timeout=TIMEOUT) as response:
                data = response.read(MAX_DOWNLOAD + 1)
        except OSError as error:
            raise DataError(f"{field}={text[:80]!r} cannot be downloaded ({error}).", kind="image") from error
        if len(data) > MAX_DOWNLOAD:
            raise DataError(
                f"{field}={text[:80]!r} has more than {MAX_DOWNLOAD} bytes; use a smaller file.", kind="image"
            )
        return data
