"""Metadata of image files: the orientation, and files without their metadata, which is often damaged."""

import struct
import zlib
from typing import BinaryIO

from PIL import ExifTags, Image

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of an EXIF orientation upright."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks that determine pixels: all others of PNG only describe them. eXIf may hold the orientation.
_PNG_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"sBIT", b"acTL", b"fcTL", b"fdAT"}
_JPEG_STANDALONE = {0x01, *range(0xD0, 0xD9)}
_JPEG_START_OF_SCAN, _JPEG_COMMENT = 0xDA, 0xFE
_JPEG_KEPT = {0xE0, 0xEE}  # JFIF, and Adobe's, which names the colour space
_WEBP_METADATA = {b"EXIF", b"XMP ", b"ICCP"}
_WEBP_FLAGS = 0x20 | 0x08 | 0x04
# XMP, IPTC, Photoshop, EXIF, ICC profile, GPS
_TIFF_METADATA = {700, 33723, 34377, 34665, 34675, 34853}


def orientation(image: Image.Image, *, decode: bool = True) -> int:
    """Return the EXIF orientation of an opened image, 1 if it has none. Damaged metadata raises any exception.

    With ``decode=False``, metadata after the pixels of a PNG is not looked for.
    """
    exif = image.getexif() if decode else Image.Image.getexif(image)
    value = exif.get(ExifTags.Base.Orientation, 1)
    return value if value in ORIENTATIONS else 1


def has_metadata_after_pixels(stream: BinaryIO) -> bool:
    """Whether a PNG has text or EXIF after its pixels. The position in the stream stays."""
    place, after = stream.tell(), False
    stream.seek(len(_PNG_SIGNATURE))
    while len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if after and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            break
        after |= kind == b"IDAT"
        stream.seek(length + 4, 1)
    stream.seek(place)
    return len(header) == 8


def without_metadata(data: bytes) -> bytes | None:
    """Return an image file without its text, EXIF, XMP and colour profile; None if it has none or is another format.

    The pixels stay as they are. Everything from the first damaged structure on is kept unchanged.
    """
    if data.startswith(_PNG_SIGNATURE):
        kept = _png(data)
    elif data.startswith(b"\xff\xd8"):
        kept = _jpeg(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kept = _webp(data)
    elif data[:4] in (b"II*\0", b"MM\0*") and len(data) >= 8:
        kept = _tiff(data)
    else:
        return None
    return kept if kept != data else None


def _png(data: bytes) -> bytes:
    kept, place = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 12 + length
        if kind in _PNG_KEPT:
            kept.append(data[place:end])
        elif kind == b"eXIf" and end <= len(data):
            content = data[place + 4 : end - 4]
            kept.append(data[place : place + 4] + content + struct.pack(">I", zlib.crc32(content)))
        elif end > len(
            data
        ):  # a damaged chunk at the end; only the end of the file is missing if the image is complete
            kept.append(b"\0\0\0\0IEND\xaeB`\x82")
        place = end
        if kind == b"IEND":
            break
    return b"".join(kept)


def _jpeg(data: bytes) -> bytes:
    kept, place = [data[:2]], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF or marker in _JPEG_STANDALONE:
            step = 1 if marker == 0xFF else 2
            kept.append(data[place : place + step])
            place += step
            continue
        if marker == _JPEG_START_OF_SCAN:
            break
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in _JPEG_KEPT or not (0xE0 <= marker <= 0xEF or marker == _JPEG_COMMENT):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def _webp(data: bytes) -> bytes:
    kept, place = [], 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        end = place + 8 + length + length % 2
        chunk = data[place:end]
        if kind == b"VP8X" and len(chunk) > 8:
            chunk = chunk[:8] + bytes([chunk[8] & ~_WEBP_FLAGS]) + chunk[9:]
        if kind not in _WEBP_METADATA:
            kept.append(chunk)
        place = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(data: bytes) -> bytes:
    """Make each metadata tag of the first image an empty private one, in place."""
    order = "<" if data[:2] == b"II" else ">"
    changed = bytearray(data)
    (start,) = struct.unpack_from(order + "I", data, 4)
    if start + 2 > len(data):
        return data
    (count,) = struct.unpack_from(order + "H", data, start)
    for place in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
        (tag,) = struct.unpack_from(order + "H", data, place)
        if tag in _TIFF_METADATA:
            struct.pack_into(order + "HHII", changed, place, tag, 7, 1, 0)
    return bytes(changed)
