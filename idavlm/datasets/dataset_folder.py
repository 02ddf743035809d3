"""Folders of built data sets: atomic builds, records, JPEG images, and the cache for downloads."""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

DESCRIPTION = "dataset.json"
"""File that describes a data set: name, version, options and counts."""


def build_once(
    root: str | Path, name: str, version: int, options: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]
) -> Path:
    """Build a data set unless ``root`` already contains it.

    ``build`` writes into a temporary folder next to ``root``, which replaces ``root`` when it is complete. If a build
    is interrupted, ``root`` is unchanged, and the next build removes the temporary folder.

    Args:
        root: folder of the data set. It must be missing, empty, or contain a data set with ``dataset.json``.
        name: name of the data set.
        version: version of the contents. Increase it whenever ``build`` writes something else for the same options.
        options: all options that the contents depend on, as JSON values.
        build: writes the data set into the folder that it is called with, and returns further entries of
            ``dataset.json``.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` contains something other than a data set.
    """
    root = Path(root)
    description = {"name": name, "version": version, "options": dict(options)}
    if (root / DESCRIPTION).is_file():
        found = json.loads((root / DESCRIPTION).read_text())
        if {key: found.get(key) for key in description} == description:
            return root
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"root={str(root)!r} exists and contains no {DESCRIPTION}; pass a new or empty folder.")
    root.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    unfinished = _temporary_folder(root, "unfinished", os.getpid())
    try:
        unfinished.mkdir()
        description |= build(unfinished)
        (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        if root.exists():
            # rename() cannot replace a folder that contains files, so the old one is moved away first.
            old = _temporary_folder(root, "replaced", os.getpid())
            root.rename(old)
            shutil.rmtree(old)
        unfinished.rename(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records as JSON Lines and return their number."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, record in enumerate(records, 1):  # noqa: B007
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return count


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Write an RGB image as JPEG with quality 92 and without chroma subsampling."""
    # Encoding in memory and writing at once is much faster than PIL's own writing to a file.
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=92, subsampling=0)
    path.write_bytes(encoded.getbuffer())


def cache_folder(name: str) -> Path:
    """Return the folder ``name`` of the download cache, ``$IDAVLM_CACHE`` or ``~/.cache/idavlm``."""
    root = os.environ.get("IDAVLM_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "idavlm") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _temporary_folder(root: Path, state: str, process: int) -> Path:
    return root.parent / f".{root.name}.{state}-{process}"


def _remove_leftovers(root: Path) -> None:
    """Remove temporary folders of ``root`` that belong to processes that no longer run."""
    for state in ("unfinished", "replaced"):
        for folder in root.parent.glob(f".{root.name}.{state}-*"):
            process = folder.name.rpartition("-")[2]
            if process.isdigit() and not _is_running(int(process)):
                shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
