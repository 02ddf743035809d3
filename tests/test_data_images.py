"""Reading images: supported formats, refused files, and the file name in every error."""

import contextlib
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from idavlm.data import DataError, ImageStore, open_image


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
        DataError, match=r"'strip.png' has 1 x 5000 pixels, an aspect ratio of 5000, more than 200; crop"
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
