"""Time and memory of cross-attention backends on identity batches, forward and forward + backward.

    python -m benchmarks.cross_attention
    python -m benchmarks.cross_attention --device cuda --dtype bfloat16

On a CPU the default sizes are small, so that it takes a minute. ``triton`` and ``sdpa`` are this library's backends;
the others are in ``benchmarks/attention_backends.py``. Every backend is first checked against the float32 reference.
Columns:

- "ms" of "backward": that of forward + backward, less that of forward;
- "speed": time of the fastest other backend divided by the time of this one;
- "of matmul": share of the rate that one large matrix product reaches on this machine;
- "roofline ms": the longer of two times, the matrix products at that rate, and the transfer of every input and output
  once at the rate of a large copy;
- "MB": the most memory that tensors made by the backend held at one time.
"""

import argparse
import random
import textwrap
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.attention_backends import BACKENDS, Problem
from benchmarks.measure import (
    argument_parser,
    copy_rate,
    matmul_rate,
    peak_megabytes,
    time_side_by_side,
    tolerance,
)
from idavlm import cross_attention
from idavlm.utils import describe_machine, markdown_table

OURS = ("triton", "sdpa")
HEADER = ["case", "backend", "ms", "speed", "TFLOP/s", "of matmul", "roofline ms", "MB"]
CASES = ("pool", "recognise", "long", "small")


def lengths_of(case: str, samples: int, queries: int, patches: int) -> tuple[list[int], list[int], bool]:
    """Numbers of queries and of keys of each segment, and whether the queries are shared.

    - pool: the learned queries of the resampler over the patches of each image;
    - recognise: patches of 1 to 4 scenes over the tokens of 1 to 6 references;
    - long: patches of one scene over the tokens of 64 references;
    - small: many short segments, some of them empty.
    """
    draw = random.Random(0)
    if case == "pool":
        return [queries] * 4 * samples, [patches] * 4 * samples, True
    if case == "recognise":
        pairs = [(patches * draw.randint(1, 4), queries * draw.randint(1, 6)) for _ in range(samples)]
        return [q for q, _ in pairs], [k for _, k in pairs], False
    if case == "long":
        return [patches], [64 * queries], False
    return [16] * 8 * samples, [8 * draw.randint(0, 3) for _ in range(8 * samples)], False


def make_problem(case: str, args: argparse.Namespace) -> Problem:
    lengths_q, lengths_k, shared = lengths_of(case, args.samples, args.queries, args.patches)

    def tensor(tokens: int) -> Tensor:
        shape = (tokens, args.num_heads, args.head_dim)
        return torch.randn(shape, device=args.device, dtype=args.dtype, requires_grad=True)

    tokens_q = lengths_q[0] if shared else sum(lengths_q)
    return Problem(tensor(tokens_q), tensor(sum(lengths_k)), tensor(sum(lengths_k)), lengths_q, lengths_k, shared)


def work_of(problem: Problem, direction: str) -> tuple[float, float]:
    """Floating-point operations (2 products forward, 5 backward), and bytes that must be transferred."""
    heads, dim = problem.q.shape[1:]
    pairs = sum(q * k for q, k in zip(problem.lengths_q, problem.lengths_k, strict=True))
    outputs = sum(problem.lengths_q) * heads * dim
    inputs = sum(x.numel() for x in (problem.q, problem.k, problem.v))
    forward, backward = inputs + outputs, 2 * inputs + 2 * outputs  # backward reads the output and its gradient
    products, moved = {
        "forward": (2, forward),
        "backward": (5, backward),
        "forward + backward": (7, forward + backward),
    }[direction]
    return 2 * products * pairs * heads * dim, moved * problem.q.element_size()


def reference(problem: Problem) -> Tensor:
    shared = {} if problem.shared else {"cu_seqlens_q": problem.starts_q}
    out = cross_attention(
        problem.q, problem.k, problem.v, cu_seqlens_k=problem.starts_k, attn_implementation="eager", **shared
    )
    return out.flatten(0, 1) if problem.shared else out


