"""Tile sizes of the kernels: defaults for each GPU architecture, and tiles measured on this machine.

Measured tiles are kept in a JSON file: ``$IDAVLM_TUNING_CACHE``, else ``idavlm/attention_tiles.json`` in
``$XDG_CACHE_HOME`` (default ``~/.cache``). Only ``python -m benchmarks.tune_attention`` writes it; nothing is measured
during training or inference. Entries belong to a GPU model and a version of Triton.
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
    """Queries and keys of one step, warps of a program, and software-pipeline stages.

    ``tma``: read and written through tensor descriptors by a persistent kernel (capability 9.0 and later).
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False


class Tiling(NamedTuple):
    """The tile of each kernel, and how the gradient of the queries is computed.

    Attributes:
        fwd: forward kernel (``fwd.py``).
        bwd_dkdv: gradients of keys and values (``bwd_dkdv.py``).
        bwd_dq: gradient of queries (``bwd_dq.py``).
        bwd_dq_shared: the same kernel for queries that all segments share.
        fuse_dq: ``bwd_dkdv`` also accumulates the gradient of the queries, with atomic additions; no ``bwd_dq``.
        bwd_dv: a separate pass of ``bwd_dkdv`` for the values; None: the first pass computes both gradients.
        fwd_warp_specialized: forward kernel with load-only warps, where Triton can compile it; None: ``fwd``.
    """

    fwd: Tile
    bwd_dkdv: Tile
    bwd_dq: Tile
    bwd_dq_shared: Tile
    fuse_dq: bool = True
    bwd_dv: Tile | None = None
    fwd_warp_specialized: Tile | None = None


KERNELS = ("fwd", "bwd_dkdv", "bwd_dq", "bwd_dq_shared")
OPTIONAL_KERNELS = ("bwd_dv", "fwd_warp_specialized")


INTERPRETER_TILING = Tiling(Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(16, 32, 1, 1))
"""Tiles for Triton's interpreter, small enough that the tensors of tests span several of them."""

