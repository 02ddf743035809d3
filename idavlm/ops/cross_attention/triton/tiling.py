"""Tile sizes of the kernels: guesses for each GPU architecture, and tiles that were measured.

``$IDAVLM_ATTENTION_TILES`` names a file of measured tiles, which ``python -m benchmarks.gpu`` writes. Nothing is
measured during training or inference. Entries belong to a GPU model, a number of bytes per element and a head width.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from idavlm.ops.cross_attention.triton.device_functions import INTERPRETED


class Tile(NamedTuple):
    """Queries and keys of one step, warps of a program, and software-pipeline stages."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Tiling(NamedTuple):
    """The tile of each kernel. ``fuse_dq``: ``bwd_dkdv`` also computes the gradient of the queries, see ``bwd.py``."""

    fwd: Tile
    bwd_dkdv: Tile
    bwd_dq: Tile
    bwd_dq_shared: Tile
    fuse_dq: bool = True


KERNELS = ("fwd", "bwd_dkdv", "bwd_dq", "bwd_dq_shared")

INTERPRETER_TILING = Tiling(Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(16, 32, 1, 1))
"""Tiles for Triton's interpreter, small enough that the tensors of tests span several of them."""

GUESSES: dict[int, dict[int, Tiling]] = {
    80: {
        32: Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
        64: Tiling(Tile(128, 64, 8, 3), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)),
        128: Tiling(Tile(128, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        256: Tiling(Tile(64, 16, 8, 2), Tile(16, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
    },
    90: {
        32: Tiling(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        64: Tiling(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        128: Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        256: Tiling(Tile(64, 64, 8, 2), Tile(16, 32, 8, 2), Tile(64, 32, 8, 2), Tile(16, 32, 8, 2)),
    },
}
"""Tiles for 16-bit elements by capability and padded head width. They are guesses: the largest tiles tried that spill
no registers with any combination of options (``python -m benchmarks.kernel_resources``). None was measured."""

_FLOAT32_TILE = Tile(16, 16, 8, 1)
FLOAT32_TILING = Tiling(_FLOAT32_TILE, _FLOAT32_TILE, _FLOAT32_TILE, _FLOAT32_TILE)
FLOAT32_WIDE_TILING = FLOAT32_TILING._replace(fwd=Tile(16, 16, 16, 1), bwd_dkdv=Tile(16, 16, 16, 1))
"""GPUs have no matrix instruction for exact float32 products. float32 serves for checks; these tiles fit every GPU.
The wide tiling is for heads wider than 128."""


def compiler_options(tile: Tile, itemsize: int) -> dict[str, int]:
    """Options that Triton compiles a kernel with.

    float32 kernels request all available registers. By default ptxas uses fewer to fit one more program per
    multiprocessor, and spills a few bytes.
    """
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if itemsize == 4:
        options["maxnreg"] = min(255, 65536 // (32 * tile.num_warps))
    return options


def padded_width(head_dim: int) -> int:
    """Width of the tiles that heads of this width use, in the keys of the tables."""
    return max(32, triton.next_power_of_2(head_dim))


def tiling_for(q: Tensor) -> Tiling:
    """The tiling that was measured on this GPU, else the guess for its architecture."""
    if INTERPRETED:
        return INTERPRETER_TILING
    width = padded_width(q.shape[-1])
    measured = measured_tilings(os.environ.get("IDAVLM_ATTENTION_TILES"))
    key = torch.cuda.get_device_name(q.device), q.element_size(), width
    return measured.get(key) or guessed_tiling(torch.cuda.get_device_capability(q.device), q.element_size(), width)


def guessed_tiling(capability: tuple[int, int], itemsize: int, width: int) -> Tiling:
    """The entry of the highest capability that is not above ``capability``.

    Raises:
        ValueError: ``capability`` is below 8.0.
    """
    number = 10 * capability[0] + capability[1]
    architecture = max((known for known in GUESSES if known <= number), default=None)
    if architecture is None:
        raise ValueError(
            f"attn_implementation='triton' does not support GPUs of capability {capability[0]}.{capability[1]}; it "
            "needs 8.0 or later. Use attn_implementation='sdpa'."
        )
    if itemsize == 4:
        return FLOAT32_WIDE_TILING if width > 128 else FLOAT32_TILING
    return GUESSES[architecture][width]


@cache
def measured_tilings(path: str | None) -> dict[tuple[str, int, int], Tiling]:
    """Tilings of a file that :func:`save_tilings` wrote, by GPU model, bytes per element and padded head width.

    Raises:
        ValueError: the file does not have this format.
    """
    if path is None:
        return {}
    try:
        entries = json.loads(Path(path).read_text())
        return {(entry["gpu"], int(entry["itemsize"]), int(entry["width"])): _parse(entry) for entry in entries}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"IDAVLM_ATTENTION_TILES={path} cannot be read as a file of tiles ({error!r}); run python -m "
            "benchmarks.gpu to measure tiles, or unset the variable."
        ) from error


def save_tilings(path: Path, tilings: dict[tuple[str, int, int], Tiling]) -> None:
    """Write a file of measured tiles."""
    entries = [
        {"gpu": gpu, "itemsize": itemsize, "width": width, **tiling._asdict()}
        for (gpu, itemsize, width), tiling in tilings.items()
    ]
    path.write_text(json.dumps(entries, indent=1))


def _parse(entry: dict) -> Tiling:
    return Tiling(**{name: Tile(*map(int, entry[name])) for name in KERNELS}, fuse_dq=bool(entry["fuse_dq"]))
