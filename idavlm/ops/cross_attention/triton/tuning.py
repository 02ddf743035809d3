"""Tiles that were measured on this machine: a small file that outlives the process.

It is ``$IDAVLM_TUNING_CACHE``, or ``idavlm/attention_tiles.json`` in ``$XDG_CACHE_HOME`` (``~/.cache``), and is written
by ``python -m benchmarks.tune_attention`` alone: nothing is measured behind a user's back. Entries belong to a GPU and
a version of Triton.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton


class Tile(NamedTuple):
    """Rows of queries and of keys a step works on, warps of a program, and loads in flight.

    ``tma``: read and written by tensor descriptors, in a fixed number of programs (capability 9.0 and later).
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False


class Tiling(NamedTuple):
    """Tiles of the kernels (``shared``: of queries that all segments share), and how the queries' gradient is made.

    ``joined``: with the keys', see ``backward_keys.py``. ``values``: of a pass of that kernel for the values alone;
    without, ``keys`` makes their gradient too. ``specialised``: of the forward kernel where it can have warps that only
    load (``launch.py``); without, ``forward`` serves there too.
    """

    forward: Tile
    keys: Tile
    queries: Tile
    shared: Tile
    joined: bool = True
    values: Tile | None = None
    specialised: Tile | None = None


KERNELS = ("forward", "keys", "queries", "shared")
NOT_ALWAYS = ("values", "specialised")


def tuning_file() -> Path:
    given = os.environ.get("IDAVLM_TUNING_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "idavlm" / "attention_tiles.json"


@cache
def measured_tilings(device_name: str) -> dict[tuple[int, int], Tiling]:
    """By bytes of an element and padded width of a head; read once a process.

    Raises:
        ValueError: the file is not what :func:`save_tiling` writes.
    """
    path = tuning_file()
    try:
        entries = _read(path).get(_machine(device_name), {})
        return {tuple(map(int, key.split())): _parse(entry) for key, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no tiles that can be read ({error!r}); delete it.") from error


def save_tiling(device_name: str, itemsize: int, width: int, tiling: Tiling) -> None:
    """Add an entry, or replace it."""
    path = tuning_file()
    content = _read(path)
    content.setdefault(_machine(device_name), {})[f"{itemsize} {width}"] = tiling._asdict()
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_text(json.dumps(content, indent=1))
    whole.replace(path)
    measured_tilings.cache_clear()


def _machine(device_name: str) -> str:
    return f"{device_name}, triton {triton.__version__}"


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _parse(entry: dict) -> Tiling:
    tiles = {name: _parse_tile(entry[name]) for name in KERNELS}
    tiles |= {name: _parse_tile(entry[name]) for name in NOT_ALWAYS if entry.get(name)}
    return Tiling(**tiles, joined=bool(entry["joined"]))


def _parse_tile(fields: list) -> Tile:
    return Tile(*map(int, fields[:4]), *map(bool, fields[4:]))