_FLOAT32_TILE = Tile(16, 16, 8, 1)
_FLOAT32_WIDE_TILE = Tile(16, 16, 16, 1)
_FLOAT32 = {width: Tiling(_FLOAT32_TILE, _FLOAT32_TILE, _FLOAT32_TILE, _FLOAT32_TILE) for width in (32, 64, 128)}
_FLOAT32[256] = Tiling(_FLOAT32_WIDE_TILE, _FLOAT32_WIDE_TILE, _FLOAT32_TILE, _FLOAT32_TILE)
"""GPUs have no matrix instruction for exact float32 products. float32 serves for checks; these tiles fit every GPU."""

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
            fuse_dq=False, bwd_dv=Tile(64, 64, 8, 2),
        ),
    },
    100: {
        32: Tiling(Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        64: Tiling(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(64, 64, 8, 1), Tile(64, 32, 8, 2)),
        128: Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: Tiling(Tile(64, 64, 8, 2), Tile(16, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
}  # fmt: skip
"""The largest tiles that spill no registers with any combination of options (``python -m benchmarks.kernel_resources
--every-option``). They were not chosen by measurement."""

DEFAULT_TILINGS: dict[tuple[int, int, int], Tiling] = {
    (capability, itemsize, width): tiling
    for capability, sixteen_bits in _SIXTEEN_BITS.items()
    for itemsize, tilings in ((2, sixteen_bits), (4, _FLOAT32))
    for width, tiling in tilings.items()
}
"""Tiles read through pointers, by capability, bytes per element and padded head dimension."""

_TMA_128 = Tile(128, 64, 8, 2, tma=True)
_TMA_64 = Tile(64, 32, 8, 2, tma=True)

TMA_TILINGS: dict[tuple[int, int], Tiling] = {
    (90, 32): Tiling(
        Tile(128, 128, 8, 3, tma=True), Tile(64, 128, 8, 2, tma=True), _TMA_128, _TMA_128,
        fwd_warp_specialized=Tile(128, 128, 4, 2, tma=True),
    ),
    (90, 64): Tiling(
        Tile(128, 128, 8, 2, tma=True), Tile(64, 128, 8, 2, tma=True), _TMA_128, _TMA_128,
        fwd_warp_specialized=Tile(128, 128, 4, 2, tma=True),
    ),
    (90, 128): Tiling(
        _TMA_128, Tile(64, 64, 8, 2, tma=True), _TMA_128, Tile(128, 64, 8, 1, tma=True),
        fwd_warp_specialized=Tile(128, 128, 4, 2, tma=True),
    ),
    (90, 256): Tiling(
        Tile(64, 64, 8, 2, tma=True), Tile(32, 64, 8, 2, tma=True), _TMA_64, Tile(64, 16, 8, 2, tma=True),
        fuse_dq=False, bwd_dv=Tile(64, 64, 8, 2, tma=True),
    ),
    (100, 32): Tiling(
        Tile(128, 64, 8, 2, tma=True), Tile(64, 128, 8, 2, tma=True), _TMA_128, _TMA_128,
        fwd_warp_specialized=Tile(128, 128, 8, 2, tma=True),
    ),
    (100, 64): Tiling(
        Tile(64, 128, 8, 2, tma=True), Tile(64, 64, 8, 2, tma=True), _TMA_128, _TMA_128,
        fwd_warp_specialized=Tile(128, 128, 8, 2, tma=True),
    ),
    (100, 128): Tiling(
        _TMA_128, Tile(64, 64, 8, 2, tma=True), _TMA_128, _TMA_128, fwd_warp_specialized=Tile(128, 128, 8, 2, tma=True)
    ),
    (100, 256): Tiling(
        _TMA_64, Tile(16, 64, 8, 2, tma=True), Tile(64, 32, 8, 1, tma=True), _TMA_64,
        fwd_warp_specialized=Tile(64, 64, 8, 2, tma=True),
    ),
}  # fmt: skip
"""Tiles read through tensor descriptors, by capability and padded head dimension, for 16-bit elements.

They are used only where the tuner has measured them to be faster."""


def compiler_options(tile: Tile, itemsize: int) -> dict[str, int]:
    """Options that Triton compiles a kernel with.

    float32 kernels request all available registers. By default ptxas uses fewer to fit one more program per
    multiprocessor, and spills a few bytes.
    """
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if itemsize == 4:
        options["maxnreg"] = min(255, 65536 // (32 * tile.num_warps))
    return options


def tiling_for(*tensors: Tensor) -> Tiling:
    """The tiling measured on this GPU, else the default one. ``tensors`` are those that the kernel reads, ``q`` first.

    Tiles with ``tma`` are replaced by default tiles where a tensor does not fit a tensor descriptor. ``bwd_dkdv``,
    ``bwd_dv`` and ``fuse_dq`` are replaced together.
    """
    q = tensors[0]
    width = max(32, triton.next_power_of_2(q.shape[-1]))
    if INTERPRETED:
        device_name, default = "interpreter", INTERPRETER_TILING
    else:
        device_name = torch.cuda.get_device_name(q.device)
        default = default_tiling(torch.cuda.get_device_capability(q.device), q.element_size(), width)
    tiling = measured_tilings(device_name).get((q.element_size(), width), default)
    if all(map(fits_descriptor, tensors)):
        return tiling
    replaced = {name: getattr(default, name) for name in KERNELS if getattr(tiling, name).tma}
    if tiling.bwd_dkdv.tma or (tiling.bwd_dv and tiling.bwd_dv.tma):
        replaced |= {"bwd_dkdv": default.bwd_dkdv, "bwd_dv": default.bwd_dv, "fuse_dq": default.fuse_dq}
    return tiling._replace(**replaced, fwd_warp_specialized=None)


def fits_descriptor(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe ``[T, H, D]``: its address and strides are multiples of 16 bytes."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(step > 0 and step % 16 == 0 for step in steps)


def default_tiling(capability: tuple[int, int], itemsize: int, width: int) -> Tiling:
    """The entry of :data:`DEFAULT_TILINGS` with the highest capability that is not above ``capability``.

    Raises:
        ValueError: ``capability`` is below 8.0.
    """
    architecture = _architecture(capability)
    if architecture is None:
        raise ValueError(
            f"attn_implementation='triton' does not support GPUs of capability {capability[0]}.{capability[1]}; it "
            "needs 8.0 or later. Use attn_implementation='sdpa'."
        )
    return DEFAULT_TILINGS[architecture, itemsize, width]


def default_tma_tiling(capability: tuple[int, int], width: int) -> Tiling | None:
    """The entry of :data:`TMA_TILINGS`, selected in the same way; None for capabilities below 9.0."""
    return TMA_TILINGS.get((_architecture(capability), width))


def _architecture(capability: tuple[int, int]) -> int | None:
    number = 10 * capability[0] + capability[1]
    return max((architecture for architecture in _SIXTEEN_BITS if architecture <= number), default=None)


def tuning_file() -> Path:
    """Path of the file of measured tiles."""
    from_environment = os.environ.get("IDAVLM_TUNING_CACHE")
    if from_environment:
        return Path(from_environment)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "idavlm" / "attention_tiles.json"


@cache
def measured_tilings(device_name: str) -> dict[tuple[int, int], Tiling]:
    """Measured tilings by bytes per element and padded head dimension; the file is read once per process.

    Raises:
        ValueError: the file does not have the format that :func:`save_tiling` writes.
    """
    path = tuning_file()
    try:
        entries = _read(path).get(_machine(device_name), {})
        return {tuple(map(int, key.split())): _parse(entry) for key, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a file of tiles ({error!r}); delete it, and run python -m "
            "benchmarks.tune_attention to measure tiles again."
        ) from error


def save_tiling(device_name: str, itemsize: int, width: int, tiling: Tiling) -> None:
    """Add an entry to the file, or replace it."""
    path = tuning_file()
    content = _read(path)
    content.setdefault(_machine(device_name), {})[f"{itemsize} {width}"] = tiling._asdict()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
    measured_tilings.cache_clear()


def _machine(device_name: str) -> str:
    return f"{device_name}, triton {triton.__version__}"


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _parse(entry: dict) -> Tiling:
    fields = {name: entry[name] for name in KERNELS}
    fields |= {name: entry[name] for name in OPTIONAL_KERNELS if entry.get(name)}
    tiles = {name: Tile(*map(int, values[:4]), *map(bool, values[4:])) for name, values in fields.items()}
    return Tiling(**tiles, fuse_dq=bool(entry["fuse_dq"]))
