"""Measure tiles of the attention kernels on this GPU. ``python -m benchmarks.gpu`` calls it.

The tiles of one kernel after the other are varied, and the others keep theirs. A tile counts only if output and
gradients agree with the float32 reference.
"""

import time
from collections.abc import Iterator
from itertools import product
from unittest.mock import patch

import torch
import triton

from benchmarks.attention_backends import Problem, library
from benchmarks.cross_attention import reference
from benchmarks.measure import time_side_by_side, tolerance
from idavlm.ops.cross_attention.triton import operator
from idavlm.ops.cross_attention.triton.tiling import KERNELS, Tile, Tiling

# Queries, keys, warps, stages. Bounded: two widths are compiled and measured within two minutes.
CANDIDATES = {
    "fwd": [*product((64, 128), (32, 64, 128), (4, 8), (2, 3))],
    "bwd_dkdv": [*product((32, 64), (64, 128), (4, 8), (1, 2, 3))],
    "bwd_dq": [*product((64, 128), (32, 64), (4, 8), (1, 2))],
    "bwd_dq_shared": [*product((64, 128), (32, 64), (4, 8), (1, 2))],
}

triton_backend = library("triton")


def candidates(start: Tiling) -> Iterator[tuple[str, Tiling]]:
    """Names of kernels, and ``start`` with each tile to try for this kernel; the tile of ``start`` comes first."""
    for kernel in KERNELS:
        tiles = [getattr(start, kernel), *(Tile(*values) for values in CANDIDATES[kernel])]
        yield from ((kernel, start._replace(**{kernel: tile})) for tile in dict.fromkeys(tiles))


def runs_kernel(kernel: str, problem: Problem) -> bool:
    """Whether the problem runs this kernel."""
    return kernel in ("fwd", "bwd_dkdv") or problem.shared == (kernel == "bwd_dq_shared")


def in_use(kernel: str, tiling: Tiling):
    """Context in which the kernels have this tiling; ``bwd_dq`` runs only if it is not fused into ``bwd_dkdv``."""
    tiling = tiling._replace(fuse_dq=False) if kernel.startswith("bwd_dq") else tiling
    return patch.object(operator, "tiling_for", lambda q: tiling)


def reason_to_skip(kernel: str, tiling: Tiling, problems: list[Problem]) -> str | None:
    """Compile and run the kernel with this tiling; why it cannot be used, or None."""
    with in_use(kernel, tiling):
        for problem in problems:
            if not runs_kernel(kernel, problem):
                continue
            try:
                _check(kernel, problem)
            except (triton.runtime.errors.OutOfResources, triton.CompilationError, AssertionError) as error:
                return type(error).__name__
            except RuntimeError as error:
                if "PassManager" not in str(error):  # Triton's error for a tile that it cannot lower
                    raise
                return "not compiled"
    return None


def _check(kernel: str, problem: Problem) -> None:
    inputs = (problem.q, problem.k, problem.v)
    out, expected = triton_backend(problem), reference(problem)
    torch.testing.assert_close(out, expected, **tolerance(out.dtype))
    if kernel == "fwd":
        return
    grad = torch.ones_like(out)
    for found, true in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        close = (found - true).float().norm() <= 2e-2 * true.float().norm()
        assert close, "the gradient differs from that of the reference"


def milliseconds_of(kernel: str, tiling: Tiling, problems: list[Problem], rounds: int) -> float:
    """Time of the forward pass, or of the backward pass, of the problems that run the kernel."""
    total = 0.0
    with in_use(kernel, tiling):
        for problem in problems:
            if not runs_kernel(kernel, problem):
                continue
            inputs, device = (problem.q, problem.k, problem.v), problem.q.device
            if kernel == "fwd":
                with torch.no_grad():
                    total += time_side_by_side({"": lambda p=problem: triton_backend(p)}, device, rounds)[""]
                continue
            out = triton_backend(problem)
            grad = torch.ones_like(out)
            backward = {"": lambda o=out, i=inputs, g=grad: torch.autograd.grad(o, i, g, retain_graph=True)}
            total += time_side_by_side(backward, device, rounds)[""]
    return total


def fastest_tiling(
    start: Tiling, todo: list[tuple[str, Tiling]], problems: list[Problem], rounds: int, deadline: float
) -> tuple[Tiling, list[dict]]:
    """The fastest tile of each kernel, then the faster way to compute the gradient of the queries.

    Args:
        start: the tiling that the candidates vary.
        todo: candidates that run, from :func:`candidates`.
        problems: what to measure.
        rounds: measurements per candidate.
        deadline: ``time.monotonic()`` after which no candidate is measured.

    Returns:
        The tiling, and a record of every measurement.
    """
    best, records = start, []
    fastest: dict[str, float] = {}
    for kernel, tiling in todo:
        if time.monotonic() > deadline:
            break
        tile, milliseconds = getattr(tiling, kernel), milliseconds_of(kernel, tiling, problems, rounds)
        records.append({"kernel": kernel, "tile": list(tile), "ms": milliseconds})
        if milliseconds < fastest.get(kernel, float("inf")):
            fastest[kernel], best = milliseconds, best._replace(**{kernel: tile})
    ways = {fuse_dq: best._replace(fuse_dq=fuse_dq) for fuse_dq in (True, False)}
    times = {way: milliseconds_of("bwd_dkdv", tiling, problems, rounds) for way, tiling in ways.items()}
    records += [{"kernel": "backward", "fuse_dq": way, "ms": milliseconds} for way, milliseconds in times.items()]
    return ways[min(times, key=times.__getitem__)], records
