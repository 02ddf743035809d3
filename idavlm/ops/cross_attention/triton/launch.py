"""From tensors to launches: what is allocated, the grids, and the arguments all kernels share."""

import torch
import triton
from torch import Tensor

from idavlm.ops.cross_attention.segments import Segments
from idavlm.ops.cross_attention.triton.backward import (
    attend_backward_delta,
    attend_backward_keys,
    attend_backward_queries,
)
from idavlm.ops.cross_attention.triton.forward import attend_forward
from idavlm.ops.cross_attention.triton.tiles import INTERPRETED
from idavlm.ops.cross_attention.triton.tiling import compiler_options, tiling_for
from idavlm.ops.cross_attention.triton.tuning import Tile

DELTA_ROWS = 64


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    key_groups: Tensor | None,
    segments: Segments,
    num_groups: int,
    shared_q: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`idavlm.ops.cross_attention.triton.operator.attend`."""
    num_rows = segments.num * segments.max_seqlen_q if shared_q else q.shape[0]
    heads, head_dim = q.shape[1:]
    out = q.new_empty((num_rows, heads, head_dim))
    sums = q.new_empty((num_rows, heads, num_groups), dtype=torch.float32)
    lse = q.new_empty((heads, num_rows), dtype=torch.float32)
    if out.numel() == 0:
        return out, sums, lse
    common = _common(q, k, v, key_bias, key_groups, segments, num_rows, num_groups, shared_q, scale)
    tile = tiling_for(q).forward
    blocks = triton.cdiv(segments.max_seqlen_q, tile.block_q)
    with _device_of(q):
        attend_forward[segments.num * blocks, heads](
            **common, out=out, sums=sums, lse=lse, num_blocks=blocks, **_options(tile, q)
        )
    return out, sums, lse


def launch_backward(
    grad_out: Tensor,
    grad_sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    key_groups: Tensor | None,
    out: Tensor,
    sums: Tensor,
    lse: Tensor,
    segments: Segments,
    shared_q: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`idavlm.ops.cross_attention.triton.operator.attend_backward`."""
    num_rows, heads, head_dim = out.shape
    num_groups = 0 if grad_sums is None else sums.shape[-1]
    grad_sums = sums if grad_sums is None else grad_sums
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    grad_k, grad_v, delta = k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)
    common = _common(q, k, v, key_bias, key_groups, segments, num_rows, num_groups, shared_q, scale)
    tiling = tiling_for(q)
    joined = tiling.joined and not torch.are_deterministic_algorithms_enabled()
    grad_q = q.new_zeros(q.shape, dtype=torch.float32) if joined else None
    with _device_of(q):
        if num_rows:
            attend_backward_delta[triton.cdiv(num_rows, DELTA_ROWS), heads](
                out, grad_out, sums, grad_sums, delta, heads, num_rows, num_groups,
                GROUPS=common["GROUPS"], HEAD_DIM=head_dim, BLOCK_D=common["BLOCK_D"], BLOCK_Q=DELTA_ROWS,
            )  # fmt: skip
        common |= {"grad_out": grad_out, "grad_sums": grad_sums, "lse": lse, "delta": delta}
        blocks = triton.cdiv(segments.max_seqlen_k, tiling.keys.block_k)
        attend_backward_keys[segments.num * blocks, heads](
            **common, grad_q=grad_q if joined else q, grad_k=grad_k, grad_v=grad_v, num_blocks=blocks, JOINED=joined,
            **_options(tiling.keys, q),
        )  # fmt: skip
        if joined:
            return grad_q.to(q.dtype), grad_k, grad_v
        tile = tiling.shared if shared_q else tiling.queries
        blocks = triton.cdiv(segments.max_seqlen_q, tile.block_q)
        parts = _parts(q, segments.num, blocks * heads) if shared_q else segments.num
        grad_q = q.new_empty((parts, *q.shape), dtype=torch.float32) if shared_q else q.new_empty(q.shape)
        attend_backward_queries[parts * blocks, heads](
            **common, grad_q=grad_q, num_blocks=blocks, num_segments=segments.num, **_options(tile, q)
        )
    return grad_q.sum(0).to(q.dtype) if shared_q else grad_q, grad_k, grad_v


def _common(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    key_groups: Tensor | None,
    segments: Segments,
    num_rows: int,
    num_groups: int,
    shared_q: bool,
    scale: float,
) -> dict[str, object]:
    """Arguments by name. A pointer that is not needed is another tensor's: its flag keeps it from being read."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    heads, head_dim = q.shape[1:]
    return {
        "q": q,
        "k": k,
        "v": v,
        "key_bias": q if key_bias is None else key_bias.contiguous(),
        "key_groups": q if key_groups is None else key_groups,
        "cu_seqlens_q": q if segments.cu_seqlens_q is None else segments.cu_seqlens_q,
        "cu_seqlens_k": q if segments.cu_seqlens_k is None else segments.cu_seqlens_k,
        "q_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "k_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "v_stride": v.stride(0),
        "v_head_stride": v.stride(1),
        "scale": scale,
        "num_heads": heads,
        "num_rows": num_rows,
        "length_q": segments.max_seqlen_q,
        "length_k": segments.max_seqlen_k,
        "bias_length": 1 if key_bias is None else len(key_bias),
        "num_groups": num_groups,
        "RAGGED_Q": segments.cu_seqlens_q is not None,
        "RAGGED_K": segments.cu_seqlens_k is not None,
        "SHARED_Q": shared_q,
        "HAS_BIAS": key_bias is not None,
        "GROUPS": max(16, triton.next_power_of_2(num_groups)) if num_groups else 0,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _options(tile: Tile, q: Tensor) -> dict[str, int]:
    return {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, **compiler_options(tile, q.element_size())}


def _parts(q: Tensor, num_segments: int, programs: int) -> int:
    """Over how many programs to spread the segments of shared queries: about two for each multiprocessor."""
    if INTERPRETED:
        return min(num_segments, 2)
    wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count
    return min(num_segments, triton.cdiv(wanted, programs))


def _device_of(q: Tensor):
    return torch.cuda.device(q.device if q.is_cuda else -1)
