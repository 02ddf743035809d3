"""Backends of ragged cross-attention to compare: each is a function from a :class:`Problem` to the output."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from idavlm import cross_attention
from idavlm.ops.cross_attention import sdpa
from idavlm.ops.cross_attention.segments import Segments


@dataclass(eq=False)
class Problem:
    """Packed inputs ``[T, H, D]``. With ``shared``, all segments use the same queries and ``q`` holds them once."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths_q: list[int]
    lengths_k: list[int]
    shared: bool

    @cached_property
    def starts_q(self) -> Tensor:
        return self._starts(self.lengths_q)

    @cached_property
    def starts_k(self) -> Tensor:
        return self._starts(self.lengths_k)

    @property
    def packed_q(self) -> Tensor:
        """Queries of all segments, for backends that need a copy of shared queries per segment."""
        return self.q.repeat(len(self.lengths_q), 1, 1) if self.shared else self.q

    @property
    def segments(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        lengths_q, lengths_k = self.lengths_q, self.lengths_k
        return list(zip(self.packed_q.split(lengths_q), self.k.split(lengths_k), self.v.split(lengths_k), strict=True))

    @cached_property
    def block_mask(self):
        from torch.nn.attention.flex_attention import create_block_mask

        segment_q, segment_k = (
            torch.repeat_interleave(torch.arange(len(x), device=self.q.device), torch.tensor(x, device=self.q.device))
            for x in (self.lengths_q, self.lengths_k)
        )

        def same_segment(batch, head, query, key):
            return segment_q[query] == segment_k[key]

        return create_block_mask(same_segment, None, None, len(segment_q), len(segment_k), device=self.q.device)

    def _starts(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.q.device)


def library(implementation: str) -> Callable[[Problem], Tensor]:
    """:func:`idavlm.cross_attention` with ``attn_implementation=implementation``."""

    def run(problem: Problem) -> Tensor:
        queries = {} if problem.shared else {"cu_seqlens_q": problem.starts_q, "max_seqlen_q": max(problem.lengths_q)}
        out = cross_attention(
            problem.q,
            problem.k,
            problem.v,
            cu_seqlens_k=problem.starts_k,
            max_seqlen_k=max(problem.lengths_k),
            attn_implementation=implementation,
            **queries,
        )
        return out.flatten(0, 1) if problem.shared else out

    return run


def by_segment(problem: Problem) -> Tensor:
    """One SDPA call per segment."""
    return torch.cat([_sdpa(*(x[None] for x in segment))[0] for segment in problem.segments])


def released(problem: Problem) -> Tensor:
    """As the released code: a loop over segments of ``nn.MultiheadAttention`` that returns its weights."""
    outputs = []
    for q, k, v in problem.segments:
        weights = torch.einsum("qhd,khd->hqk", q * q.shape[-1] ** -0.5, k).softmax(-1)
        weights.mean(0)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def padded(backend: SDPBackend) -> Callable[[Problem], Tensor]:
    """One padded SDPA call, with a mask unless all segments have the same length."""

    def run(problem: Problem) -> Tensor:
        q, k, v, num = problem.packed_q, problem.k, problem.v, len(problem.lengths_q)
        starts_q, starts_k = problem.starts_q, problem.starts_k
        if len(set(problem.lengths_q)) == 1:
            q, starts_q = q.unflatten(0, (num, -1)), None
        if len(set(problem.lengths_k)) == 1:
            k, v, starts_k = k.unflatten(0, (num, -1)), v.unflatten(0, (num, -1)), None
        with sdpa_kernel(backend):
            segments = Segments(num, starts_q, starts_k, max(problem.lengths_q), max(problem.lengths_k))
            out = sdpa._padded(q, k, v, segments, q.shape[-1] ** -0.5)
        return out if starts_q is not None else out.flatten(0, 1)

    return run


def bucketed(problem: Problem) -> Tensor:
    """One SDPA call per pair of lengths."""
    buckets = defaultdict(list)
    segments = problem.segments
    for number, lengths in enumerate(zip(problem.lengths_q, problem.lengths_k, strict=True)):
        buckets[lengths].append(number)
    outputs = [problem.q] * len(segments)
    for numbers in buckets.values():
        stacked = (torch.stack(parts) for parts in zip(*(segments[number] for number in numbers), strict=True))
        for number, output in zip(numbers, _sdpa(*stacked), strict=True):
            outputs[number] = output
    return torch.cat(outputs)


def nested(problem: Problem) -> Tensor:
    jagged = (
        torch.nested.nested_tensor_from_jagged(x, starts.long()).transpose(1, 2)
        for x, starts in (
            (problem.packed_q, problem.starts_q),
            (problem.k, problem.starts_k),
            (problem.v, problem.starts_k),
        )
    )
    return F.scaled_dot_product_attention(*jagged).transpose(1, 2).values()


def varlen(problem: Problem) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = (problem.starts_q, problem.starts_k), (max(problem.lengths_q), max(problem.lengths_k))
    return varlen_attn(problem.packed_q, problem.k, problem.v, *starts, *longest)


def flex(problem: Problem) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if problem.q.device.type == "cpu":
        raise RuntimeError("compiled FlexAttention has no backward on a CPU")
    heads_first = (x.transpose(0, 1)[None] for x in (problem.packed_q, problem.k, problem.v))
    out = torch.compile(flex_attention)(*heads_first, block_mask=problem.block_mask)
    return out[0].transpose(0, 1)


BACKENDS: dict[str, Callable[[Problem], Tensor]] = {
    "triton": library("triton"),
    "sdpa": library("sdpa"),
    "released": released,
    "one call per segment": by_segment,
    "bucketed": bucketed,
    "padded, flash": padded(SDPBackend.FLASH_ATTENTION),
    "padded, efficient": padded(SDPBackend.EFFICIENT_ATTENTION),
    "padded, cuDNN": padded(SDPBackend.CUDNN_ATTENTION),
    "padded, math": padded(SDPBackend.MATH),
    "nested": nested,
    "flash-attn varlen": library("flash_attention_2"),
    "torch varlen": varlen,
    "flex": flex,
}


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
