"""Ways to compute ragged cross-attention, forward and forward + backward.

    python -m benchmarks.cross_attention
    python -m benchmarks.cross_attention --device cuda --dtype bfloat16

``sdpa`` is what ``attn_implementation="sdpa"`` takes on this device. The others compute the same: one SDPA call a
segment, one padded call with a mask, one call a bucket of equal lengths, nested tensors, and the float32 reference.
"speed" is against one call a segment.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    argument_parser,
    describe_machine,
    markdown_table,
    peak_megabytes,
    time_side_by_side,
    tolerance,
)
from idavlm import cross_attention
from idavlm.ops.cross_attention import sdpa


def by_segment(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int]) -> Tensor:
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([_attend(*(x[None] for x in part))[0] for part in parts])


def padded(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int]) -> Tensor:
    cu = [torch.tensor([0, *accumulate(lengths)], device=q.device) for lengths in (lengths_q, lengths_k)]
    return sdpa._padded(q, k, v, *cu, max(lengths_q), max(lengths_k), q.shape[-1] ** -0.5)


def bucketed(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int]) -> Tensor:
    buckets = defaultdict(list)
    for segment, lengths in enumerate(zip(lengths_q, lengths_k, strict=True)):
        buckets[lengths].append(segment)
    q_parts, k_parts, v_parts = q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)
    outputs: list[Tensor] = [q] * len(lengths_q)
    for segments in buckets.values():
        stacked = (torch.stack([parts[segment] for segment in segments]) for parts in (q_parts, k_parts, v_parts))
        for segment, output in zip(segments, _attend(*stacked), strict=True):
            outputs[segment] = output
    return torch.cat(outputs)


def nested(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int]) -> Tensor:
    offsets_q, offsets_k = (
        torch.tensor([0, *accumulate(lengths)], device=q.device) for lengths in (lengths_q, lengths_k)
    )
    jagged = (
        torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2)
        for x, offsets in ((q, offsets_q), (k, offsets_k), (v, offsets_k))
    )
    return F.scaled_dot_product_attention(*jagged).transpose(1, 2).values()


def library(implementation: str) -> Callable:
    def run(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int]) -> Tensor:
        cu = [torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=q.device) for x in (lengths_q, lengths_k)]
        return cross_attention(
            q,
            k,
            v,
            cu_seqlens_q=cu[0],
            cu_seqlens_k=cu[1],
            max_seqlen_q=max(lengths_q),
            max_seqlen_k=max(lengths_k),
            attn_implementation=implementation,
        )

    return run


WAYS = {
    "sdpa": library("sdpa"),
    "one call a segment": by_segment,
    "padded": padded,
    "bucketed": bucketed,
    "nested": nested,
    "eager": library("eager"),
}


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def measure_case(
    name: str, heads: int, dim: int, lengths: tuple[list[int], list[int]], args: argparse.Namespace
) -> list[list[object]]:
    def tensor(tokens: int) -> Tensor:
        return torch.randn(tokens, heads, dim, device=args.device, dtype=args.dtype, requires_grad=True)

    inputs = (tensor(sum(lengths[0])), tensor(sum(lengths[1])), tensor(sum(lengths[1])))
    grad = torch.randn_like(inputs[0])
    expected = WAYS["eager"](*inputs, *lengths)
    ways = {}
    for way, function in WAYS.items():
        try:
            torch.testing.assert_close(function(*inputs, *lengths), expected, **tolerance(args.dtype))
            ways[way] = function
        except RuntimeError as error:
            print(f"{name}: {way} does not run here: {str(error).splitlines()[0]}")
    rows = []
    for direction in ("forward", "forward + backward"):

        def run(function: Callable, direction: str = direction) -> None:
            with torch.set_grad_enabled(direction != "forward"):
                out = function(*inputs, *lengths)
            if direction != "forward":
                torch.autograd.grad(out, inputs, grad)

        functions = {way: (lambda function=function: run(function)) for way, function in ways.items()}
        times = time_side_by_side(functions, args.device, args.rounds)
        for way, function in functions.items():
            ratio = f"{times['one call a segment'] / times[way]:.2f}x"
            rows.append(
                [
                    f"{name}, {direction}",
                    way,
                    f"{times[way]:.2f}",
                    ratio,
                    f"{peak_megabytes(function, args.device):.0f}",
                ]
            )
    return rows


def main() -> None:
    parser = argument_parser(__doc__, rounds=9)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    draw = random.Random(0)
    ragged = [(256 * draw.randint(1, 4), 64 * draw.randint(1, 6)) for _ in range(args.samples)]
    rows = measure_case("equal: 256 x 192", 8, 128, ([256] * args.samples, [192] * args.samples), args)
    rows += measure_case("256 x 1..4 over 64 x 1..6", 8, 128, tuple(map(list, zip(*ragged, strict=True))), args)
    rows += measure_case(
        "many small: 16 over 8 x 0..3", 4, 32, ([16] * 64, [8 * draw.randint(0, 3) for _ in range(64)]), args
    )
    print(f"{describe_machine(args.device)}; {args.dtype}; {args.samples} samples; median of {args.rounds} rounds\n")
    print(markdown_table(["case (queries over keys)", "way", "ms", "speed", "MB"], rows))


if __name__ == "__main__":
    main()
