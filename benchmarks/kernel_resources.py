"""Registers, spills and shared memory of the attention kernels, compiled ahead of time. No GPU is needed.

    python -m benchmarks.kernel_resources
    python -m benchmarks.kernel_resources --every-option

It compiles every kernel with every default tile (``idavlm/ops/cross_attention/triton/tiling.py``) and all options on:
ragged segments, key bias, sums over groups. The columns are the fields of a ``Tiling``: ``bwd_dv`` is the pass of
``bwd_dkdv`` for the values alone, ``bwd_dq_shared`` is ``bwd_dq`` for shared queries, ``fwd_warp_specialized`` is
``fwd`` with load-only warps. ``--every-option`` adds other combinations of options, and float16. The figures are those
of ptxas, read from the binary with cuobjdump.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from idavlm.ops.cross_attention.triton.bwd_dkdv import bwd_dkdv
from idavlm.ops.cross_attention.triton.bwd_dq import bwd_dq
from idavlm.ops.cross_attention.triton.device_functions import BackwardInputs, Inputs, KernelOptions, Rows
from idavlm.ops.cross_attention.triton.fwd import fwd
from idavlm.ops.cross_attention.triton.tiling import DEFAULT_TILINGS, TMA_TILINGS, Tile, compiler_options
from idavlm.ops.cross_attention.triton_backend import GROUPS_PER_PASS
from idavlm.utils import markdown_table

KERNELS = {
    "fwd": fwd,
    "bwd_dkdv": bwd_dkdv,
    "bwd_dv": bwd_dkdv,
    "bwd_dq": bwd_dq,
    "bwd_dq_shared": bwd_dq,
    "fwd_warp_specialized": fwd,
}


@dataclass(frozen=True)
class Case:
    """One kernel to compile.

    Attributes:
        kernel: a key of ``KERNELS``.
        capability: of the GPU, times ten.
        head_dim: width of a head.
        dtype: of the inputs.
        tile: the tile to compile with.
        fuse_dq: ``bwd_dkdv`` also accumulates the gradient of the queries.
        separate_dv: the gradient of the values has a pass of its own.
        shared: all segments use the same queries.
        ragged: segments differ in length.
        groups: number of groups whose weights are summed.
        bias: with a key bias.
    """

    kernel: str
    capability: int
    head_dim: int
    dtype: str
    tile: Tile
    fuse_dq: bool
    separate_dv: bool
    shared: bool
    ragged: bool
    groups: int
    bias: bool


@dataclass(frozen=True)
class Resources:
    """The resources of a multiprocessor that a compiled kernel uses, and its matrix instruction."""

    registers: int
    stack: int
    shared_memory: int
    instruction: str
    tma: bool
    num_warps: int


def cases(every_option: bool, quick: bool) -> list[Case]:
    """The kernels to compile, see the flags of the same names."""
    fewer_options = [(False, 0, False), (True, 0, False), (True, 16, False), (True, GROUPS_PER_PASS, True)]
    tma_tilings = {(capability, 2, width): tiling for (capability, width), tiling in TMA_TILINGS.items()}
    selected = []
    for (capability, itemsize, head_dim), tiling in [*DEFAULT_TILINGS.items(), *tma_tilings.items()]:
        if quick and head_dim < 128 and (itemsize == 4 or tiling.fwd.tma):
            continue  # float32 uses the tile of head_dim 128 and needs fewer resources
        for dtype in ["fp32"] if itemsize == 4 else ["bf16", "fp16"] if every_option else ["bf16"]:
            for kernel in KERNELS:
                tile, shared = getattr(tiling, kernel), kernel == "bwd_dq_shared"
                # Shared queries are those of the resampler, whose weights are never summed over groups.
                options = [(True, 0 if shared else GROUPS_PER_PASS, True), *(fewer_options if every_option else ())]
                if kernel == "fwd_warp_specialized":
                    options = [(True, 0, False), *([(False, 0, False)] if every_option else ())]
                variant = tiling.fuse_dq, tiling.bwd_dv is not None, shared
                for ragged, groups, bias in dict.fromkeys(options if tile else ()):
                    selected.append(Case(kernel, capability, head_dim, dtype, tile, *variant, ragged, groups, bias))
    return selected


def compile_case(case: Case) -> Resources:
    kernel, tile = KERNELS[case.kernel], case.tile
    options = KernelOptions(
        RAGGED_Q=case.ragged and not case.shared,
        RAGGED_K=case.ragged,
        SHARED_Q=case.shared,
        HAS_BIAS=case.bias,
        GROUPS=case.groups,
        HEAD_DIM=case.head_dim,
        BLOCK_D=case.head_dim,
        PRECISION="ieee" if case.dtype == "fp32" else "tf32",
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        TMA=2 if case.kernel == "fwd_warp_specialized" else 4 if tile.tma else 0,
        FUSE_DQ=case.fuse_dq,
        COMPUTE_DK=case.kernel == "bwd_dkdv",
        COMPUTE_DV=case.kernel == "bwd_dv" or not case.separate_dv,
    )
    types = argument_types(case)
    signature = {name: types[name] for name in kernel.arg_names}
    constants = {(kernel.arg_names.index("OPTIONS"),): options}
    attributes = {
        path: [["tt.divisibility", 16]]
        for position, name in enumerate(signature)
        for path in aligned(types[name], (position,))
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", case.capability, 32),
        options=compiler_options(tile, 4 if case.dtype == "fp32" else 2),
    )
    registers, stack = _usage(compiled.asm["cubin"])
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    instruction = next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "fma")
    tma = "cp.async.bulk.tensor" in ptx
    return Resources(registers, stack, metadata.shared, instruction, tma, metadata.num_warps)


def argument_types(case: Case) -> dict[str, object]:
    """Triton's types of the arguments of all kernels, by name."""
    pointer, integers = f"*{case.dtype}", "*i32"
    rows = Rows(pointer, "i32", "i32")
    scalars = dict.fromkeys(set(Inputs._fields) - {"q", "k", "v"}, "i32")
    arrays = {"key_bias": pointer, "key_groups": integers, "cu_seqlens_q": integers, "cu_seqlens_k": integers}
    inputs = Inputs(**scalars | {"q": rows, "k": rows, "v": rows, "scale": "fp32"} | arrays)
    grad_q = "*fp32" if case.shared or (case.kernel == "bwd_dkdv" and case.fuse_dq) else pointer
    backward = BackwardInputs(pointer, "*fp32", "*fp32", "*fp32")
    outputs = {"out": pointer, "sums": "*fp32", "lse": "*fp32", "grad_q": grad_q, "grad_k": pointer, "grad_v": pointer}
    return {"inputs": inputs, "backward": backward, "OPTIONS": "constexpr", **outputs}


