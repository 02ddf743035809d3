"""From files, bytes, URLs and PIL images to upright RGB images of limited size: the one way for all of idavlm."""

import base64
import binascii
import http.client
import io
import struct
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from idavlm.data.errors import DataError, quote, shorten
from idavlm.data.image_metadata import ORIENTATIONS, has_metadata_after_pixels, orientation, without_metadata
from idavlm.utils import check_positive

MAX_PIXELS = 64_000_000
"""Default limit on the pixels of an image. A small file can declare billions of pixels."""

MAX_ASPECT_RATIO = 200
"""Default limit on the long side of an image, relative to the short side (as in Qwen2-VL)."""

MAX_DOWNLOAD = 64 * 2**20
"""Limit on the bytes of an image that is downloaded."""

TIMEOUT = 30
"""Seconds after which a download fails."""

# Formats that PIL decodes itself. For others (EPS, PDF ...) it starts external programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_TILE_SIZE, _TIFF_SAMPLE_FORMAT = 258, 262, (322, 323), 339
_TIFF_SIGNED_OR_FLOAT = {2, 3}
_TIFF_WHITE_IS_ZERO = 0
_NO_RANGE = ("F", "I")
_MAX_REPAIRED = 256 * 2**20  # bytes of a file that is read once more without its metadata


class _DamagedImage(DataError):
    """An image that cannot be decoded; without its metadata, it may be."""


@dataclass(frozen=True, eq=False)
class RecordImages:
    """Where the images of one record are: in the record itself, at URLs, or in a folder.

    Records of tables (parquet, ``datasets``) may hold their images. :class:`RecordDataset` passes this as
    ``Sample.image_root``; :class:`ImageStore` opens the images.

    Attributes:
        root: the image root.
        images: bytes of image files, or PIL images, by the path that the record uses for them.
        allow_urls: whether paths may be URLs (``https://``, ``http://``) or base64 text (``data:``).
    """

    root: Path | None
    images: Mapping[str, bytes | Image.Image] = field(default_factory=dict, repr=False)
    allow_urls: bool = False

    def __eq__(self, other: object) -> bool:
        """Whether the images are the same: a cache of loaded images finds them when a record is read again."""
        if not isinstance(other, RecordImages):
            return NotImplemented
        same = (self.root, self.allow_urls, list(self.images)) == (other.root, other.allow_urls, list(other.images))
        return same and all(_key(image) == _key(other.images[path]) for path, image in self.images.items())

    def __hash__(self) -> int:
        return hash((self.root, self.allow_urls, *self.images, *map(_key, self.images.values())))


