"""Two forms of the same tokens: dense ``[N, L, H, D]``, and packed ``[T, H, D]`` with ``cu_seqlens`` ``[N + 1]``."""

import torch
from torch import Tensor


def split_segments(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """The N segments of ``x``, as views. Reads ``cu_seqlens`` on the host."""
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
    """``[N, max_seqlen, H, D]``, zeros behind each segment's end."""
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
    """``[N, max_seqlen]``, true where a token stands."""
    return torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]
