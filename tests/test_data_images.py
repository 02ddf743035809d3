"""Reading images: supported formats, refused files, and the file name in every error."""

import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from idavlm.data import DataError, ImageStore, RecordImages, open_image
from idavlm.data.photos import PhotoLoader


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    (folder / "k").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(folder / "good.png")
    Image.new("RGB", (64, 64), "blue").save(folder / "k" / "photo.jpg")
    return folder


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.bmp", "x.gif", "x.webp", "x.tif", "x.ppm"])
def test_formats(root, name):
    Image.new("RGB", (9, 7), (250, 10, 10)).save(root / name)
    image = open_image(root, name)
    assert (image.mode, image.size) == ("RGB", (9, 7))
    assert np.abs(np.asarray(image).astype(int) - (250, 10, 10)).max() < 12


def test_images_in_subfolders_and_a_root_given_as_text(root):
    assert ImageStore(str(root)).open("k/photo.jpg").size == (64, 64)


def test_every_mode_becomes_rgb(root):
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK"):
        name = f"mode_{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new("RGB", (8, 8), "white").convert(mode).save(root / name)
        image = open_image(root, name)
        assert image.mode == "RGB"
        assert np.asarray(image).min() > 250


def test_transparent_pixels_become_white_whatever_their_colour(root):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 255, 255))
    image.save(root / "clear.png")
    pixels = np.asarray(open_image(root, "clear.png"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [0, 0, 255]


def test_sixteen_bits_are_scaled_not_clipped(root):
    Image.fromarray(np.array([[0, 256 * 100], [256 * 200, 65535]], np.uint16)).save(root / "deep.png")
    assert np.asarray(open_image(root, "deep.png"))[..., 0].tolist() == [[0, 100], [200, 255]]


def test_images_are_rotated_upright(root):
    image = Image.new("RGB", (40, 20), "white")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(root / "turned.jpg", exif=exif)
    assert open_image(root, "turned.jpg").size == (20, 40)


def png_of(width, height):
    """A small PNG file that declares ``width`` x ``height`` pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def broken(root):
    photo = (root / "k" / "photo.jpg").read_bytes()
    image = (root / "good.png").read_bytes()
    return {
        "empty.jpg": b"",
        "text.jpg": b"not an image\n" * 50,
        "page.png": b"<html><body>404</body></html>",
        "cut.jpg": photo[: len(photo) // 2],
        "header.jpg": photo[:30],
        "cut.png": image[: len(image) // 2],
        "short.png": image[:-40],
        "flipped.png": image[:60] + bytes([image[60] ^ 255]) + image[61:],
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }


def test_broken_files_are_named(root):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(root / "k" / "photo.jpg")
    Image.fromarray(noise).save(root / "good.png")
    for name, data in broken(root).items():
        (root / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"image '{name}' is not an image or is damaged") as caught:
            open_image(root, name)
        assert (caught.value.kind, caught.value.file) == ("image", name)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("pixels", [(50_000, 50_000), (12_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_not_decoded(root, pixels):
    (root / "bomb.png").write_bytes(png_of(*pixels))
    with pytest.raises(DataError, match=r"image 'bomb.png' (is too large|has .* pixels, more than max_pixels)"):
        open_image(root, "bomb.png")


def test_max_pixels(root):
    assert open_image(root, "good.png", max_pixels=1200).size == (40, 30)
    with pytest.raises(DataError, match=r"'good.png' has 40 x 30 pixels, more than max_pixels=1199; scale it down or"):
        open_image(root, "good.png", max_pixels=1199)
    with pytest.raises(ValueError, match="max_pixels=0 must be"):
        ImageStore(root, max_pixels=0)


def test_paths_that_are_refused(root, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    secret = str(tmp_path / "secret.png")
    for path, reason in {
        "none.png": "does not exist below the image root",
        "k": "is not a regular file",
        "pipe.png": "is not a regular file",
        "../secret.png": "leads out of the image root",
        secret: "leads out of the image root",
        "link.png": "leads out of the image root",
        "folder/secret.png": "leads out of the image root",
        "https://host/x.png": "is a URL; URLs are not supported",
        "file:///etc/passwd": "is a URL; URLs are not supported",
        "data:image/png;base64,AAAA": "is a URL; URLs are not supported",
        "x\0.png": "cannot be looked up",
        "n" * 5000: "cannot be looked up",
        "loop.png": "does not exist|cannot be looked up",
    }.items():
        with pytest.raises(DataError, match=reason) as caught:
            open_image(root, path)
        assert caught.value.kind == "image"
        assert path[:80].replace("\0", "\\x00") in str(caught.value)


def test_links_within_the_root_are_followed(root):
    (root / "again.png").symlink_to("good.png")
    assert open_image(root, "again.png").size == (40, 30)


def test_a_root_that_is_itself_a_link(root, tmp_path):
    (tmp_path / "elsewhere").symlink_to(root)
    assert open_image(tmp_path / "elsewhere", "good.png").size == (40, 30)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_opens_or_is_a_data_error(root, data):
    name = data.draw(st.sampled_from(["good.png", "k/photo.jpg"]))
    content = bytearray((root / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (root / "damaged").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(DataError):
        assert open_image(root, "damaged").mode == "RGB"


# --- Images of more than 8 bits, and other samples that need care ----------------------------------------------------


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, *, bits=16, colour=0, significant_bits=None, transparent=None):
    """A PNG of one row. ``samples`` are the values of all channels in turn; ``colour`` 0, 2, 4, 6: L, RGB, LA, RGBA."""
    width = len(samples) // {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    packed = int("".join(f"{sample:0{bits}b}" for sample in samples).ljust(-(-len(samples) * bits // 8) * 8, "0"), 2)
    row = packed.to_bytes(-(-len(samples) * bits // 8), "big")
    more = b"" if significant_bits is None else chunk(b"sBIT", bytes([significant_bits]))
    more += b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    data = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def tiff(data, *, width, bits, sample_format=1, white_is_zero=False, order="<", **tags):
    """An uncompressed grey TIFF of one row."""
    entries = {256: width, 257: 1, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: 1}
    entries |= {279: len(data), 339: sample_format} | {int(tag[1:]): value for tag, value in tags.items()}
    data += b"\0" * (len(data) % 2)
    table = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    return start + data + struct.pack(order + "H", len(entries)) + table + bytes(4)


def pgm(samples, maximum, *, plain=False):
    if plain:
        return f"P2\n{len(samples)} 1\n{maximum}\n{' '.join(map(str, samples))}\n".encode()
    form = f">{len(samples)}{'H' if maximum > 255 else 'B'}"
    return f"P5\n{len(samples)} 1\n{maximum}\n".encode() + struct.pack(form, *samples)


def packed_12_bits(*samples):
    return int("".join(f"{sample:012b}" for sample in samples), 2).to_bytes(len(samples) * 12 // 8, "big")


HALVES = [0, 0x4000, 0x8000, 0xFFFF]
DEEP = {
    "PGM of 4 bits": pgm([0, 4, 7, 15], 15),
    "PGM of 8 bits": pgm([0, 64, 128, 255], 255),
    "PGM of 10 bits": pgm([0, 256, 512, 1023], 1023),
    "PGM of 10 bits, plain": pgm([0, 256, 512, 1023], 1023, plain=True),
    "PGM of 12 bits": pgm([0, 1024, 2048, 4095], 4095),
    "PGM of 16 bits": pgm(HALVES, 65535),
    "PGM of 16 bits, plain": pgm(HALVES, 65535, plain=True),
    "PPM of 10 bits": b"P6\n2 1\n1023\n" + struct.pack(">6H", 0, 256, 512, 1023, 1023, 1023),
    "PPM of 16 bits": b"P6\n2 1\n65535\n" + struct.pack(">6H", *HALVES, 0xFFFF, 0xFFFF),
    "PNG of 4 bits": png([0, 4, 7, 15], bits=4),
    "PNG of 16 bits": png(HALVES),
    "PNG of 16 bits, RGB": png([*HALVES, 0xFFFF, 0xFFFF], colour=2),
    "PNG of 16 bits, LA": png([0, 0xFFFF, 0x4000, 0xFFFF, 0x8000, 0xFFFF, 0xFFFF, 0xFFFF], colour=4),
    "PNG of 16 bits, RGBA": png([*HALVES[:3], 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF], colour=6),
    "PNG of 12 bits in the upper bits of 16": png([0, 0x4000, 0x8000, 0xFFF0], significant_bits=12),
    "PNG of 12 bits in the lower bits of 16": png([0, 0x401, 0x801, 0xFFF], significant_bits=12),
    "TIFF of 12 bits": tiff(packed_12_bits(0, 0x400, 0x800, 0xFFF), width=4, bits=12),
    "TIFF of 16 bits": tiff(struct.pack("<4H", *HALVES), width=4, bits=16),
    "TIFF of 16 bits, big-endian": tiff(struct.pack(">4H", *HALVES), width=4, bits=16, order=">"),
    "TIFF of 16 bits, white is 0": tiff(
        struct.pack("<4H", *(0xFFFF - value for value in HALVES)), width=4, bits=16, white_is_zero=True
    ),
    "TIFF of 32 bits": tiff(struct.pack("<4I", *(value << 16 for value in HALVES)), width=4, bits=32),
}


@pytest.mark.parametrize("kind", DEEP)
def test_images_of_any_depth_are_scaled_by_the_depth_that_they_declare(root, kind):
    (root / "deep").write_bytes(DEEP[kind])
    pixels = np.asarray(open_image(root, "deep"))[0].astype(int)
    samples = pixels[:, 0] if len(pixels) == 4 else pixels.reshape(-1)[:4]
    assert np.abs(samples - [0, 64, 128, 255]).max() <= (9 if "4 bits" in kind else 1)


REFUSED = {
    "floating-point or signed samples": {
        "float TIFF": tiff(struct.pack("<2f", 0.0, 1.0), width=2, bits=32, sample_format=3),
        "float PFM": b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.0, 1.0),
        "signed TIFF of 8 bits": tiff(struct.pack("<2b", -128, 127), width=2, bits=8, sample_format=2),
        "signed TIFF of 16 bits": tiff(struct.pack("<2h", -32768, 32767), width=2, bits=16, sample_format=2),
        "signed TIFF of 32 bits": tiff(struct.pack("<2i", -5, 2**31 - 1), width=2, bits=32, sample_format=2),
    },
    "its brightest sample is below a quarter of their range": {
        "PNG of 12 bits in 16": png([0, 0x401, 0x801, 0xFFF]),
        "PNG of 8 bits in 16": png([0, 64, 128, 255]),
        "PNG of 12 bits in 16, RGB": png([0, 0x401, 0xFFF], colour=2),
        "PNG of 8 bits in 16, RGBA": png([0, 64, 255, 0xFFFF], colour=6),
        "TIFF of 12 bits in 16": tiff(struct.pack("<2H", 0, 0xFFF), width=2, bits=16),
        "TIFF of 16 bits in 32": tiff(struct.pack("<2I", 0, 0xFFFF), width=2, bits=32),
    },
    "16 bits per channel and a transparent colour": {
        "PNG": png([0x12FF, 0x12FF, 0x12FF, 0xFFFF, 0xFFFF, 0xFFFF], colour=2, transparent=[0x12FF] * 3),
    },
}


@pytest.mark.parametrize(("reason", "kind"), [(reason, kind) for reason in REFUSED for kind in REFUSED[reason]])
def test_samples_whose_range_is_unknown_are_refused_by_name(root, reason, kind):
    (root / "deep").write_bytes(REFUSED[reason][kind])
    with pytest.raises(DataError, match=f"image 'deep' .*{reason}.*; (save|scale) it") as caught:
        open_image(root, "deep")
    assert caught.value.kind == "image"


def test_black_stays_black(root):
    (root / "black.png").write_bytes(png([0, 0]))
    assert not np.asarray(open_image(root, "black.png")).any()


@pytest.mark.parametrize(
    ("bits", "samples"), [(1, [0, 1]), (2, [1, 3]), (4, [5, 15]), (8, [85, 255]), (16, [1, 65535])]
)
def test_a_transparent_grey_becomes_white_at_every_depth(root, bits, samples):
    (root / "grey.png").write_bytes(png(samples, bits=bits, transparent=samples[:1]))
    assert np.asarray(open_image(root, "grey.png"))[0, :, 0].tolist() == [255, 255]
    (root / "grey.png").write_bytes(png(samples[::-1], bits=bits, transparent=samples[1:]))
    assert np.asarray(open_image(root, "grey.png"))[0, 0].tolist() == [255] * 3
    (root / "grey.png").write_bytes(png(samples, bits=bits))
    assert np.asarray(open_image(root, "grey.png"))[0, 0, 0] < 100


@pytest.mark.parametrize(("mode", "name"), [("LA", "x.tif"), ("PA", "x.tif"), ("P", "x.png"), ("LA", "x.webp")])
def test_transparency_in_every_mode(root, mode, name):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    if mode == "PA":
        alpha, image = image.getchannel("A"), image.convert("RGB").convert("P").convert("PA")
        image.putalpha(alpha)
    else:
        image = image.convert(mode)
    image.save(root / name, **({"lossless": True} if name.endswith("webp") else {}))
    pixels = np.asarray(open_image(root, name))
    assert pixels[:, :2].max() < 10
    assert pixels[:, 2:].min() > 245


def test_deep_images_are_rotated_upright(root):
    values = np.array([[0, 30000, 65535], [1, 2, 3]], np.uint16)
    image = Image.fromarray(values)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(root / "deep.png", exif=exif)
    image.save(root / "deep.tif", exif=exif)
    for name in ("deep.png", "deep.tif"):
        pixels = np.asarray(open_image(root, name))[..., 0]
        assert pixels.tolist() == (np.rot90(values, -1) >> 8).tolist(), name


# --- Size ------------------------------------------------------------------------------------------------------------


def test_the_aspect_ratio_is_limited(root):
    for size in ((1, 200), (200, 1)):
        Image.new("RGB", size).save(root / "strip.png")
        assert open_image(root, "strip.png").size == size
    Image.new("RGB", (1, 5000)).save(root / "strip.png")
    with pytest.raises(
        DataError, match=r"'strip.png' has 1 x 5000 pixels, .* of 5000, more than max_aspect_ratio=200; crop"
    ):
        open_image(root, "strip.png")


def test_the_resized_image_is_limited_before_decoding(root, monkeypatch):
    def resized(size):
        return size[0] * 1000, size[1] * 1000

    store = ImageStore(root, resized_size=resized, max_pixels=40 * 30 * 1000**2)
    assert store.open("good.png").size == (40, 30)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(
        DataError,
        match=r"aspect ratio of 1. The image processor would resize it to 40000 x 30000 pixels, more than max",
    ):
        ImageStore(root, resized_size=resized, max_pixels=40 * 30 * 1000**2 - 1).open("good.png")


def test_large_parts_of_small_images_are_not_decoded(root):
    rows = zlib.compress(bytes(1000))
    tiles = {"t258": 8, "t259": 8, "t322": 40_000, "t323": 40_000, "t324": 8, "t325": len(rows)}
    (root / "tiles.tif").write_bytes(tiff(rows, width=1, bits=8, **tiles))
    with pytest.raises(DataError, match=r"has tiles of 40000 x 40000 pixels, more than max_pixels"):
        open_image(root, "tiles.tif")
    frame = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + bytes(6)
    frame += b"," + struct.pack("<HHHH", 0, 0, 9000, 9000) + b"\0\x02\x03\x44\x01\x00\0;"
    (root / "frame.gif").write_bytes(frame)
    with pytest.raises(DataError, match="has 9000 x 9000 pixels, more than max_pixels"):
        open_image(root, "frame.gif")


def test_a_lack_of_memory_is_not_the_fault_of_an_image(root, monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", load)
    with pytest.raises(MemoryError):
        open_image(root, "good.png")


def test_messages_quote_200_characters_of_a_path(root):
    for path in ("n" * 5000, "d/" * 3000 + "x.png", "http://host/" + "n" * 5000, "\0" * 5000):
        with pytest.raises(DataError) as caught:
            open_image(root, path)
        assert len(str(caught.value)) < 1400 + len(str(root))
        assert path[:250] not in str(caught.value)


def test_a_mistake_in_resized_size_is_not_the_fault_of_the_image(root):
    def mistaken(size):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ImageStore(root, resized_size=mistaken).open("good.png")


# --- Metadata --------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'


def encoded(kind, **options):
    stream = io.BytesIO()
    Image.fromarray(NOISE).save(stream, kind, **options)
    return stream.getvalue()


def exif_bytes(orientation=None, *, rational=None):
    """EXIF with an orientation, and a resolution of numerator and denominator ``rational``."""
    entries = [] if orientation is None else [struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)]
    start = 8 + 2 + 12 * (len(entries) + (rational is not None)) + 4
    if rational is not None:
        entries.append(struct.pack(">HHII", 0x011A, 5, 1, start))
    table = struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)
    values = b"" if rational is None else struct.pack(">II", *rational)
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + table + values


def with_png_chunks(*chunks, before_pixels=True):
    data = encoded("PNG")
    place = data.index(b"IDAT") - 4 if before_pixels else data.index(b"IEND") - 4
    return data[:place] + b"".join(chunk(kind, content) for kind, content in chunks) + data[place:]


def with_bad_checksum(data, kind):
    """Break the checksum of the first chunk of a kind."""
    place = data.index(kind)
    end = place + 4 + struct.unpack(">I", data[place - 4 : place])[0]
    return data[:end] + bytes([data[end] ^ 255]) + data[end + 1 :]


def with_jpeg_segment(marker, content):
    data = encoded("JPEG", quality=95)
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


def with_webp_chunk(kind, content):
    data = encoded("WEBP", lossless=True, exif=exif_bytes(1))
    place = data.index(b"EXIF")
    (length,) = struct.unpack("<I", data[place + 4 : place + 8])
    rest = data[place + 8 + length + length % 2 :]
    data = data[:place] + kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2) + rest
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


TEXT = zlib.compress(b"x" * 2_000_000)
DAMAGED = {
    "PNG, 2 MB of compressed text": with_png_chunks((b"zTXt", b"k\0\0" + TEXT)),
    "PNG, 2 MB of international text": with_png_chunks((b"iTXt", b"k\0\1\0\0\0" + TEXT)),
    "PNG, 2 MB of text after the pixels": with_png_chunks((b"zTXt", b"k\0\0" + TEXT), before_pixels=False),
    "PNG, a wrong checksum": with_bad_checksum(with_png_chunks((b"tEXt", b"k\0text")), b"tEXt"),
    "PNG, a colour profile that is no zlib": with_png_chunks((b"iCCP", b"icc\0\1xyz")),
    "PNG, a short gamma": with_png_chunks((b"gAMA", b"x")),
    "PNG, text that the file cuts off": encoded("PNG")[:-12] + struct.pack(">I", 999) + b"tEXtk\0text",
    "PNG, EXIF that is none": with_png_chunks((b"eXIf", b"MM\0*\0\0")),
    "PNG, a raw profile that is no hex": with_png_chunks((b"tEXt", b"Raw profile type exif\0\n\n\n\nxyz\n")),
}
FINE = {
    "JPEG, EXIF that is none": with_jpeg_segment(0xE1, b"Exif\0\0no EXIF"),
    "JPEG, EXIF that is cut off": with_jpeg_segment(0xE1, b"Exif\0\0MM\0*\0\0"),
    "JPEG, an offset beyond the EXIF": with_jpeg_segment(0xE1, b"Exif\0\0MM\0*\x7f\xff\xff\xff"),
    "TIFF, an EXIF block beyond the file": encoded("TIFF", tiffinfo={34665: 2**31}),
    "PNG, 2 MB of plain text": with_png_chunks((b"tEXt", b"k\0" + b"x" * 2_000_000)),
    "PNG, XMP that is not XML": with_png_chunks((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<<<\xff\xfe")),
    "JPEG, a resolution of 0/0": with_jpeg_segment(0xE1, exif_bytes(rational=(0, 0))),
    "JPEG, a resolution of 1/0": with_jpeg_segment(0xE1, exif_bytes(1, rational=(1, 0))),
    "JPEG, an orientation of 9": with_jpeg_segment(0xE1, exif_bytes(9)),
    "JPEG, XMP that is not XML": with_jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<<<\xff\xfe"),
    "JPEG, a comment of any bytes": with_jpeg_segment(0xFE, bytes(range(256))),
    "WEBP, XMP that is not XML": with_webp_chunk(b"XMP ", b"\xff\xfe<<<"),
}


def pixels_of(kind):
    """The pixels without the metadata."""
    image = Image.open(io.BytesIO(encoded(kind, **{"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {}))))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_metadata_is_a_warning_and_the_image_stays_as_it_is(root, kind):
    (root / "x").write_bytes(DAMAGED[kind])
    with pytest.warns(UserWarning, match=r"image 'x' has damaged metadata \(.*\), which is ignored"):
        image = open_image(root, "x")
    assert np.array_equal(np.asarray(image), pixels_of(kind.split(",")[0]))
    assert ImageStore(root).size("x") == (image.height, image.width)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # of PIL
@pytest.mark.parametrize("kind", FINE)
def test_odd_metadata_does_no_harm(root, kind):
    (root / "x").write_bytes(FINE[kind])
    assert np.array_equal(np.asarray(open_image(root, "x")), pixels_of(kind.split(",")[0]))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_made_upright(root, kind, orientation):
    """Also with a resolution of 0/0, which cannot be written again."""
    exif = exif_bytes(orientation, rational=(0, 0))
    if kind == "TIFF":
        data = encoded("TIFF", tiffinfo={0x0112: orientation})
    elif kind == "JPEG":
        data = with_jpeg_segment(0xE1, exif)
    elif kind == "PNG":
        data = with_png_chunks((b"eXIf", exif[6:]))
    else:
        data = encoded("WEBP", lossless=True, exif=exif)
    (root / "x").write_bytes(data)
    stored = pixels_of(kind)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }
    store = ImageStore(root)
    assert np.array_equal(np.asarray(store.open("x")), upright[orientation])
    assert store.size("x") == upright[orientation].shape[:2]


def test_the_orientation_of_a_repaired_file_is_kept(root):
    data = with_png_chunks((b"eXIf", exif_bytes(6)[6:]), (b"zTXt", b"k\0\0" + TEXT))
    (root / "x").write_bytes(data)
    with pytest.warns(UserWarning, match="damaged metadata"):
        assert open_image(root, "x").size == (20, 30)


def test_a_damaged_image_stays_an_error_whatever_its_metadata(root):
    data = with_png_chunks((b"zTXt", b"k\0\0" + TEXT))
    place = data.index(b"IDAT") + 40
    for broken in (data[:place], data[:place] + b"\xff" * 40 + data[place + 40 :]):
        (root / "x").write_bytes(broken)
        with pytest.raises(DataError, match="image 'x' is not an image or is damaged"):
            open_image(root, "x")


def test_bytes_and_pil_images_are_read_as_files_are(root):
    """Transparency, orientation, limits and damaged metadata, by every way in."""
    clear = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    clear.save(root / "clear.png", exif=exif_bytes(6)[6:])
    expected = np.full((40, 20, 3), 255, np.uint8)
    data = (root / "clear.png").read_bytes()
    loader = PhotoLoader(root)
    for image in ("clear.png", root / "clear.png", data, {"bytes": data, "path": None}, Image.open(root / "clear.png")):
        found = loader.load(image, field="x")
        assert (found.mode, np.asarray(found).tolist()) == ("RGB", expected.tolist())
    record = RecordImages(None, {"a": data, "b": Image.open(root / "clear.png")})
    for name in ("a", "b"):
        assert np.array_equal(np.asarray(ImageStore(record).open(name)), expected)
    for kind in ("PNG, a raw profile that is no hex", "PNG, 2 MB of text after the pixels"):
        opened = Image.open(io.BytesIO(DAMAGED[kind]))
        with pytest.warns(UserWarning, match="image 'x' has damaged metadata"):
            assert np.array_equal(np.asarray(loader.load(opened, field="x")), NOISE)


def test_narrow_images_are_refused_by_every_way_in(root):
    strip = Image.new("RGB", (2, 8000))
    strip.save(root / "strip.png")
    loader = PhotoLoader(root)
    ways = [
        "strip.png",
        (root / "strip.png").read_bytes(),
        strip,
        np.asarray(strip),
        np.asarray(strip).transpose(2, 0, 1),
    ]
    for image in ways:
        with pytest.raises(
            DataError,
            match=r"has 2 x 8000 pixels, .* of 4000, more than max_aspect_ratio=200; crop or pad it",
        ):
            loader.load(image, field="x")
    for image in ways:
        PhotoLoader(root, max_aspect_ratio=4000).load(image, field="x")


def test_the_record_knows_its_images(root):
    store = ImageStore(root)
    assert [store.has(name) for name in ("good.png", "none.png", "k", "../x", "https://x/y.png")] == [True] + [
        False
    ] * 4
    assert store.size("good.png") == (30, 40)
    with pytest.raises(
        DataError, match=r"'none.png' is not in the record, and there is no image root; pass image_root"
    ):
        ImageStore(RecordImages(None)).open("none.png")


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.bmp", "x.gif", "x.webp", "x.tif", "x.ppm"])
def test_the_size_is_that_of_the_opened_image(root, name, monkeypatch):
    Image.new("RGB", (9, 7)).save(root / name)
    opened = open_image(root, name)
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "load", lambda self: pytest.fail("the image was decoded"))
        assert ImageStore(root).size(name) == (opened.height, opened.width) == (7, 9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_follows_the_exif_orientation(root, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("x.jpg", "x.png", "x.webp"):
        Image.new("RGB", (9, 7)).save(root / name, exif=exif)
        opened = open_image(root, name)
        assert ImageStore(root).size(name) == (opened.height, opened.width), name


def test_the_size_of_a_file_that_cannot_be_used(root):
    (root / "broken.png").write_bytes(b"no image")
    for name, problem in (("broken.png", "is not an image"), ("none.png", "does not exist"), ("../x.png", "leads out")):
        with pytest.raises(DataError, match=problem):
            ImageStore(root).size(name)