def aligned(types: object, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Positions of all pointers and strides in nested ``types``; they are multiples of 16."""
    if isinstance(types, str):
        if types.startswith("*"):
            yield path
        return
    for position, name in enumerate(types._fields):
        if "stride" in name:
            yield (*path, position)
        yield from aligned(getattr(types, name), (*path, position))


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of its stack, to which registers are spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(usage[1]), int(usage[2])


def table(results: dict[Case, Resources], every_option: bool) -> str:
    """One row per GPU, dtype and head_dim (and combination of options), one column per kernel."""
    rows: dict[str, dict[str, str]] = {}
    for case, result in results.items():
        label = f"sm_{case.capability} {case.dtype} {case.head_dim}"
        if every_option:
            options = [name for name in ("ragged", "bias") if getattr(case, name)]
            label = " ".join([label, *options, *([f"{case.groups} groups"] if case.groups else [])])
        tile, memory = case.tile, result.shared_memory / 1024
        rows.setdefault(label, {})[case.kernel] = (
            f"{tile.block_q} x {tile.block_k}, {tile.num_warps}, {tile.num_stages}: "
            f"{result.registers}, {result.stack}, {memory:.0f}, {result.instruction}"
        )
    kernels = [kernel for kernel in KERNELS if any(kernel in cells for cells in rows.values())]
    return markdown_table(
        ["", *kernels], [[label, *(cells.get(kernel, "") for kernel in kernels)] for label, cells in rows.items()]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--every-option", action="store_true", help="also compile other combinations of options, and float16"
    )
    parser.add_argument(
        "--quick", action="store_true", help="skip float32 and tensor descriptors for head_dim below 128"
    )
    parser.add_argument("--only", default="", help="only cases whose description contains this, e.g. 'capability=90'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set, but this program compiles kernels; unset it.")
    todo = [case for case in cases(args.every_option, args.quick) if args.only in str(case)]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        results = dict(zip(todo, pool.map(compile_case, todo), strict=True))
    print(f"triton {triton.__version__}; {len(todo)} kernels. Cells: queries x keys of the tile, warps, stages:")
    print("registers per thread, bytes spilled, KB of shared memory, matrix instruction")
    for name, tma in (("pointers", False), ("tensor descriptors", True)):
        selected = {case: result for case, result in results.items() if case.tile.tma == tma}
        if selected:
            print(f"\nTiles read through {name}:\n\n{table(selected, args.every_option)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(case) | asdict(result) for case, result in results.items()]))


if __name__ == "__main__":
    main()
