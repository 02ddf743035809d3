"""The kernels as custom operators of torch with autograd, for ``torch.compile``, autocast and checkpointing."""

import torch
import triton
from torch import Tensor

from idavlm.ops.cross_attention.segments import Segments, pad_segments
from idavlm.ops.cross_attention.triton.bwd_delta import bwd_delta
from idavlm.ops.cross_attention.triton.bwd_dkdv import bwd_dkdv
from idavlm.ops.cross_attention.triton.bwd_dq import bwd_dq
from idavlm.ops.cross_attention.triton.device_functions import BackwardInputs
from idavlm.ops.cross_attention.triton.fwd import fwd
from idavlm.ops.cross_attention.triton.launch import (
    can_specialize_warps,
    device_context,
    grid_of,
    kernel_inputs,
    launch_kernel,
    num_parts,
)
from idavlm.ops.cross_attention.triton.tiling import tiling_for

_DELTA_ROWS = 64


@torch.library.custom_op("idavlm::cross_attention", mutates_args=())
def fused_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    key_groups: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_segments: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_groups: int,
    shared_q: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-attention of packed segments.

    Args:
        q: ``[Tq, H, D]``, or ``[Lq, H, D]`` with ``shared_q``.
        k: ``[Tk, H, D]``.
        v: ``[Tk, H, D]``.
        key_bias: ``[L, H, D]`` added to the keys by position, modulo L.
        key_groups: ``[Tk]`` int32; keys of a group outside ``0..num_groups - 1`` are in no sum.
        cu_seqlens_q: ``[N + 1]`` int32, or None where all segments have ``max_seqlen_q`` queries.
        cu_seqlens_k: the same for keys.
        num_segments: N.
        max_seqlen_q: queries of the longest segment.
        max_seqlen_k: keys of the longest segment.
        num_groups: G; 0 without ``key_groups``.
        shared_q: all segments use the same queries.
        scale: factor on the scores.

    Returns:
        Output ``[Tq, H, D]``, weights summed over groups of keys ``[Tq, H, G]``, and log2-sum-exp ``[H, Tq]``.
    """
    num_rows = num_segments * max_seqlen_q if shared_q else q.shape[0]
    heads, head_dim = q.shape[1:]
    out = q.new_empty((num_rows, heads, head_dim))
    sums = q.new_empty((num_rows, heads, num_groups), dtype=torch.float32)
    lse = q.new_empty((heads, num_rows), dtype=torch.float32)
    if out.numel() == 0:
        return out, sums, lse
    segments = Segments(num_segments, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    inputs, options = kernel_inputs(q, k, v, key_bias, key_groups, segments, num_rows, num_groups, shared_q, scale)
    tiling = tiling_for(inputs.q.data, inputs.k.data, inputs.v.data, out)
    warp_specialized = tiling.fwd_warp_specialized is not None and can_specialize_warps(inputs, options)
    tile = tiling.fwd_warp_specialized if warp_specialized else tiling.fwd
    blocks = triton.cdiv(max_seqlen_q, tile.block_q)
    inputs = inputs._replace(num_blocks=blocks)
    grid = grid_of(tile, q, num_segments * blocks, heads, warp_specialized)
    launch_kernel(fwd, tile, grid, inputs, out, sums, lse, options=options, warp_specialized=warp_specialized)
    return out, sums, lse


@fused_cross_attention.register_fake
def _(
    q, k, v, key_bias, key_groups, cu_seqlens_q, cu_seqlens_k, num_segments, max_seqlen_q, max_seqlen_k, num_groups,
    shared_q, scale,
):  # fmt: skip
    rows = num_segments * max_seqlen_q if shared_q else q.shape[0]
    heads = q.shape[1]
    return (
        q.new_empty((rows, heads, q.shape[2])),
        q.new_empty((rows, heads, num_groups), dtype=torch.float32),
        q.new_empty((heads, rows), dtype=torch.float32),
    )


@torch.library.custom_op("idavlm::cross_attention_backward", mutates_args=())
def fused_cross_attention_backward(
    grad_out: Tensor | None,
    grad_sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    key_groups: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    sums: Tensor,
    lse: Tensor,
    num_segments: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    shared_q: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``. ``grad_out`` or ``grad_sums`` None means zero."""
    num_rows, heads, head_dim = out.shape
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    num_groups = 0 if grad_sums is None else sums.shape[-1]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    grad_sums = sums if grad_sums is None else grad_sums.contiguous()
    grad_k, grad_v, delta = k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)
    segments = Segments(num_segments, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    inputs, options = kernel_inputs(q, k, v, key_bias, key_groups, segments, num_rows, num_groups, shared_q, scale)
    backward = BackwardInputs(grad_out, grad_sums, lse, delta)
    tiling = tiling_for(inputs.q.data, inputs.k.data, inputs.v.data, grad_out)
    fuse_dq = tiling.fuse_dq and not torch.are_deterministic_algorithms_enabled()
    if num_rows:
        with device_context(q):
            bwd_delta[triton.cdiv(num_rows, _DELTA_ROWS), heads](
                out, grad_out, sums, grad_sums, delta, heads, num_rows, num_groups,
                GROUPS=options.GROUPS, HEAD_DIM=head_dim, BLOCK_D=options.BLOCK_D, BLOCK_Q=_DELTA_ROWS,
            )  # fmt: skip
    grad_q = q.new_zeros(q.shape, dtype=torch.float32) if fuse_dq else q
    options = options._replace(FUSE_DQ=fuse_dq, COMPUTE_DV=tiling.bwd_dv is None)
    passes = [(tiling.bwd_dkdv, options)]
    if tiling.bwd_dv is not None:
        passes.append((tiling.bwd_dv, options._replace(COMPUTE_DK=False, COMPUTE_DV=True)))
    for tile, pass_options in passes:
        blocks = triton.cdiv(max_seqlen_k, tile.block_k)
        inputs, grid = inputs._replace(num_blocks=blocks), grid_of(tile, q, num_segments * blocks, heads)
        launch_kernel(bwd_dkdv, tile, grid, inputs, backward, grad_q, grad_k, grad_v, options=pass_options)
    if fuse_dq:
        return grad_q.to(q.dtype), grad_k, grad_v
    tile = tiling.bwd_dq_shared if shared_q else tiling.bwd_dq
    blocks = triton.cdiv(max_seqlen_q, tile.block_q)
    if shared_q:
        parts = num_parts(q, num_segments, blocks * heads)
        grad_q, grid = q.new_empty((parts, *q.shape), dtype=torch.float32), (parts * blocks, heads)
    else:
        grad_q, grid = q.new_empty(q.shape), grid_of(tile, q, num_segments * blocks, heads)
    launch_kernel(bwd_dq, tile, grid, inputs._replace(num_blocks=blocks), backward, grad_q, options=options)
    return grad_q.sum(0).to(q.dtype) if shared_q else grad_q, grad_k, grad_v


@fused_cross_attention_backward.register_fake
def _(
    grad_out, grad_sums, q, k, v, key_bias, key_groups, cu_seqlens_q, cu_seqlens_k, out, sums, lse, num_segments,
    max_seqlen_q, max_seqlen_k, shared_q, scale,
):  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, key_bias, key_groups, cu_seqlens_q, cu_seqlens_k, *sizes, num_groups, shared_q, scale = inputs
    ctx.save_for_backward(q, k, v, key_bias, key_groups, cu_seqlens_q, cu_seqlens_k, *output)
    ctx.sizes, ctx.num_groups, ctx.shared_q, ctx.scale = sizes, num_groups, shared_q, scale
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_sums: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    q, k, v, key_bias, key_groups, cu_seqlens_q, cu_seqlens_k, out, sums, lse = ctx.saved_tensors
    if grad_out is None and grad_sums is None:
        return (None,) * 13
    grad_q, grad_k, grad_v = fused_cross_attention_backward(
        grad_out, grad_sums if ctx.num_groups else None, q, k, v, key_bias, key_groups, cu_seqlens_q, cu_seqlens_k,
        out, sums, lse, *ctx.sizes, ctx.shared_q, ctx.scale,
    )  # fmt: skip
    grad_bias = None
    if key_bias is not None and ctx.needs_input_grad[3]:
        grad_bias = _sum_over_positions(
            grad_k, len(key_bias), Segments(ctx.sizes[0], None, cu_seqlens_k, *ctx.sizes[1:])
        )
    return grad_q, grad_k, grad_v, grad_bias, *(None,) * 9


def _sum_over_positions(grad_k: Tensor, length: int, segments: Segments) -> Tensor:
    """Gradient of ``key_bias``: ``grad_k`` summed over positions modulo ``length``, in a fixed order."""
    shape = (segments.num, segments.max_seqlen_k, *grad_k.shape[1:])
    grads = pad_segments(grad_k, segments.cu_seqlens_k, segments.max_seqlen_k).reshape(shape)
    padding = -segments.max_seqlen_k % length
    grads = torch.nn.functional.pad(grads, (0, 0, 0, 0, 0, padding))
    return grads.unflatten(1, (-1, length)).sum((0, 1), dtype=torch.float32).to(grad_k.dtype)


fused_cross_attention.register_autograd(_backward, setup_context=_setup_context)
