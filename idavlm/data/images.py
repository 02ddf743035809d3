"""Reading image files: only below the image root, complete, of limited size, as upright RGB images."""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from idavlm.data.errors import DataError, quote, shorten
from idavlm.utils import check_positive

MAX_PIXELS = 64_000_000
"""Default limit on the pixels of an image. A small file can declare billions of pixels."""

MAX_ASPECT_RATIO = 200
"""Limit on the long side of an image, relative to the short side (as in Qwen2-VL)."""

# Formats that PIL decodes itself. For others (EPS, PDF ...) it starts external programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_LYING = (5, 6, 7, 8)
"""EXIF orientations of images whose width and height are exchanged."""

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_TILE_SIZE, _TIFF_SAMPLE_FORMAT = 258, 262, (322, 323), 339
_TIFF_SIGNED_OR_FLOAT = {2, 3}
_TIFF_WHITE_IS_ZERO = 0


class ImageStore:
    """A folder of images.

    Args:
        root: the image root. A path must not lead out of it, neither by ``..`` nor by a symbolic link.
        max_pixels: limit on width x height. Larger images are refused before they are decoded.
        resized_size: function from the (height, width) of an image to the largest (height, width) that an image
            processor brings it to before it crops. Its pixels are limited by ``max_pixels`` too. None if the image is
            not resized.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        max_pixels: int = MAX_PIXELS,
        resized_size: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    ) -> None:
        check_positive(max_pixels=max_pixels)
        self.root = Path(root)
        self.max_pixels = max_pixels
        self.resized_size = resized_size
        self._resolved_root = self.root.resolve()

    def open(self, path: str) -> Image.Image:
        """Return the image as RGB, rotated upright by its EXIF orientation. Transparent pixels become white.

        Grey images of more than 8 bits are scaled by the number of bits that the file declares.

        Raises:
            DataError: of kind ``"image"``, with the path: the file is missing, outside the root, a URL, not an image,
                truncated, has more than ``max_pixels`` pixels, a side more than :data:`MAX_ASPECT_RATIO` times as long
                as the other one, or samples whose range of brightness is unknown (floats, signed integers, 12 bits
                in 16).
        """
        file = self._locate(path)
        with _decoding(path):
            stream = file.open("rb")
        with stream:
            with _decoding(path):
                image = Image.open(stream, formats=_FORMATS)
                _check_samples(path, image)
                _check_tiles(path, image, self.max_pixels)
                sample_bits = _significant_bits(file) if image.format == "PNG" else None
                raw_mode = _raw_mode(image)
            problem = size_problem(
                (image.height, image.width), max_pixels=self.max_pixels, resized_size=self.resized_size
            )
            if problem:
                raise _image_error(path, problem)
            with _decoding(path):
                ImageOps.exif_transpose(image, in_place=True)
                image.load()
                return _to_rgb(_to_eight_bits(path, image, raw_mode, sample_bits))

    def size(self, path: str) -> tuple[int, int]:
        """Return the (height, width) of the upright image, from the header of the file alone.

        Raises:
            DataError: as :meth:`open`, if the file is missing, outside the root, a URL or not an image.
        """
        file = self._locate(path)
        with _decoding(path), Image.open(file, formats=_FORMATS) as image:
            # PIL decodes a PNG in search for an orientation that its header lacks.
            has_orientation = image.format != "PNG" or "exif" in image.info
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if has_orientation else 1
            return (image.width, image.height) if orientation in _LYING else (image.height, image.width)

    def _locate(self, path: str) -> Path:
        if "://" in path or path.startswith("data:"):
            raise _image_error(
                path, "is a URL; URLs are not supported: download the image and use the path of the file"
            )
        file = self.root / path
        try:
            resolved = file.resolve()
            if not resolved.is_relative_to(self._resolved_root):
                target = shorten(str(resolved))
                raise _image_error(
                    path, f"leads out of the image root {self.root} (to {target}); move the image below it"
                )
            if not resolved.is_file():
                state = "is not a regular file" if resolved.exists() else "does not exist"
                raise _image_error(path, f"{state} below the image root {self.root}; check image_root and the path")
        except DataError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise _image_error(path, f"cannot be looked up ({shorten(str(error))}); correct the path") from error
        return resolved


def size_problem(
    size: tuple[int, int],
    *,
    max_pixels: int = MAX_PIXELS,
    resized_size: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
) -> str | None:
    """Say why an image of ``size`` (height, width) is too large or too narrow; None if it is not.

    ``max_pixels`` and ``resized_size`` as in :class:`ImageStore`.
    """
    height, width = size
    if width * height > max_pixels:
        return f"has {width} x {height} pixels, more than max_pixels={max_pixels}; scale it down or raise max_pixels"
    ratio = max(size) / max(min(size), 1)
    if ratio > MAX_ASPECT_RATIO:
        return (
            f"has {width} x {height} pixels, an aspect ratio of {ratio:.0f}, more than {MAX_ASPECT_RATIO}; crop or pad "
            "it"
        )
    resized_height, resized_width = resized_size(size) if resized_size else size
    if resized_width * resized_height > max_pixels:
        return (
            f"has {width} x {height} pixels, an aspect ratio of {ratio:.0f}. The image processor would resize it to "
            f"{resized_width} x {resized_height} pixels, more than max_pixels={max_pixels}; crop or pad it to a lower "
            "aspect ratio"
        )
    return None


def open_image(root: str | Path, path: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open one image below ``root``. Equivalent to ``ImageStore(root, max_pixels=max_pixels).open(path)``."""
    return ImageStore(root, max_pixels=max_pixels).open(path)