class ImageStore:
    """Images of a folder or of a record.

    Args:
        root: the image root. A path must not lead out of it, neither by ``..`` nor by a symbolic link. Or the images of
            a record.
        max_pixels: limit on width x height. Larger images are refused before they are decoded.
        max_aspect_ratio: limit on the long side, relative to the short side. A narrow image is refused, too, because
            processors that scale the short side to a length enlarge it to gigabytes.
        resized_size: function from the (height, width) of an image to the largest (height, width) that an image
            processor brings it to before it crops. Its pixels are limited by ``max_pixels`` too. None if the image is
            not resized.
    """

    def __init__(
        self,
        root: str | Path | RecordImages,
        *,
        max_pixels: int = MAX_PIXELS,
        max_aspect_ratio: int = MAX_ASPECT_RATIO,
        resized_size: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    ) -> None:
        check_positive(max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio)
        self.record = root if isinstance(root, RecordImages) else RecordImages(Path(root))
        self.root = self.record.root
        self.max_pixels = max_pixels
        self.max_aspect_ratio = max_aspect_ratio
        self.resized_size = resized_size
        self._resolved_root = None if self.root is None else self.root.resolve()

    def open(self, path: str) -> Image.Image:
        """Return the image as RGB, rotated upright by its EXIF orientation. Transparent pixels become white.

        Grey images of more than 8 bits are scaled by the number of bits that the file declares. Damaged metadata (text,
        EXIF, XMP, colour profile) is ignored with a warning.

        Raises:
            DataError: of kind ``"image"``, with the path: the file is missing, outside the root, a URL that is not
                allowed, not an image, truncated, has more than ``max_pixels`` pixels, a side more than
                ``max_aspect_ratio`` times as long as the other one, or samples whose range of brightness is unknown
                (floats, signed integers, 12 bits in 16).
        """
        held = self.record.images.get(path)
        if isinstance(held, Image.Image):
            return self.convert(held, path)
        if held is not None:
            return self.decode(held, path)
        if _is_url(path) and self.record.allow_urls:
            return self.decode(download(path), path)
        with self._open_file(path) as stream:
            return self._read(stream, path)

    def decode(self, data: bytes, name: str) -> Image.Image:
        """Return the image in the bytes of a file, as :meth:`open` does; ``name`` names it in errors."""
        return self._read(io.BytesIO(data), name)

    def convert(self, image: Image.Image, name: str) -> Image.Image:
        """Return a PIL image as :meth:`open` returns a file; ``name`` names it in errors."""
        if image.mode in _NO_RANGE or image.mode.startswith("I;16"):
            raise _image_error(
                name, f"has the mode {image.mode!r}, whose range of brightness is unknown; convert it to 'RGB'"
            )
        self._check_size(image, name)
        try:
            with _decoding(name):
                image.load()  # an image that PIL has opened, but not read
        except _DamagedImage:
            stream = getattr(image, "fp", None)
            if stream is None or stream.closed:
                raise
            stream.seek(0)
            return self._read(stream, name)
        return _upright(_to_rgb(image), name, source=image)

    def size(self, path: str) -> tuple[int, int]:
        """Return height and width of the upright image. Of a file, only the header is read.

        Raises:
            DataError: as :meth:`open`, as far as the header tells.
        """
        held = self.record.images.get(path)
        if isinstance(held, Image.Image) or (held is None and _is_url(path)):
            image = self.open(path)
            return image.height, image.width
        with io.BytesIO(held) if held is not None else self._open_file(path) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with _decoding(path):
                    image = _opened(stream)
            except _DamagedImage:  # its metadata may be
                stream.seek(0)
                image = self._read(stream, path)
                return image.height, image.width
            # PIL turns TIFF files itself. Of a PNG, it decodes the pixels to find metadata after them.
            decode = image.format == "PNG" and has_metadata_after_pixels(stream)
            is_turned = image.format != "TIFF" and _orientation(image, path, decode=decode) >= 5
            return (image.width, image.height) if is_turned else (image.height, image.width)

    def has(self, path: str) -> bool:
        """Whether there is such an image. It may be damaged or outside the root; a URL is not looked up."""
        if path in self.record.images or (_is_url(path) and self.record.allow_urls):
            return True
        try:
            return self.root is not None and (self.root / path).is_file()
        except (OSError, ValueError):
            return False

    def _open_file(self, path: str) -> BinaryIO:
        file = self._locate(path)
        with _decoding(path):
            return file.open("rb")

    def _read(self, stream: BinaryIO, name: str) -> Image.Image:
        try:
            return self._decode(stream, name)
        except _DamagedImage as damage:
            stream.seek(0)
            data = stream.read(_MAX_REPAIRED + 1)
            data = without_metadata(data) if len(data) <= _MAX_REPAIRED else None
            if data is None:
                raise
            try:
                image = self._decode(io.BytesIO(data), name)
            except DataError:
                raise damage from None
            _warn_of_metadata(name, damage.__cause__)
            return image

    def _decode(self, stream: BinaryIO, name: str) -> Image.Image:
        with _decoding(name):
            image = _opened(stream)
            _check_samples(name, image)
            _check_tiles(name, image, self.max_pixels)
            sample_bits = _significant_bits(stream) if image.format == "PNG" else None
            raw_mode = _raw_mode(image)
        self._check_size(image, name)
        with _decoding(name):
            image.load()
            converted = _to_rgb(_to_eight_bits(name, image, raw_mode, sample_bits))
        return _upright(converted, name, source=image)

    def _check_size(self, image: Image.Image, name: str) -> None:
        limits = {"max_pixels": self.max_pixels, "max_aspect_ratio": self.max_aspect_ratio}
        problem = size_problem((image.height, image.width), resized_size=self.resized_size, **limits)
        if problem:
            raise _image_error(name, problem)

    def _locate(self, path: str) -> Path:
        if _is_url(path):
            raise _image_error(
                path, "is a URL; URLs are not supported: download the image and use the path of the file"
            )
        if self.root is None:
            raise _image_error(
                path, "is not in the record, and there is no image root; pass image_root to the data set"
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
    max_aspect_ratio: int = MAX_ASPECT_RATIO,
    resized_size: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
) -> str | None:
    """Say why an image of ``size`` (height, width) is too large or too narrow; None if it is not.

    ``max_pixels``, ``max_aspect_ratio`` and ``resized_size`` as in :class:`ImageStore`.
    """
    height, width = size
    if width * height > max_pixels:
        return f"has {width} x {height} pixels, more than max_pixels={max_pixels}; scale it down or raise max_pixels"
    ratio = max(size) / max(min(size), 1)
    if ratio > max_aspect_ratio:
        return (
            f"has {width} x {height} pixels, an aspect ratio of {ratio:.0f}, more than max_aspect_ratio="
            f"{max_aspect_ratio}; crop or pad it, or raise max_aspect_ratio"
        )
    resized_height, resized_width = resized_size(size) if resized_size else size
    if resized_width * resized_height > max_pixels:
        return (
            f"has {width} x {height} pixels, an aspect ratio of {ratio:.0f}. The image processor would resize it to "
            f"{resized_width} x {resized_height} pixels, more than max_pixels={max_pixels}; crop or pad it to a lower "
            "aspect ratio, or raise max_pixels"
        )
    return None