def available_backends(problem: Problem, case: str) -> dict[str, Callable[[Problem], Tensor]]:
    """The backends that run here, have a gradient and match the reference; for the others the reason is printed."""
    with torch.no_grad():
        expected = reference(problem)
    available = {}
    for name, function in BACKENDS.items():
        try:
            out = function(problem)
            torch.autograd.grad(out.sum(), (problem.q, problem.k, problem.v))
        except (RuntimeError, ValueError, ImportError, AttributeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            print(f"{case}: {name} does not run here: {textwrap.shorten(reason, 120)}")
            continue
        try:
            torch.testing.assert_close(out.detach(), expected, **tolerance(problem.q.dtype))
        except AssertionError as error:
            print(f"{case}: {name} differs from the reference: {str(error).splitlines()[2]}")
            continue
        available[name] = function
    return available


def measure_case(case: str, args: argparse.Namespace, rates: tuple[float, float]) -> list[list[object]]:
    """Rows of a table with the columns ``HEADER``. ``rates``: of a matrix product and of a copy, see ``measure.py``."""
    problem = make_problem(case, args)
    inputs = (problem.q, problem.k, problem.v)
    backends = available_backends(problem, case)
    grad = torch.randn_like(next(iter(backends.values()))(problem))

    def forward(function: Callable[[Problem], Tensor]) -> None:
        with torch.no_grad():
            function(problem)

    def forward_backward(function: Callable[[Problem], Tensor]) -> None:
        torch.autograd.grad(function(problem), inputs, grad)

    times, megabytes = {}, {}
    for direction, run in (("forward", forward), ("forward + backward", forward_backward)):
        functions = {name: (lambda function=function, run=run: run(function)) for name, function in backends.items()}
        times[direction] = time_side_by_side(functions, args.device, args.rounds)
        megabytes[direction] = {name: peak_megabytes(function, args.device) for name, function in functions.items()}
    times["backward"] = {name: times["forward + backward"][name] - times["forward"][name] for name in backends}
    rows = []
    for direction in ("forward", "backward", "forward + backward"):
        best_other = min(time for name, time in times[direction].items() if name not in OURS)
        operations, moved = work_of(problem, direction)
        roofline = 1000 * max(operations / rates[0], moved / rates[1])
        for name, milliseconds in times[direction].items():
            rate = operations / milliseconds * 1000
            rows.append(
                [
                    f"{case}, {direction}",
                    name,
                    f"{milliseconds:.2f}",
                    f"{best_other / milliseconds:.2f}x",
                    f"{rate / 1e12:.3g}",
                    f"{rate / rates[0]:.0%}",
                    f"{roofline:.2f}",
                    f"{megabytes[direction][name]:.0f}" if direction in megabytes else "",
                ]
            )
    return rows


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--samples", type=int, help="samples per batch (default: 8, on a CPU 4)")
    parser.add_argument("--queries", type=int, help="queries per image (default: 256, on a CPU 64)")
    parser.add_argument("--patches", type=int, help="patches per image (default: 1024, on a CPU 256)")
    parser.add_argument("--num-heads", type=int, help="attention heads (default: 32, on a CPU 4)")
    parser.add_argument("--head-dim", type=int, help="width of a head (default: 128, on a CPU 64)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="batches to measure (default: all)")
    args = parser.parse_args()
    small = args.device.type == "cpu"
    for name, sizes in {
        "samples": (8, 4), "queries": (256, 64), "patches": (1024, 256), "num_heads": (32, 4), "head_dim": (128, 64)
    }.items():  # fmt: skip
        if getattr(args, name) is None:
            setattr(args, name, sizes[small])
    torch.manual_seed(0)
    rates = matmul_rate(args.device, args.dtype), copy_rate(args.device)
    rows = [row for case in args.cases for row in measure_case(case, args, rates)]
    print(
        f"\n{describe_machine(args.device)}; {args.dtype}; {args.samples} samples, {args.queries} queries, "
        f"{args.patches} patches, {args.num_heads} heads of {args.head_dim}; matrix product {rates[0] / 1e12:.3g} "
        f"TFLOP/s, copy {rates[1] / 1e9:.3g} GB/s; median of {args.rounds} rounds\n"
    )
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
