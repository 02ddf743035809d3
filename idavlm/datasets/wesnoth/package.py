"""Data of the game: Debian's package, downloaded with apt-get into the cache and unpacked there."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from idavlm.datasets.dataset_folder import cache_folder

PACKAGE = "wesnoth-1.16-data"
_BY_HAND = (
    f"Download the package by hand on a machine with apt (`apt-get download {PACKAGE}`) and pass its path, or the "
    "path of the unpacked folder, as package=."
)


def find_data(package: str | Path | None = None) -> Path:
    """Return the data folder of the game, which contains ``core/``. Download and unpack the package if necessary.

    Args:
        package: a ``.deb`` file of :data:`PACKAGE`, or a folder that contains the unpacked data at any depth; None for
            the cache (``$IDAVLM_CACHE`` or ``~/.cache/idavlm``), filled with ``apt-get download`` if it is empty.

    Raises:
        FileNotFoundError: ``package`` does not exist or contains no data of the game.
        RuntimeError: a program is missing or failed; the message describes the manual steps.
    """
    if package is not None and Path(package).is_dir():
        return _data_below(Path(package))
    unpacked = cache_folder("wesnoth") / "unpacked"
    if package is None and unpacked.is_dir():
        return _data_below(unpacked)
    if package is not None and not Path(package).is_file():
        raise FileNotFoundError(f"package={str(package)!r} does not exist; pass a .deb file or an unpacked folder.")
    deb = Path(package) if package is not None else _download()
    if package is not None:
        # Packages of other versions are unpacked into folders of their own.
        unpacked = cache_folder("wesnoth") / f"unpacked-{deb.stem}-{deb.stat().st_size}"
    if not unpacked.is_dir():
        _unpack(deb, unpacked)
    return _data_below(unpacked)


def _download() -> Path:
    folder = cache_folder("wesnoth")
    found = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if not found:
        _run(["apt-get", "download", PACKAGE], folder)
        found = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if not found:
        raise RuntimeError(f"`apt-get download {PACKAGE}` left no package in {folder}. {_BY_HAND}")
    return found[-1]


def _unpack(deb: Path, unpacked: Path) -> None:
    """Unpack into a temporary folder that is renamed at the end, so that an interrupted run leaves no partial data."""
    with tempfile.TemporaryDirectory(dir=unpacked.parent) as folder:
        _run(["dpkg-deb", "-x", str(deb.resolve()), folder], Path(folder))
        data = _data_below(Path(folder))
        # Keep the data folder and the licence; fonts, translations and interface images are not needed.
        target = Path(folder) / "kept"
        target.mkdir()
        data.rename(target / "data")
        for notice in Path(folder).glob("usr/share/doc/*/copyright"):
            shutil.copy(notice, target / "copyright")
        target.rename(unpacked)


def _data_below(folder: Path) -> Path:
    for path, folders, _ in os.walk(folder):
        if Path(path, "core", "units").is_dir():
            return Path(path)
        folders.sort()
    raise FileNotFoundError(f"no data of Wesnoth (a folder core/units) in {folder}; pass the package {PACKAGE}.")


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise RuntimeError(
            f"{command[0]!r} is not installed, so the images of Wesnoth cannot be downloaded. {_BY_HAND}"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()} {_BY_HAND}")
