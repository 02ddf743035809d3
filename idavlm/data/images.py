"""Reading image files: only below the image root, complete, of limited size, as upright RGB images."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from idavlm.data.errors import DataError
from idavlm.utils import check_positive

MAX_PIXELS = 64_000_000
"""Default limit on the pixels of an image. A small file can declare billions of pixels."""

# Formats that PIL decodes itself. For others (EPS, PDF ...) it starts external programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class ImageStore:
    """A folder of images.

    Args:
        root: the image root. A path must not lead out of it, neither by ``..`` nor by a symbolic link.
        max_pixels: limit on width x height. Larger images are refused before they are decoded.
    """

    def __init__(self, root: str | Path, *, max_pixels: int = MAX_PIXELS) -> None:
        check_positive(max_pixels=max_pixels)
        self.root = Path(root)
        self.max_pixels = max_pixels
        self._resolved_root = self.root.resolve()

    def open(self, path: str) -> Image.Image:
        """Return the image as RGB, rotated upright by its EXIF orientation. Transparent pixels become white.

        Raises:
            DataError: of kind ``"image"``, with the path: the file is missing, outside the root, a URL, not an image,
                truncated, or has more than ``max_pixels`` pixels.
        """
        file = self._locate(path)
        try:
            with file.open("rb") as stream:
                image = Image.open(stream, formats=_FORMATS)
                if image.width * image.height > self.max_pixels:
                    raise _image_error(
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
            raise _image_error(path, f"is too large ({error}); scale it down") from error
        # Decoders raise many kinds of errors on broken files (OSError, SyntaxError, struct.error, zlib.error ...).
        except Exception as error:
            raise _image_error(path, f"is not an image or is damaged ({error}); replace or remove it") from error

    def _locate(self, path: str) -> Path:
        if "://" in path or path.startswith("data:"):
            raise _image_error(
                path[:80], "is a URL; URLs are not supported: download the image and use the path of the file"
            )
        file = self.root / path
        try:
            resolved = file.resolve()
            if not resolved.is_relative_to(self._resolved_root):
                raise _image_error(
                    path, f"leads out of the image root {self.root} (to {resolved}); move the image below it"
                )
            if not resolved.is_file():
                state = "is not a regular file" if resolved.exists() else "does not exist"
                raise _image_error(path, f"{state} below the image root {self.root}; check image_root and the path")
        except DataError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise _image_error(path, f"cannot be looked up ({error}); correct the path") from error
        return resolved


def open_image(root: str | Path, path: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open one image below ``root``. Equivalent to ``ImageStore(root, max_pixels=max_pixels).open(path)``."""
    return ImageStore(root, max_pixels=max_pixels).open(path)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        # PIL would clip 16-bit values to 255. Keep the upper eight bits instead.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _image_error(path: str, problem: str) -> DataError:
    return DataError(f"image {path!r} {problem}.", kind="image", file=path)
