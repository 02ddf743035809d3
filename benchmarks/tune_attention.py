"""Measure tiles of the attention kernels on this GPU, and keep the fastest for every later process.

From capability 9.0 on and in 16 bits every tile is measured twice: read by pointers, and by tensor descriptors.

    python -m benchmarks.tune_attention --head-dim 128 --dtype bfloat16

One kernel after the other, each tile first checked against the float32 reference. Where the result goes:
``idavlm/ops/cross_attention/triton/tuning.py``.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product
from unittest.mock import patch

import torch
import triton

from benchmarks.attention_backends import Problem
from benchmarks.attention_backends import triton as attend
from benchmarks.cross_attention import CASES, make_problem, reference
from benchmarks.measure import argument_parser, describe_machine, time_side_by_side, tolerance
from idavlm.ops.cross_attention.triton import launch
from idavlm.ops.cross_attention.triton.tiling import described_tiling, shipped_tiling
from idavlm.ops.cross_attention.triton.tuning import KERNELS, Tile, Tiling, save_tiling, tuning_file

BLOCKS_Q, BLOCKS_K, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)


def candidates(tiling: Tiling, described: Tiling | None) -> Iterator[tuple[str, list[Tiling]]]:
    """Each kernel, and ``tiling`` with every tile for it. Then the choices of the backward, and warps that load.

    ``described``: shipped tiles to start from with tensor descriptors, None where there are none.
    """
    ways = (False, True) if described else (False,)
    tiles = [Tile(*sizes, tma) for *sizes, tma in product(BLOCKS_Q, BLOCKS_K, WARPS, STAGES, ways)]
    for kernel in KERNELS:
        first = [getattr(tiling, kernel), *([getattr(described, kernel)] if described else [])]
        yield kernel, [tiling._replace(**{kernel: tile}) for tile in (*first, *tiles)]
    yield "values", [tiling._replace(values=tile) for tile in (None, tiling.keys, *tiles)]
    yield "joined", [tiling._replace(joined=joined) for joined in (True, False)]
    if described and described.specialised:
        # As many warps as shipped: with others Triton leaves the loop as it is, or does not compile it.
        warps = described.specialised.num_warps
        loading = [tile for tile in tiles if tile.tma and tile.num_warps == warps and tile.block_q >= 64]
        yield "specialised", [tiling._replace(specialised=tile) for tile in (None, described.specialised, *loading)]


def tune(start: Tiling, described: Tiling | None, time_of: Callable[[str, Tiling], float | None]) -> Tiling:
    """Kernel by kernel the tiling for which ``time_of(kernel, tiling)`` is least; None says that it does not run."""
    best = start
    for number in range(len(list(candidates(start, described)))):
        kernel, choices = list(candidates(best, described))[number]
        timed = [(time_of(kernel, choice), choice) for choice in choices]
        running = [(time, choice) for time, choice in timed if time is not None]
        if running:
            best = min(running, key=lambda pair: pair[0])[1]
    return best


def timer(problems: dict[str, Problem], rounds: int) -> Callable[[str, Tiling], float | None]:
    expected = {}
    for case, problem in problems.items():
        out = reference(problem)
        expected[case] = out.detach(), torch.autograd.grad(out.sum(), (problem.q, problem.k, problem.v))

    def time_of(kernel: str, tiling: Tiling) -> float | None:
        """Milliseconds of the problems that use the kernel, or None."""
        if kernel in ("queries", "shared"):
            tiling = tiling._replace(joined=False)
        chosen = {case: p for case, p in problems.items() if p.shared or kernel != "shared"}
        chosen = {case: p for case, p in chosen.items() if not p.shared or kernel != "queries"}
        try:
            with patch.object(launch, "tiling_for", lambda *tensors: tiling):
                return sum(_time(problem, *expected[case], kernel, rounds) for case, problem in chosen.items())
        except (triton.runtime.errors.OutOfResources, triton.CompilationError, AssertionError) as error:
            print(f"{kernel} {tiling}: {type(error).__name__}")
        except RuntimeError as error:
            if "PassManager" not in str(error):  # what Triton raises for a tile that it cannot lower
                raise
            print(f"{kernel} {tiling}: not compiled")
        return None

    return time_of


def _time(problem: Problem, expected: torch.Tensor, expected_grads, kernel: str, rounds: int) -> float:
    inputs = (problem.q, problem.k, problem.v)
    out = attend(problem)
    torch.testing.assert_close(out.detach(), expected, **tolerance(out.dtype))
    if kernel in ("forward", "specialised"):
        return time_side_by_side({kernel: lambda: attend(problem)}, out.device, rounds)[kernel]
    grad = torch.ones_like(out)
    for found, true in zip(torch.autograd.grad(out, inputs, grad, retain_graph=True), expected_grads, strict=True):
        close = (found - true).float().norm() <= 2e-2 * true.float().norm()
        assert close, "another gradient than the reference's"

    def backward() -> None:
        torch.autograd.grad(out, inputs, grad, retain_graph=True)

    return time_side_by_side({kernel: backward}, out.device, rounds)[kernel]


def main() -> None:
    parser = argument_parser(__doc__, rounds=7)
    parser.set_defaults(device=torch.device("cuda"), dtype=torch.bfloat16)
    for name, default in {
        "samples": 8, "queries": 256, "patches": 1024, "num_heads": 32, "head_dim": 128
    }.items():  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args: argparse.Namespace = parser.parse_args()
    if args.device.type != "cuda" or not torch.cuda.is_available():
        sys.exit("Tiles are measured on a CUDA GPU, and there is none here.")
    torch.manual_seed(0)
    problems = {case: make_problem(case, args) for case in CASES if case != "small"}
    width = max(32, triton.next_power_of_2(args.head_dim))
    itemsize = problems["pool"].q.element_size()
    capability = torch.cuda.get_device_capability(args.device)
    start = shipped_tiling(capability, itemsize, width)
    described = described_tiling(capability, width) if itemsize == 2 else None
    best = tune(start, described, timer(problems, args.rounds))
    save_tiling(torch.cuda.get_device_name(args.device), itemsize, width, best)
    print(f"{describe_machine(args.device)}\nshipped {start}\nfastest {best}\nkept in {tuning_file()}")


if __name__ == "__main__":
    main()
