"""Data sets on disk: written whole or not at all, and only when their options have changed."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

DESCRIPTION = "dataset.json"


def build_once(
    root: str | Path, name: str, version: int, options: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]
) -> Path:
    """Build a data set unless ``root`` already holds it.

    ``build`` fills a folder beside ``root``, which takes the place of ``root`` when it is complete; a build that dies
    leaves ``root`` as it was, and what it left beside ``root`` goes with the next build.

    Args:
        root: folder of the data set; missing, empty, or holding a data set with ``dataset.json``.
        name: of the data set.
        version: to be raised whenever ``build`` makes something else of the same options.
        options: everything the content depends on; plain JSON values.
        build: fills the folder it is given and returns what ``dataset.json`` says beside name, version and options.

    Returns:
        ``root`` as a path.

    Raises:
        FileExistsError: ``root`` holds something that is no data set.
    """
    root = Path(root)
    description = {"name": name, "version": version, "options": dict(options)}
    if (root / DESCRIPTION).is_file():
        found = json.loads((root / DESCRIPTION).read_text())
        if {key: found.get(key) for key in description} == description:
            return root
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"root={str(root)!r} exists and holds no {DESCRIPTION}; give a new or empty folder.")
    root.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(root)
    unfinished = _beside(root, "unfinished", os.getpid())
    try:
        unfinished.mkdir()
        description |= build(unfinished)
        (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        if root.exists():
            # A folder cannot replace one that holds files: the old one steps aside first.
            old = _beside(root, "replaced", os.getpid())
            root.rename(old)
            shutil.rmtree(old)
        unfinished.rename(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records as JSON Lines and return how many they were."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for count, record in enumerate(records, 1):  # noqa: B007
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return count


def _beside(root: Path, state: str, process: int) -> Path:
    return root.parent / f".{root.name}.{state}-{process}"


def _clear_leftovers(root: Path) -> None:
    """Remove unfinished builds of ``root`` whose process is no more."""
    for state in ("unfinished", "replaced"):
        for folder in root.parent.glob(f".{root.name}.{state}-*"):
            process = folder.name.rpartition("-")[2]
            if process.isdigit() and not _alive(int(process)):
                shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
