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
