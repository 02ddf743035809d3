"""Which tiles a kernel works in: shipped ones by capability, head width and type, or those measured on this machine."""

import torch
import triton
from torch import Tensor

from idavlm.ops.cross_attention.triton.tiles import INTERPRETED
from idavlm.ops.cross_attention.triton.tuning import KERNELS, Tile, Tiling, measured_tilings

INTERPRETER = Tiling(Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(16, 32, 1, 1))
"""Small, so that small tensors have several of each."""

_EXACT = Tile(16, 16, 8, 1)
_WIDE = Tile(16, 16, 16, 1)
_FLOAT32 = {width: Tiling(_EXACT, _EXACT, _EXACT, _EXACT) for width in (32, 64, 128)}
_FLOAT32[256] = Tiling(_WIDE, _WIDE, _EXACT, _EXACT)
"""Exact products have no matrix instruction: float32 is for checks, and these tiles fit every GPU."""

_SIXTEEN_BITS = {
    80: {
        32: Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        64: Tiling(Tile(128, 64, 8, 3), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        128: Tiling(Tile(128, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        256: Tiling(Tile(64, 16, 8, 2), Tile(16, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2)),
    },
    90: {
        32: Tiling(Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        64: Tiling(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
        256: Tiling(
            Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 16, 8, 2),
            joined=False, values=Tile(64, 64, 8, 2),
        ),
    },
    100: {
        32: Tiling(Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        64: Tiling(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(64, 64, 8, 1), Tile(64, 32, 8, 2)),
        128: Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: Tiling(Tile(64, 64, 8, 2), Tile(16, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
}  # fmt: skip
"""Chosen as the largest that spill nothing, whatever is switched on (``python -m benchmarks.kernel_resources
--every-option``), not by measurement."""

SHIPPED: dict[tuple[int, int, int], Tiling] = {
    (capability, itemsize, width): tiling
    for capability, sixteen_bits in _SIXTEEN_BITS.items()
    for itemsize, tilings in ((2, sixteen_bits), (4, _FLOAT32))
    for width, tiling in tilings.items()
}
"""By capability, bytes of an element and padded width of a head. A GPU takes the highest capability below its own."""


_ROWS_128 = Tile(128, 64, 8, 2, tma=True)
_ROWS_64 = Tile(64, 32, 8, 2, tma=True)

DESCRIBED: dict[tuple[int, int], Tiling] = {
    (90, 32): Tiling(
        Tile(128, 128, 8, 3, tma=True), Tile(64, 128, 8, 2, tma=True), _ROWS_128, _ROWS_128,
        specialised=Tile(128, 128, 4, 2, tma=True),
    ),
    (90, 64): Tiling(
        Tile(128, 128, 8, 2, tma=True), Tile(64, 128, 8, 2, tma=True), _ROWS_128, _ROWS_128,
        specialised=Tile(128, 128, 4, 2, tma=True),
    ),
    (90, 128): Tiling(
        _ROWS_128, Tile(64, 64, 8, 2, tma=True), _ROWS_128, Tile(128, 64, 8, 1, tma=True),
        specialised=Tile(128, 128, 4, 2, tma=True),
    ),
    (90, 256): Tiling(
        Tile(64, 64, 8, 2, tma=True), Tile(32, 64, 8, 2, tma=True), _ROWS_64, Tile(64, 16, 8, 2, tma=True),
        joined=False, values=Tile(64, 64, 8, 2, tma=True),
    ),
    (100, 32): Tiling(
        Tile(128, 64, 8, 2, tma=True), Tile(64, 128, 8, 2, tma=True), _ROWS_128, _ROWS_128,
        specialised=Tile(128, 128, 8, 2, tma=True),
    ),
    (100, 64): Tiling(
        Tile(64, 128, 8, 2, tma=True), Tile(64, 64, 8, 2, tma=True), _ROWS_128, _ROWS_128,
        specialised=Tile(128, 128, 8, 2, tma=True),
    ),
    (100, 128): Tiling(
        _ROWS_128, Tile(64, 64, 8, 2, tma=True), _ROWS_128, _ROWS_128, specialised=Tile(128, 128, 8, 2, tma=True)
    ),
    (100, 256): Tiling(
        _ROWS_64, Tile(16, 64, 8, 2, tma=True), Tile(64, 32, 8, 1, tma=True), _ROWS_64,
        specialised=Tile(64, 64, 8, 2, tma=True),
    ),
}  # fmt: skip
"""By capability and padded width, in 16 bits: read by tensor descriptors. Used where the tuner finds them faster."""


def compiler_options(tile: Tile, itemsize: int) -> dict[str, int]:
    """What Triton compiles a tile with.

    float32 asks for all registers there are: left alone, ptxas spills a few bytes to fit one more program beside.
    """
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if itemsize == 4:
        options["maxnreg"] = min(255, 65536 // (32 * tile.num_warps))
    return options


def tiling_for(*tensors: Tensor) -> Tiling:
    """What was measured on this GPU (``tuning.py``), else what is shipped; ``tensors`` are what is read, ``q`` first.

    Where a descriptor cannot describe one of them, shipped tiles stand in for those with ``tma``: they read anything.
    How the gradients of keys and values share the work comes with their tiles.
    """
    q = tensors[0]
    width = max(32, triton.next_power_of_2(q.shape[-1]))
    if INTERPRETED:
        name, shipped = "interpreter", INTERPRETER
    else:
        name = torch.cuda.get_device_name(q.device)
        shipped = shipped_tiling(torch.cuda.get_device_capability(q.device), q.element_size(), width)
    chosen = measured_tilings(name).get((q.element_size(), width), shipped)
    if all(map(describable, tensors)):
        return chosen
    portable = {name: getattr(shipped, name) for name in KERNELS if getattr(chosen, name).tma}
    if chosen.keys.tma or (chosen.values and chosen.values.tma):
        portable |= {"keys": shipped.keys, "values": shipped.values, "joined": shipped.joined}
    return chosen._replace(**portable, specialised=None)


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe ``[T, H, D]``: 16 bytes divide its address and its strides."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(step > 0 and step % 16 == 0 for step in steps)


def shipped_tiling(capability: tuple[int, int], itemsize: int, width: int) -> Tiling:
    """The entry of the highest capability that is not above ``capability``."""
    shipped = _shipped_below(capability)
    if shipped is None:
        raise ValueError(
            f"attn_implementation='triton' knows no GPU of capability {capability[0]}.{capability[1]}; it takes 8.0 "
            "and later. Use attn_implementation='sdpa'."
        )
    return SHIPPED[shipped, itemsize, width]


def described_tiling(capability: tuple[int, int], width: int) -> Tiling | None:
    """The same with tensor descriptors; None before capability 9.0."""
    return DESCRIBED.get((_shipped_below(capability), width))


def _shipped_below(capability: tuple[int, int]) -> int | None:
    number = 10 * capability[0] + capability[1]
    return max((shipped for shipped in _SIXTEEN_BITS if shipped <= number), default=None)
