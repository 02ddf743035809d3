"""The game's data: Debian's package, fetched by the user's own apt into the cache, and unpacked there."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from idavlm.datasets.download_cache import cache_folder

PACKAGE = "wesnoth-1.16-data"
_BY_HAND = (
    f"Fetch the package by hand where apt works (`apt-get download {PACKAGE}`) and give its path, or that of an "
    "unpacked folder, as package=."
)


def find_data(package: str | Path | None = None) -> Path:
    """The game's data folder, the one with ``core/`` in it; fetched and unpacked if need be.

    Args:
        package: a ``.deb`` file of :data:`PACKAGE`, or a folder that holds the unpacked data at any depth; None for
            the cache (``~/.cache/idavlm`` or ``$IDAVLM_CACHE``), filled with ``apt-get download`` when it is empty.

    Raises:
        FileNotFoundError: no such file, or no data in it.
        RuntimeError: a program is missing or failed; the message says what to do by hand.
    """
    if package is not None and Path(package).is_dir():
        return _data_below(Path(package))
    unpacked = cache_folder("wesnoth") / "unpacked"
    if package is None and unpacked.is_dir():
        return _data_below(unpacked)
    if package is not None and not Path(package).is_file():
        raise FileNotFoundError(f"package={str(package)!r} does not exist; give a .deb file or an unpacked folder.")
    deb = Path(package) if package is not None else _download()
    if package is not None:
        # Another version of the package does not pass for this one.
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
    """Into a folder beside, renamed at the end: a killed run leaves nothing half done."""
    with tempfile.TemporaryDirectory(dir=unpacked.parent) as folder:
        _run(["dpkg-deb", "-x", str(deb.resolve()), folder], Path(folder))
        data = _data_below(Path(folder))
        # Fonts, translations and interface pictures are not needed; what is kept has its licence beside it.
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
    raise FileNotFoundError(f"no data of Wesnoth (a folder core/units) in {folder}; is it the package {PACKAGE}?")


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]!r} is not installed, so Wesnoth's pictures cannot be fetched. {_BY_HAND}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()} {_BY_HAND}")