def open_image(root: str | Path, path: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open one image below ``root``. Equivalent to ``ImageStore(root, max_pixels=max_pixels).open(path)``."""
    return ImageStore(root, max_pixels=max_pixels).open(path)


def array_size(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return height and width of an image as an array or tensor, whose channels are first or last; None if unclear."""
    if len(shape) == 3 and shape[-1] in (1, 3, 4):
        shape = shape[:2]
    elif len(shape) == 3 and shape[0] in (1, 3, 4):
        shape = shape[1:]
    return (int(shape[0]), int(shape[1])) if len(shape) == 2 else None


def download(url: str, name: str | None = None) -> bytes:
    """Return the bytes at a URL (``https://``, ``http://``) or of base64 text (``data:``).

    Raises:
        DataError: of kind ``"image"``: another scheme, more than :data:`MAX_DOWNLOAD` bytes, no answer; ``name`` or the
            URL is named.
    """
    name = url if name is None else name
    if url.startswith("data:"):
        return from_base64(url.partition(",")[2], name)
    if not url.startswith(("https://", "http://")):
        raise _image_error(name, "must begin with https:// or http://")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            data = response.read(MAX_DOWNLOAD + 1)
    # OSError: no connection, a status of the server. ValueError: a URL that is not one. HTTPException: no HTTP.
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _image_error(name, f"cannot be downloaded ({shorten(str(error))})") from error
    if len(data) > MAX_DOWNLOAD:
        raise _image_error(name, f"has more than {MAX_DOWNLOAD} bytes; use a smaller file")
    return data


def from_base64(text: str, name: str) -> bytes:
    """Return the bytes of base64 text."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _image_error(name, f"is not valid base64 text ({error})") from error


def _key(image: bytes | Image.Image) -> bytes | int:
    return image if isinstance(image, bytes) else id(image)


def _is_url(path: str) -> bool:
    return "://" in path or path.startswith("data:")


def _opened(stream: BinaryIO) -> Image.Image:
    return Image.open(stream, formats=_FORMATS)


def _orientation(image: Image.Image, name: str, *, decode: bool = True) -> int:
    """Return the EXIF orientation. If it cannot be read, the image stays as it is, with a warning."""
    try:
        return orientation(image, decode=decode)
    except MemoryError:
        raise
    except Exception as error:  # any kind, as in _decoding
        _warn_of_metadata(name, error)
        return 1


def _upright(image: Image.Image, name: str, *, source: Image.Image) -> Image.Image:
    """Rotate an image by the orientation in the metadata of ``source``."""
    method = ORIENTATIONS.get(_orientation(source, name))
    return image if method is None else image.transpose(method)


def _warn_of_metadata(name: str, error: BaseException | None) -> None:
    warnings.warn(
        f"image {quote(name)} has damaged metadata ({shorten(str(error))}), which is ignored; it is read as it is "
        "stored.",
        stacklevel=2,
    )


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
        message = f"image {quote(path)} is not an image or is damaged ({problem}); replace or remove it."
        raise _DamagedImage(message, kind="image", file=path) from error


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


def _significant_bits(stream: BinaryIO) -> int | None:
    """Return the number of significant bits that a grey PNG of 16 bits declares (chunk sBIT); PIL does not read it.

    The position in the stream, at which PIL continues to read, stays.
    """
    place, found = stream.tell(), None
    stream.seek(8)
    while len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"sBIT" and length == 1:
            bits = stream.read(1)
            found = bits[0] if bits and 8 < bits[0] < 16 else None
            break
        if kind == b"IDAT":
            break
        stream.seek(length + 4, 1)
    stream.seek(place)
    return found


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
