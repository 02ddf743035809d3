"""Loading the images of messages: paths, PIL images, bytes and, if allowed, URLs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from idavlm.data.errors import DataError
from idavlm.data.images import (
    MAX_ASPECT_RATIO,
    MAX_PIXELS,
    ImageStore,
    RecordImages,
    array_size,
    download,
    from_base64,
    size_problem,
)


class PhotoLoader:
    """Loads images that are passed in Python: upright RGB images, as :class:`ImageStore` reads files.

    Args:
        image_root: folder that relative paths are relative to, and that they must not leave; or the images of a record.
            None for the working directory. Absolute paths are not restricted.
        allow_urls: whether ``https://...``, ``http://...`` and base64 data are loaded.
        max_pixels, max_aspect_ratio, resized_size: limits as in :class:`ImageStore`.
    """

    def __init__(
        self,
        image_root: str | Path | RecordImages | None = None,
        *,
        allow_urls: bool = False,
        max_pixels: int = MAX_PIXELS,
        max_aspect_ratio: int = MAX_ASPECT_RATIO,
        resized_size: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    ) -> None:
        self.image_root = image_root
        self.allow_urls = allow_urls
        self.limits = {"max_pixels": max_pixels, "max_aspect_ratio": max_aspect_ratio, "resized_size": resized_size}

    def load(self, image: Any, *, field: str, key: str = "image") -> Any:
        """Load an image.

        Args:
            image: a path, a PIL image, the bytes of an image file, ``{"bytes", "path"}`` (as in ``datasets``), a URL,
                or base64 text. Arrays and tensors are returned unchanged, after a check of their size.
            field: name of the argument, for errors.
            key: ``"base64"`` if a string is base64 text.

        Raises:
            DataError: of kind ``"image"``, with the path or field: there is no image, it cannot be read, or it is a URL
                and URLs are not allowed.
        """
        if isinstance(image, dict):  # an undecoded image of datasets
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and isinstance(self.image_root, RecordImages) and image in self.image_root.images:
            return self._open(image)
        if isinstance(image, Image.Image):
            return self._store()[0].convert(image, field)
        if isinstance(image, (bytes, bytearray)):
            return self._store()[0].decode(bytes(image), field)
        if isinstance(image, Path):
            return self._open(str(image))
        if isinstance(image, str):
            if key == "base64" or "://" in image or image.startswith("data:"):
                return self._store()[0].decode(self._fetch(image, key, field), f"{field}={image[:80]}")
            return self._open(image)
        if image is None:
            raise DataError(f"{field} has no image; add a path, a PIL image or bytes.", kind="image")
        if hasattr(image, "shape"):
            size = array_size(tuple(image.shape))
            problem = size_problem(size, **self.limits) if size else None
            if problem:
                raise DataError(f"{field} {problem}.", kind="image")
            return image
        raise DataError(
            f"{field} is {type(image).__name__} {image!r:.80}; expected a path, a PIL image or bytes.", kind="image"
        )

    def size(self, path: str | Path) -> tuple[int, int]:
        """Return the (height, width) of the image in a file, see :meth:`ImageStore.size`."""
        store, path = self._store(str(path))
        return store.size(path)

    def _store(self, path: str = "") -> tuple[ImageStore, str]:
        """The images that a path is looked up in, and the path in them."""
        held = isinstance(self.image_root, RecordImages) and path in self.image_root.images
        if Path(path).is_absolute() and not held:
            file = Path(path).resolve()
            return ImageStore(file.anchor, **self.limits), str(file)
        return ImageStore(Path.cwd() if self.image_root is None else self.image_root, **self.limits), path

    def _open(self, path: str) -> Image.Image:
        store, path = self._store(path)
        return store.open(path)

    def _fetch(self, text: str, key: str, field: str) -> bytes:
        allowed = self.allow_urls or (isinstance(self.image_root, RecordImages) and self.image_root.allow_urls)
        if not allowed:
            raise DataError(
                f"{field}={text[:80]!r} is a URL or base64 text; pass a path, a PIL image or bytes, or set "
                "allow_urls=True.",
                kind="image",
            )
        if key == "base64" and not text.startswith("data:"):
            return from_base64(text, field)
        return download(text, f"{field}={text[:80]}")
