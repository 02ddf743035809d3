"""Segments of tokens: dense ``[N, L, H, D]``, or packed ``[T, H, D]`` with ``cu_seqlens`` ``[N + 1]``."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """N segments of queries and keys. ``cu_seqlens`` is None where all segments have the same length."""

    num: int
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Options:
    """The other arguments of :func:`idavlm.cross_attention`, with defaults filled in."""

    scale: float
    key_bias: Tensor | None
    key_groups: Tensor | None
    num_key_groups: int
    output_attentions: bool


def repeat_shared(q: Tensor, segments: Segments) -> Tensor:
    """Shared queries ``[Lq, H, D]`` as a dense view ``[N, Lq, H, D]``; other queries are returned unchanged."""
    shared = q.dim() == 3 and segments.cu_seqlens_q is None
    return q.expand(segments.num, -1, -1, -1) if shared else q


def add_key_bias(k: Tensor, key_bias: Tensor | None, segments: Segments) -> Tensor:
    """Add ``key_bias`` ``[L, H, D]`` to the keys by their position in their segment, modulo L."""
    if key_bias is None:
        return k
    length = segments.max_seqlen_k
    if segments.cu_seqlens_k is None and len(key_bias) == length:
        return k + key_bias
    if segments.cu_seqlens_k is None:
        positions = torch.arange(length, device=k.device)
    else:
        positions = token_positions(segments.cu_seqlens_k, k.shape[0], length) % max(length, 1)
    return k + key_bias[positions % len(key_bias)]


def group_sums(weights: Tensor, num_queries: int, segments: Segments, options: Options) -> Tensor:
    """Sum weights ``[N, H, Lq, Lk]`` over the keys of each group: ``[N, Lq, H, G]``, or packed ``[Tq, H, G]``."""
    groups = torch.arange(options.num_key_groups, device=weights.device)
    one_hot = (options.key_groups[..., None] == groups).to(weights.dtype)
    one_hot = pad_segments(one_hot, segments.cu_seqlens_k, segments.max_seqlen_k)
    with torch.autocast(weights.device.type, enabled=False):
        sums = torch.einsum("nhqk,nkg->nqhg", weights, one_hot)
    return unpad_segments(sums, segments.cu_seqlens_q, num_queries)


def split_segments(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """Views of the N segments of ``x``. ``cu_seqlens`` is read on the host."""
    if cu_seqlens is None:
        return x.unbind(0)
    return x.split(cu_seqlens.diff().tolist())


def token_positions(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int) -> Tensor:
    """Row of each packed token in the padded ``[N * max_seqlen]`` layout; ``[T]``, without a host sync."""
    cu_seqlens = cu_seqlens.long()
    num_segments = cu_seqlens.numel() - 1
    segment = torch.repeat_interleave(
        torch.arange(num_segments, device=cu_seqlens.device), cu_seqlens.diff(), output_size=num_tokens
    )
    return torch.arange(num_tokens, device=cu_seqlens.device) + (segment * max_seqlen - cu_seqlens[segment])


def pad_segments(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> Tensor:
    """Packed ``[T, ...]`` to ``[N, max_seqlen, ...]``, with zeros after the end of each segment."""
    if cu_seqlens is None:
        return x
    shape = (cu_seqlens.numel() - 1, max_seqlen, *x.shape[1:])
    positions = token_positions(cu_seqlens, x.shape[0], max_seqlen)
    return x.new_zeros(shape).flatten(0, 1).index_copy(0, positions, x).view(shape)


def unpad_segments(padded: Tensor, cu_seqlens: Tensor | None, num_tokens: int) -> Tensor:
    """Undo :func:`pad_segments`."""
    if cu_seqlens is None:
        return padded
    return padded.flatten(0, 1).index_select(0, token_positions(cu_seqlens, num_tokens, padded.shape[1]))


def length_mask(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """``[N, max_seqlen]``: True for tokens, False for padding."""
    return torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]
