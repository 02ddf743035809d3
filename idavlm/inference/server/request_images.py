"""Images of one request: data URLs, and files below the image root."""

from pathlib import Path
from typing import Any

from PIL import Image

from idavlm.data.errors import DataError, quote
from idavlm.data.images import ImageStore, from_base64


class Forbidden(PermissionError):
    """An image that requests may not name."""


class RequestImages:
    """Loads the images of one request, within limits on their number and on their pixels together.

    Args:
        root: folder of the files; None: no files.
        max_images, max_pixels, max_aspect_ratio: see :class:`ServerSettings`.
    """

    def __init__(self, root: Path | None, *, max_images: int, max_pixels: int, max_aspect_ratio: int) -> None:
        self.root = root
        self.max_images = max_images
        self.max_aspect_ratio = max_aspect_ratio
        self._num_images = 0
        self._pixels_left = max_pixels

    def load(self, image: Any, *, field: str, key: str = "image") -> Image.Image:
        """Load an image as upright RGB.

        Args:
            image: ``data:image/...;base64,...``, or the path of a file below the root, relative or absolute, also as
                ``file://...``.
            field: place in the request, for errors.
            key: not used; :class:`idavlm.data.photos.PhotoLoader` has it.

        Raises:
            Forbidden: a file outside the root, or any file if there is no root.
            DataError: all else that is wrong with an image.
        """
        self._num_images += 1
        if self._num_images > self.max_images:
            raise DataError(f"{field} is image {self._num_images}; a request may have {self.max_images}.", kind="image")
        if self._pixels_left < 1:
            raise DataError(f"{field}: the images before have as many pixels as a request may have.", kind="image")
        if not isinstance(image, str):
            raise DataError(f"{field}={quote(image)} must be a data URL or a path, as a string.", kind="image")
        limits = {"max_pixels": self._pixels_left, "max_aspect_ratio": self.max_aspect_ratio}
        if image.startswith("data:"):
            header, comma, text = image.partition(",")
            if not comma or not header.endswith(";base64"):
                raise DataError(f"{field} is not of the form data:image/jpeg;base64,... .", kind="image")
            loaded = ImageStore(Path.cwd(), **limits).decode(from_base64(text, field), field)
        else:
            path = self._located(image, field)
            loaded = ImageStore(self.root, **limits).open(path)
        self._pixels_left -= loaded.width * loaded.height
        return loaded

    def _located(self, image: str, field: str) -> str:
        """The path of a file relative to the root. Errors name nothing that the request does not."""
        path = image.removeprefix("file://").removeprefix("file:")
        if "://" in path:
            raise DataError(
                f"{field}={quote(image)} is a URL; the server downloads nothing, send the image as a data URL.",
                kind="image",
            )
        if self.root is None:
            raise Forbidden(f"{field} is a path, but the server has no image root; send the image as a data URL.")
        root = self.root.resolve()
        try:
            file = (root / path).resolve()
            is_file = file.is_relative_to(root) and file.is_file()
        except (OSError, ValueError, RuntimeError):
            raise DataError(f"{field}={quote(image)} cannot be a path.", kind="image") from None
        if not file.is_relative_to(root):
            raise Forbidden(f"{field}={quote(image)} is outside the image root.")
        if not is_file:
            raise DataError(f"{field}={quote(image)} is no file below the image root.", kind="image")
        return str(file.relative_to(root))
