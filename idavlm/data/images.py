"""Pictures from disk: below their root, whole, of bearable size, RGB and upright."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from idavlm.data.errors import DataError
from idavlm.utils import check_positive

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded; a small file can declare billions of pixels."""

# Formats that PIL decodes by itself; others (EPS, PDF ...) start foreign programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class ImageStore:
    """A folder of pictures.

    Args:
        root: the image root; no path may lead out of it, by ``..`` or by a symbolic link.
        max_pixels: larger pictures are errors, found before they are decoded.
    """

    def __init__(self, root: str | Path, *, max_pixels: int = MAX_PIXELS) -> None:
        check_positive(max_pixels=max_pixels)
        self.root = Path(root)
        self.max_pixels = max_pixels
        self._resolved_root = self.root.resolve()

    def open(self, path: str) -> Image.Image:
        """The picture as RGB, upright by its EXIF orientation; what is transparent becomes white.

        Raises:
            DataError: of kind ``"image"``, naming the file: missing, outside the root, a URL, no picture, truncated,
                or of more than ``max_pixels``.
        """
        file = self._locate(path)
        try:
            with file.open("rb") as stream:
                image = Image.open(stream, formats=_FORMATS)
                if image.width * image.height > self.max_pixels:
                    raise _problem(
                        path,
                        f"has {image.width} x {image.height} pixels, more than max_pixels={self.max_pixels}; scale it "
                        "down or raise max_pixels",
                    )
                ImageOps.exif_transpose(image, in_place=True)
                image.load()
                return _to_rgb(image)
        except DataError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _problem(path, f"is too large ({error}); scale it down") from error
        # Decoders meet broken files with errors of any kind (OSError, SyntaxError, struct.error, zlib.error ...).
        except Exception as error:
            raise _problem(path, f"is no picture or is damaged ({error}); replace or remove it") from error

    def _locate(self, path: str) -> Path:
        if "://" in path or path.startswith("data:"):
            raise _problem(path[:80], "is a URL; URLs are off: download the picture and give its path")
        file = self.root / path
        try:
            resolved = file.resolve()
            if not resolved.is_relative_to(self._resolved_root):
                raise _problem(
                    path, f"leads out of the image root {self.root} (to {resolved}); move the picture below it"
                )
            if not resolved.is_file():
                state = "is no regular file" if resolved.exists() else "does not exist"
                raise _problem(path, f"{state} below the image root {self.root}; is image_root the right folder")
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            raise _problem(path, f"cannot be looked up ({error})") from error
        return resolved


def open_image(root: str | Path, path: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One picture of :class:`ImageStore` ``(root)``."""
    return ImageStore(root, max_pixels=max_pixels).open(path)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        # PIL would clip the 16 bits to 255; keep the upper eight.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _problem(path: str, what: str) -> DataError:
    return DataError(f"image {path!r} {what}.", kind="image", file=path)