@contextmanager
def _decoding(path: str) -> Iterator[None]:
    """Turn the errors of PIL into DataErrors of the image."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _image_error(path, f"is too large ({error}); scale it down") from error
    # Decoders raise many kinds of errors on broken files (OSError, SyntaxError, struct.error, zlib.error ...).
    except Exception as error:
        problem = shorten(str(error))
        raise _image_error(path, f"is not an image or is damaged ({problem}); replace or remove it") from error


def _is_tiff(image: Image.Image) -> bool:
    return image.format == "TIFF"


def _raw_mode(image: Image.Image) -> str:
    """Layout of the samples in the file, such as ``"RGB;16B"``; known until the image is decoded."""
    arguments = image.tile[0][3] if image.tile else ""
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _check_samples(path: str, image: Image.Image) -> None:
    """Refuse samples that PIL would decode to a wrong brightness, and whose range cannot be known."""
    formats = image.tag_v2.get(_TIFF_SAMPLE_FORMAT, ()) if _is_tiff(image) else ()
    if image.mode == "F" or not _TIFF_SIGNED_OR_FLOAT.isdisjoint(formats):
        raise _image_error(
            path, "has floating-point or signed samples, which declare no range of brightness; save it with 8 bits"
        )
    if _raw_mode(image).startswith("RGB;16") and "transparency" in image.info:
        raise _image_error(
            path, "has 16 bits per channel and a transparent colour, which PIL mixes up; save it as RGBA"
        )


def _check_tiles(path: str, image: Image.Image, max_pixels: int) -> None:
    """Refuse tiles that are much larger than the image, because PIL decodes whole tiles."""
    width, height = (image.tag_v2.get(tag, 1) for tag in _TIFF_TILE_SIZE) if _is_tiff(image) else (1, 1)
    if width * height > max_pixels:
        raise _image_error(
            path, f"has tiles of {width} x {height} pixels, more than max_pixels={max_pixels}; save it without tiles"
        )


def _to_eight_bits(path: str, image: Image.Image, raw_mode: str, sample_bits: int | None) -> Image.Image:
    """Scale grey images of more than 8 bits to ``"L"`` or ``"LA"``. PIL would cut their values off at 255.

    PIL keeps the upper eight bits of colours. Samples of 16 or 32 bits often hold fewer bits without saying so; such an
    image is refused, because it would become almost black.
    """
    transparent = image.info.get("transparency")
    if image.mode not in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        has_colours_of_16_bits = image.format in ("PNG", "TIFF") and ";16" in raw_mode
        if has_colours_of_16_bits and max(high for _, high in image.getextrema()[:3]) < 64:
            raise _unused_bits(path, 16)
        if raw_mode in ("L;2", "L;4") and isinstance(transparent, int):  # PIL scales the samples, but not this value
            image.info["transparency"] = transparent * (85 if raw_mode == "L;2" else 17)
        return image
    values = np.asarray(image)
    bits, is_container = 16, image.format != "PPM"  # PIL scales PGM to 16 bits by the maximum that it declares
    if _is_tiff(image):
        bits = image.tag_v2[_TIFF_BITS][0]
        is_container = bits in (16, 32)
        values = values.view(np.uint32) if bits == 32 else values
    low_bits = (1 << 16 - (sample_bits or 16)) - 1
    if sample_bits and values.max(initial=0) < 1 << sample_bits and (values & low_bits).any():
        bits, is_container = sample_bits, False  # the standard puts the significant bits first, but some files do not
    elif is_container and not sample_bits and 0 < values.max(initial=0) < 1 << bits - 2:
        raise _unused_bits(path, bits)
    grey = (values >> bits - 8).astype(np.uint8)
    if _is_tiff(image) and image.tag_v2.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        grey = 255 - grey
    scaled = Image.fromarray(grey)
    if isinstance(transparent, int):
        scaled.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return scaled


def _unused_bits(path: str, bits: int) -> DataError:
    return _image_error(
        path,
        f"declares {bits} bits per sample, but its brightest sample is below a quarter of their range, as in an image "
        "of 12 bits; scale it to 8 bits",
    )


def _significant_bits(file: Path) -> int | None:
    """Return the number of significant bits that a grey PNG of 16 bits declares (chunk sBIT); PIL does not read it."""
    with file.open("rb") as stream:
        stream.seek(8)
        while len(header := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"sBIT" and length == 1:
                bits = stream.read(1)
                return bits[0] if bits and 8 < bits[0] < 16 else None
            if kind == b"IDAT":
                return None
            stream.seek(length + 4, 1)
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _image_error(path: str, problem: str) -> DataError:
    return DataError(f"image {quote(path)} {problem}.", kind="image", file=path)
