"""Registers, spills and shared memory of the attention kernels, compiled ahead of time. No GPU is needed.

    python -m benchmarks.kernel_resources
    python -m benchmarks.kernel_resources --every-option

It compiles every kernel with every guessed tile (``idavlm/ops/cross_attention/triton/tiling.py``) and all options on:
ragged segments, key bias, sums over groups. ``--every-option`` adds other combinations of options, and float16. The
figures are those of ptxas, read from the binary with cuobjdump.
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
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from idavlm.ops.cross_attention.triton.bwd import bwd_dkdv, bwd_dq, bwd_dq_shared
from idavlm.ops.cross_attention.triton.device_functions import Args, KernelOptions, Rows
from idavlm.ops.cross_attention.triton.fwd import fwd
from idavlm.ops.cross_attention.triton.tiling import Tile, compiler_options, guessed_tiling
from idavlm.ops.cross_attention.triton_backend import GROUPS_PER_PASS
from idavlm.utils import markdown_table

KERNELS = {"fwd": fwd, "bwd_dkdv": bwd_dkdv, "bwd_dq": bwd_dq, "bwd_dq_shared": bwd_dq_shared}
CAPABILITIES = (80, 90, 100)
WIDTHS = (32, 64, 128, 256)


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


def cases(every_option: bool) -> list[Case]:
    """The kernels to compile, see the flag of the same name."""
    option_sets = [(True, GROUPS_PER_PASS, True)]
    if every_option:
        option_sets += [(False, 0, False), (True, 0, False), (True, 16, False)]
    dtypes = ["fp32", "bf16", "fp16"] if every_option else ["fp32", "bf16"]
    selected = []
    for capability, head_dim, dtype, kernel in product(CAPABILITIES, WIDTHS, dtypes, KERNELS):
        if dtype == "fp32" and head_dim < 128 and not every_option:
            continue  # the tile of width 128, which needs more resources there
        tiling = guessed_tiling(divmod(capability, 10), 4 if dtype == "fp32" else 2, head_dim)
        for ragged, groups, bias in option_sets:
            # Without fuse_dq, bwd_dkdv needs fewer resources. Deterministic algorithms run it so.
            fuse_dq = kernel == "bwd_dkdv" and tiling.fuse_dq
            shared = kernel == "bwd_dq_shared"
            # The resampler has shared queries and reads no sums of weights.
            num_groups = 0 if shared and not every_option else groups
            tile = getattr(tiling, kernel)
            selected.append(Case(kernel, capability, head_dim, dtype, tile, fuse_dq, shared, ragged, num_groups, bias))
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
        FUSE_DQ=case.fuse_dq,
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
    )
    args = argument_types(case)
    compiled = triton.compile(
        ASTSource(
            kernel,
            {"args": args, "OPTIONS": "constexpr"},
            {(1,): options},
            {path: [["tt.divisibility", 16]] for path in aligned(args, (0,))},
        ),
        target=GPUTarget("cuda", case.capability, 32),
        options=compiler_options(tile, 4 if case.dtype == "fp32" else 2),
    )
    registers, stack = _usage(compiled.asm["cubin"])
    instructions = (name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in compiled.asm["ptx"])
    return Resources(registers, stack, compiled.metadata.shared, next(instructions, "fma"))


def argument_types(case: Case) -> Args:
    """Triton's types of the arguments of all kernels."""
    pointer, integers = f"*{case.dtype}", "*i32"
    types = dict.fromkeys(Args._fields, "i32") | {"scale": "fp32"}
    types |= dict.fromkeys(("q", "k", "v"), Rows(pointer, "i32", "i32"))
    types |= dict.fromkeys(("key_bias", "out", "grad_out", "grad_q", "grad_k", "grad_v"), pointer)
    types |= dict.fromkeys(("key_groups", "cu_seqlens_q", "cu_seqlens_k"), integers)
    types |= dict.fromkeys(("sums", "lse", "grad_sums", "delta"), "*fp32")
    if case.shared or case.fuse_dq:
        types["grad_q"] = "*fp32"
    return Args(**types)


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
    return markdown_table(
        ["", *KERNELS], [[label, *(cells.get(kernel, "") for kernel in KERNELS)] for label, cells in rows.items()]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--every-option", action="store_true", help="also compile other combinations of options, and float16"
    )
    parser.add_argument("--only", default="", help="only cases whose description contains this, e.g. 'capability=90'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set, but this program compiles kernels; unset it.")
    todo = [case for case in cases(args.every_option) if args.only in str(case)]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        results = dict(zip(todo, pool.map(compile_case, todo), strict=True))
    print(f"triton {triton.__version__}; {len(todo)} kernels. Cells: queries x keys of the tile, warps, stages:")
    print("registers per thread, bytes spilled, KB of shared memory, matrix instruction\n")
    print(table(results, args.every_option))
    if args.json:
        args.json.write_text(json.dumps([asdict(case) | asdict(result) for case, result in results.items()]))


if __name__ == "__main__":
    main()
