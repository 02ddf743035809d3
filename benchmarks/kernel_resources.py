"""Registers, spills and shared memory of the attention kernels, compiled ahead of time for GPUs that are not here.

    python -m benchmarks.kernel_resources
    python -m benchmarks.kernel_resources --every-option

Every kernel, for every shipped tile (``idavlm/ops/cross_attention/triton/tiling.py``), with everything switched on:
ragged, key bias, sums over groups. "values" is the pass of the kernel "keys" for the values alone, where they have one,
"shared" the kernel "queries" for queries that all segments share, "specialised" the forward kernel with warps that only
load. ``--every-option`` adds other combinations and float16. The figures are ptxas's own, read from the binary with
cuobjdump; nothing runs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.measure import markdown_table
from idavlm.ops.cross_attention.fused import GROUPS_A_PASS
from idavlm.ops.cross_attention.triton import backward_keys, backward_queries, forward
from idavlm.ops.cross_attention.triton.tiling import DESCRIBED, SHIPPED, compiler_options
from idavlm.ops.cross_attention.triton.tuning import Tile

KERNELS = {
    "forward": forward.attend_forward,
    "keys": backward_keys.attend_backward_keys,
    "values": backward_keys.attend_backward_keys,
    "queries": backward_queries.attend_backward_queries,
    "shared": backward_queries.attend_backward_queries,
    "specialised": forward.attend_forward,
}
INTEGERS = {"key_groups", "cu_seqlens_q", "cu_seqlens_k"}
FLOATS = {"sums", "grad_sums", "lse", "delta"}
INPUTS = {"q", "k", "v", "key_bias", "out", "grad_out", "grad_k", "grad_v"}


@dataclass(frozen=True)
class Case:
    """One kernel to compile: for which GPU, width of a head, type of its inputs, tile, and what is switched on."""

    kernel: str
    capability: int
    head_dim: int
    dtype: str
    tile: Tile
    joined: bool
    split: bool
    shared: bool
    ragged: bool
    groups: int
    bias: bool


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor, and its matrix instruction."""

    registers: int
    stack: int
    shared_memory: int
    instruction: str
    tma: bool
    num_warps: int


def cases(every_option: bool, quick: bool) -> list[Case]:
    lighter = [(False, 0, False), (True, 0, False), (True, 16, False), (True, GROUPS_A_PASS, True)]
    described = {(capability, 2, width): tiling for (capability, width), tiling in DESCRIBED.items()}
    found = []
    for (capability, itemsize, head_dim), tiling in [*SHIPPED.items(), *described.items()]:
        if quick and head_dim < 128 and (itemsize == 4 or tiling.forward.tma):
            continue  # float32 has the tile of 128, and less of everything
        for dtype in ["fp32"] if itemsize == 4 else ["bf16", "fp16"] if every_option else ["bf16"]:
            for kernel in KERNELS:
                tile, shared = getattr(tiling, kernel), kernel == "shared"
                # Queries that segments share are a model's own, and read pictures: nobody sums their weights by group.
                options = [(True, 0 if shared else GROUPS_A_PASS, True), *(lighter if every_option else ())]
                if kernel == "specialised":
                    options = [(True, 0, False), *([(False, 0, False)] if every_option else ())]
                ways = tiling.joined, tiling.values is not None, shared
                for ragged, groups, bias in dict.fromkeys(options if tile else ()):
                    found.append(Case(kernel, capability, head_dim, dtype, tile, *ways, ragged, groups, bias))
    return found


def compile_case(case: Case) -> Resources:
    kernel, tile = KERNELS[case.kernel], case.tile
    values = {
        "RAGGED_Q": case.ragged and not case.shared,
        "RAGGED_K": case.ragged,
        "SHARED_Q": case.shared,
        "HAS_BIAS": case.bias,
        "GROUPS": case.groups,
        "HEAD_DIM": case.head_dim,
        "BLOCK_D": case.head_dim,
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "PRECISION": "ieee" if case.dtype == "fp32" else "tf32",
        "JOINED": case.joined,
        "KEYS": case.kernel == "keys",
        "VALUES": case.kernel == "values" or not case.split,
        "TMA": 2 if case.kernel == "specialised" else 4 if tile.tma else 0,
    }
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = _type_of(name, case)
        if signature[name] == "constexpr":
            constants[(position,)] = values[name]
        elif signature[name].startswith("*") or "stride" in name:
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", case.capability, 32),
        options=compiler_options(tile, 4 if case.dtype == "fp32" else 2),
    )
    registers, stack = _usage(compiled.asm["cubin"])
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    found = [name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx]
    tma = "cp.async.bulk.tensor" in ptx
    return Resources(registers, stack, metadata.shared, found[0] if found else "fma", tma, metadata.num_warps)


def _type_of(name: str, case: Case) -> str:
    if name.isupper():
        return "constexpr"
    if name in INTEGERS:
        return "*i32"
    if name in FLOATS or (name == "grad_q" and (case.shared or (case.kernel == "keys" and case.joined))):
        return "*fp32"
    if name in INPUTS or name == "grad_q":
        return f"*{case.dtype}"
    return "fp32" if name == "scale" else "i32"


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of its stack, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def table(results: dict[Case, Resources], every_option: bool) -> str:
    """One row a GPU, type and width (and combination of options), one column a kernel."""
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
    parser.add_argument("--every-option", action="store_true", help="other combinations and float16 as well")
    parser.add_argument(
        "--quick", action="store_true", help="leave out float32 and descriptors in heads narrower than 128"
    )
    parser.add_argument("--only", default="", help="cases whose description contains this, e.g. 'capability=90'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 interprets kernels, and this program compiles them; unset it.")
    todo = [case for case in cases(args.every_option, args.quick) if args.only in str(case)]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        results = dict(zip(todo, pool.map(compile_case, todo), strict=True))
    print(f"triton {triton.__version__}; {len(todo)} kernels. Cells: queries x keys of a tile, warps, stages:")
    print("registers a thread, bytes spilled, KB of shared memory, matrix instruction")
    for name, tma in (("pointers", False), ("tensor descriptors", True)):
        chosen = {case: result for case, result in results.items() if case.tile.tma == tma}
        if chosen:
            print(f"\nRead by {name}:\n\n{table(chosen, args.every_option)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(case) | asdict(result) for case, result in results.items()]))


if __name__ == "__main__":
    main()
