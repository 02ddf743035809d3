"""Measure tiles of the attention kernels on this GPU and store the fastest ones for later processes.

    python -m benchmarks.tune_attention --head-dim 128 --dtype bfloat16

The tiles of one kernel after the other are varied. Each is first checked against the float32 reference. With 16-bit
inputs and capability 9.0 or later every tile is measured twice, read through pointers and through tensor descriptors.
``idavlm/ops/cross_attention/triton/tiling.py`` describes the file that the result is written to.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product
from unittest.mock import patch

import torch
import triton

from benchmarks.attention_backends import Problem
from benchmarks.attention_backends import triton as triton_backend
from benchmarks.cross_attention import CASES, make_problem, reference
from benchmarks.measure import argument_parser, time_side_by_side, tolerance
from idavlm.ops.cross_attention.triton import operator
from idavlm.ops.cross_attention.triton.tiling import (
    KERNELS,
    Tile,
    Tiling,
    default_tiling,
    default_tma_tiling,
    save_tiling,
    tuning_file,
)
from idavlm.utils import describe_machine

BLOCKS_Q, BLOCKS_K, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)


def candidates(tiling: Tiling, tma_tiling: Tiling | None) -> Iterator[tuple[str, list[Tiling]]]:
    """For each field of a tiling its name, and ``tiling`` with all values to try for this field.

    Args:
        tiling: the best tiling found so far.
        tma_tiling: the default tiling with tensor descriptors; None if the GPU does not support them.
    """
    tma_values = (False, True) if tma_tiling else (False,)
    tiles = [Tile(*sizes, tma) for *sizes, tma in product(BLOCKS_Q, BLOCKS_K, WARPS, STAGES, tma_values)]
    for kernel in KERNELS:
        first = [getattr(tiling, kernel), *([getattr(tma_tiling, kernel)] if tma_tiling else [])]
        yield kernel, [tiling._replace(**{kernel: tile}) for tile in (*first, *tiles)]
    yield "bwd_dv", [tiling._replace(bwd_dv=tile) for tile in (None, tiling.bwd_dkdv, *tiles)]
    yield "fuse_dq", [tiling._replace(fuse_dq=fuse_dq) for fuse_dq in (True, False)]
    if tma_tiling and tma_tiling.fwd_warp_specialized:
        # The number of warps is that of the default. With others Triton does not specialise them, or fails to compile.
        default = tma_tiling.fwd_warp_specialized
        tiles = [tile for tile in tiles if tile.tma and tile.num_warps == default.num_warps and tile.block_q >= 64]
        yield "fwd_warp_specialized", [tiling._replace(fwd_warp_specialized=tile) for tile in (None, default, *tiles)]


def tune(start: Tiling, tma_tiling: Tiling | None, time_of: Callable[[str, Tiling], float | None]) -> Tiling:
    """The fastest tiling, found field by field.

    Args:
        start: tiling to start from.
        tma_tiling: as in :func:`candidates`.
        time_of: takes the name of the varied field and a tiling; returns its time, or None if it does not run.
    """
    best = start
    for number in range(len(list(candidates(start, tma_tiling)))):
        field, tilings = list(candidates(best, tma_tiling))[number]
        timed = [(time_of(field, tiling), tiling) for tiling in tilings]
        running = [(time, tiling) for time, tiling in timed if time is not None]
        if running:
            best = min(running, key=lambda pair: pair[0])[1]
    return best


def timer(problems: dict[str, Problem], rounds: int) -> Callable[[str, Tiling], float | None]:
    """The function ``time_of`` of :func:`tune` for these problems."""
    expected = {}
    for case, problem in problems.items():
        out = reference(problem)
        expected[case] = out.detach(), torch.autograd.grad(out.sum(), (problem.q, problem.k, problem.v))

    def time_of(field: str, tiling: Tiling) -> float | None:
        """Milliseconds of the problems that use this field of the tiling, or None."""
        if field in ("bwd_dq", "bwd_dq_shared"):
            tiling = tiling._replace(fuse_dq=False)
        cases = list(problems)
        if field in ("bwd_dq", "bwd_dq_shared"):
            cases = [case for case in cases if problems[case].shared == (field == "bwd_dq_shared")]
        try:
            with patch.object(operator, "tiling_for", lambda *tensors: tiling):
                return sum(_time(problems[case], *expected[case], field, rounds) for case in cases)
        except (triton.runtime.errors.OutOfResources, triton.CompilationError, AssertionError) as error:
            print(f"{field} {tiling}: {type(error).__name__}")
        except RuntimeError as error:
            if "PassManager" not in str(error):  # Triton's error for a tile that it cannot lower
                raise
            print(f"{field} {tiling}: not compiled")
        return None

    return time_of


def _time(problem: Problem, expected: torch.Tensor, expected_grads, field: str, rounds: int) -> float:
    inputs = (problem.q, problem.k, problem.v)
    out = triton_backend(problem)
    torch.testing.assert_close(out.detach(), expected, **tolerance(out.dtype))
    if field in ("fwd", "fwd_warp_specialized"):
        return time_side_by_side({field: lambda: triton_backend(problem)}, out.device, rounds)[field]
    grad = torch.ones_like(out)
    grads = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    for found, true in zip(grads, expected_grads, strict=True):
        close = (found - true).float().norm() <= 2e-2 * true.float().norm()
        assert close, "the gradient differs from that of the reference"

    def backward() -> None:
        torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return time_side_by_side({field: backward}, out.device, rounds)[field]


def main() -> None:
    parser = argument_parser(__doc__, rounds=7)
    parser.set_defaults(device=torch.device("cuda"), dtype=torch.bfloat16)
    parser.add_argument("--samples", type=int, default=8, help="samples per batch (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=256, help="queries per image (default: %(default)s)")
    parser.add_argument("--patches", type=int, default=1024, help="patches per image (default: %(default)s)")
    parser.add_argument("--num-heads", type=int, default=32, help="attention heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="width of a head (default: %(default)s)")
    args: argparse.Namespace = parser.parse_args()
    if args.device.type != "cuda" or not torch.cuda.is_available():
        sys.exit("Tiles are measured on a CUDA GPU, but none is available.")
    torch.manual_seed(0)
    problems = {case: make_problem(case, args) for case in CASES if case != "small"}
    width = max(32, triton.next_power_of_2(args.head_dim))
    itemsize = problems["pool"].q.element_size()
    capability = torch.cuda.get_device_capability(args.device)
    start = default_tiling(capability, itemsize, width)
    tma_tiling = default_tma_tiling(capability, width) if itemsize == 2 else None
    best = tune(start, tma_tiling, timer(problems, args.rounds))
    save_tiling(torch.cuda.get_device_name(args.device), itemsize, width, best)
    print(f"{describe_machine(args.device)}\ndefault {start}\nfastest {best}\nwritten to {tuning_file()}")


if __name__ == "__main__":
    main()
