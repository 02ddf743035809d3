"""Mutated image files of every format: opened as RGB, or a DataError that names the file; never gigabytes of memory."""

import io
import random
import resource
import struct
import tempfile
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from idavlm.data import DataError, ImageStore
from tests.fuzz import fuzz_settings

MAX_PIXELS = 300_000


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype)


def saved(image: Image.Image, name: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def valid_files() -> dict[str, bytes]:
    """Files of all formats, modes and compressions that are read."""
    colours, grey = Image.fromarray(noise(17, 23, 3)), Image.fromarray(noise(17, 23))
    deep = Image.fromarray(noise(17, 23, dtype=np.uint16))
    modes = {mode: colours.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")}
    modes |= {"LA": grey.convert("LA"), "I;16": deep, "I": Image.fromarray(noise(17, 23, dtype=np.int32))}
    modes |= {"F": grey.convert("F"), "PA": colours.convert("P").convert("PA")}
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for kind in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"):
        for mode, image in modes.items():
            try:
                files[f"{kind} {mode}"] = saved(image, kind, **({"exif": exif} if kind in ("JPEG", "PNG") else {}))
            except (OSError, ValueError, KeyError):  # the format has no such mode
                continue
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        image = modes["1" if compression == "group4" else "RGB"]
        files[f"TIFF {compression}"] = saved(image, "TIFF", compression=compression)
    files["GIF frames"] = saved(modes["P"], "GIF", save_all=True, append_images=[modes["L"]], duration=10)
    files["PNG frames"] = saved(colours, "PNG", save_all=True, append_images=[modes["RGB"]])
    files["WEBP frames"] = saved(colours, "WEBP", save_all=True, append_images=[grey.convert("RGB")], lossless=True)
    files["JPEG progressive"] = saved(colours, "JPEG", progressive=True, quality=30)
    files["PNG transparent"] = saved(modes["P"], "PNG", transparency=3)
    files["PGM plain"] = b"P2\n3 2\n1023\n0 1 2 3 400 1023\n"
    files["PFM"] = b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0, 1)
    return files


INTERESTING = [0, 1, 2, 127, 128, 255, 256, 4095, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1]


def mutate(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """Change bytes, numbers or parts of a file; checksums of PNG chunks are made right again."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        place, action = rng.randrange(max(len(data), 1)), rng.random()
        if rng.random() < 0.5:
            place = rng.randrange(max(min(len(data), 120), 1))  # headers
        if action < 0.3 and data:
            data[place] = rng.choice([rng.randrange(256), data[place] ^ 1 << rng.randrange(8)])
        elif action < 0.6:
            form = rng.choice("<>") + rng.choice("BHI")
            number = rng.choice(INTERESTING) % 256 ** struct.calcsize(form)
            data[place : place + struct.calcsize(form)] = struct.pack(form, number)
        elif action < 0.7:
            del data[place : place + rng.choice([1, 2, 4, 50, 10_000])]
        elif action < 0.8:
            data[place:place] = data[place : place + rng.choice([1, 4, 50])]
        elif action < 0.9:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[place : place + 20] = other[start : start + 20]
        else:
            data = data[:place]
    return with_checksums(bytes(data)) if rng.random() < 0.8 else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """Correct the checksums of a PNG, so that mutated chunks are read. Other files are returned unchanged."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, place = bytearray(data[:8]), 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunk = data[place + 4 : place + 8 + length]
        if len(chunk) < 4 + length:
            break
        out += struct.pack(">I", length) + chunk + struct.pack(">I", zlib.crc32(chunk))
        place += 12 + length
    return bytes(out + data[place:])


class Check:
    """Opens mutated files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.files = root, valid_files()
        self.store = ImageStore(root, max_pixels=MAX_PIXELS, resized_size=lambda size: (2 * size[0], 2 * size[1]))

    def __call__(self, rng: random.Random, kind: str) -> str:
        """Open one mutated file and return the outcome: ``"opened"`` or ``"refused"``."""
        (self.root / "x").write_bytes(mutate(rng, self.files[kind], list(self.files.values())))
        return self.open()

    def open(self) -> str:
        image, refusal = None, None
        try:
            image = self.store.open("x")
        except DataError as error:
            refusal = error
        if image is None:
            assert str(refusal).startswith("image 'x' ")
            assert (refusal.kind, refusal.file) == ("image", "x")
            assert len(str(refusal)) < 1000
            return "refused"
        assert image.mode == "RGB"
        assert image.width * image.height <= MAX_PIXELS
        return "opened"


def metadata_files() -> dict[str, tuple[bytes, list[tuple[int, int]]]]:
    """Files with metadata of every kind, and start and end of the content of each piece of metadata."""
    exif = Image.Exif()
    for tag, value in {0x0112: 6, 0x010F: "maker", 0x011A: 72.0, 0x8769: {0x9003: "2020:01:01 00:00:00"}}.items():
        exif[tag] = value
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    icc = bytes(range(256)) * 2
    image, files = Image.fromarray(noise(17, 23, 3)), {}
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 300)
    text.add_text("Comment", "y" * 300, zip=True)
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    text.add_itxt("Title", "z" * 300, lang="de", tkey="Titel", zip=True)
    files["PNG"] = saved(image, "PNG", exif=exif, pnginfo=text, icc_profile=icc, dpi=(72, 72))
    files["JPEG"] = saved(image, "JPEG", exif=exif, comment=b"comment", icc_profile=icc, xmp=xmp)
    files["WEBP"] = saved(image, "WEBP", exif=exif, icc_profile=icc, xmp=xmp, lossless=True)
    places = {name: [] for name in files}
    place = 8
    while place < len(files["PNG"]):
        (length,) = struct.unpack_from(">I", files["PNG"], place)
        if files["PNG"][place + 4 : place + 8] not in (b"IHDR", b"IDAT", b"IEND"):
            places["PNG"].append((place + 8, place + 8 + length))
        place += 12 + length
    place = 2
    while files["JPEG"][place + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", files["JPEG"], place + 2)
        if files["JPEG"][place + 1] in (0xE1, 0xE2, 0xFE):
            places["JPEG"].append((place + 4, place + 2 + length))
        place += 2 + length
    place = 12
    while place < len(files["WEBP"]):
        kind, length = struct.unpack_from("<4sI", files["WEBP"], place)
        if kind in (b"EXIF", b"XMP ", b"ICCP"):
            places["WEBP"].append((place + 8, place + 8 + length))
        place += 8 + length + length % 2
    return {name: (data, places[name]) for name, data in files.items()}


def mutate_metadata(rng: random.Random, data: bytes, places: list[tuple[int, int]]) -> bytes:
    """Overwrite parts of the content of metadata; lengths and pixels stay. Most checksums are made right again."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 5, 20])):
        start, end = rng.choice(places)
        place = rng.randrange(start, end)
        form = rng.choice("<>") + rng.choice("BHI")
        number = struct.pack(form, rng.choice(INTERESTING) % 256 ** struct.calcsize(form))
        new = rng.choice([number, rng.randbytes(rng.choice([1, 4, 40])), data[start : start + 8]])[: end - place]
        changed[place : place + len(new)] = new
    return with_checksums(bytes(changed)) if rng.random() < 0.8 else bytes(changed)


class MetadataCheck:
    """Opens files with mutated metadata below a folder: always the image, turned in one of eight ways."""

    def __init__(self, root: Path) -> None:
        self.root, self.store, self.files = root, ImageStore(root), metadata_files()
        self.pixels = {}
        for name, (data, _) in self.files.items():
            stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            turned = [np.rot90(stored, turns) for turns in range(4)]
            self.pixels[name] = {array.tobytes() for one in turned for array in (one, one[:, ::-1])}

    def __call__(self, rng: random.Random, kind: str) -> str:
        data, places = self.files[kind]
        (self.root / "x").write_bytes(mutate_metadata(rng, data, places))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            image = self.store.open("x")
        assert image.tobytes() in self.pixels[kind]
        return "warned" if any("damaged metadata" in str(warning.message) for warning in caught) else "opened"


@pytest.fixture(scope="module")
def metadata_check(tmp_path_factory):
    return MetadataCheck(tmp_path_factory.mktemp("images"))


@fuzz_settings(150)
@given(rng=st.randoms(use_true_random=False), kind=st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_damaged_metadata_never_condemns_an_image(metadata_check, rng, kind):
    metadata_check(rng, kind)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    return Check(tmp_path_factory.mktemp("images"))


def test_valid_files_are_opened_or_refused_by_name(check):
    outcomes = {}
    for kind, content in check.files.items():
        (check.root / "x").write_bytes(content)
        outcomes[kind] = check.open()
    refused = {kind for kind, outcome in outcomes.items() if outcome == "refused"}
    assert refused == {"TIFF I", "TIFF F", "PPM F", "PFM"}, "floats and signed integers"


@pytest.mark.filterwarnings("ignore")
@fuzz_settings(400)
@given(rng=st.randoms(use_true_random=False), kind=st.sampled_from(sorted(valid_files())))
def test_a_mutated_file_is_opened_or_a_data_error(check, rng, kind):
    check(rng, kind)


def run(count: int, seed: int) -> Counter:
    """Open ``count`` mutated files, and as many with mutated metadata; returns how often each outcome occurred.

    Fails if it took more than 1 GB.
    """
    rng, outcomes = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check = Check(Path(folder))
        kinds = sorted(check.files)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            kind = kinds[number % len(kinds)]
            outcomes[f"{kind.split()[0]}: {check(rng, kind)}"] += 1
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert peak < 1_000_000, f"file {number} ({kind}) took {peak} KB"
        metadata_check = MetadataCheck(Path(folder))
        for number in range(count):
            kind = ("PNG", "JPEG", "WEBP")[number % 3]
            outcomes[f"{kind}, metadata only: {metadata_check(rng, kind)}"] += 1
        outcomes["KB of memory at most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return outcomes
