"""Which tiles a kernel works in: shipped ones by capability, head width and type, or those measured on this machine."""

import torch
import triton
from torch import Tensor

from idavlm.ops.cross_attention.triton.tiles import INTERPRETED
from idavlm.ops.cross_attention.triton.tuning import Tile, Tiling, measured_tilings

INTERPRETER = Tiling(Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(16, 32, 1, 1))
"""Small, so that small tensors have several of each."""

_EXACT = Tile(16, 16, 8, 1)
_WIDE = Tile(16, 16, 16, 1)
_FLOAT32 = {width: Tiling(_EXACT, _EXACT, _EXACT, _EXACT) for width in (32, 64, 128)}
_FLOAT32[256] = Tiling(_WIDE, _WIDE, _EXACT, _EXACT)
"""Exact products have no matrix instruction: float32 is for checks, and these tiles fit every GPU."""

_SIXTEEN_BITS = {
    80: {
        32: Tiling(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        64: Tiling(Tile(128, 64, 8, 3), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        128: Tiling(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        256: Tiling(Tile(64, 16, 8, 2), Tile(16, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    90: {
        32: Tiling(Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        64: Tiling(Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: Tiling(Tile(64, 64, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2), Tile(16, 32, 4, 2)),
    },
    100: {
        32: Tiling(Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        64: Tiling(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        128: Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: Tiling(Tile(64, 64, 8, 2), Tile(16, 64, 8, 2), Tile(64, 32, 8, 2), Tile(16, 32, 4, 2)),
    },
}
"""Chosen as the largest that spill nothing (``python -m benchmarks.kernel_resources``), not by measurement."""

SHIPPED: dict[tuple[int, int, int], Tiling] = {
    (capability, itemsize, width): tiling
    for capability, sixteen_bits in _SIXTEEN_BITS.items()
    for itemsize, tilings in ((2, sixteen_bits), (4, _FLOAT32))
    for width, tiling in tilings.items()
}
"""By capability, bytes of an element and padded width of a head. A GPU takes the highest capability below its own."""


def compiler_options(tile: Tile, itemsize: int) -> dict[str, int]:
    """What Triton compiles a tile with.

    float32 asks for all registers there are: left alone, ptxas spills a few bytes to fit one more program beside.
    """
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if itemsize == 4:
        options["maxnreg"] = min(255, 65536 // (32 * tile.num_warps))
    return options


def tiling_for(q: Tensor) -> Tiling:
    """What was measured on this GPU (``tuning.py``), else what is shipped."""
    if INTERPRETED:
        return INTERPRETER
    width = max(32, triton.next_power_of_2(q.shape[-1]))
    measured = measured_tilings(torch.cuda.get_device_name(q.device)).get((q.element_size(), width))
    return measured or shipped_tiling(torch.cuda.get_device_capability(q.device), q.element_size(), width)


def shipped_tiling(capability: tuple[int, int], itemsize: int, width: int) -> Tiling:
    """The entry of the highest capability that is not above ``capability``."""
    number = 10 * capability[0] + capability[1]
    known = [shipped for shipped in _SIXTEEN_BITS if shipped <= number]
    if not known:
        raise ValueError(
            f"attn_implementation='triton' knows no GPU of capability {capability[0]}.{capability[1]}; it takes 8.0 "
            "and later. Use attn_implementation='sdpa'."
        )
    return SHIPPED[max(known), itemsize, width]
