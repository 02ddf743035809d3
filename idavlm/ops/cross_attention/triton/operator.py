"""The kernels as custom operators of torch with autograd, for ``torch.compile``, autocast and checkpointing."""

import torch
import triton
from torch import Tensor

from idavlm.ops.cross_attention.segments import Segments, pad_segments
from idavlm.ops.cross_attention.triton.bwd import bwd_delta, bwd_dkdv, bwd_dq, bwd_dq_shared
from idavlm.ops.cross_attention.triton.device_functions import INTERPRETED, Args, KernelOptions, Rows
from idavlm.ops.cross_attention.triton.fwd import fwd
from idavlm.ops.cross_attention.triton.tiling import Tile, compiler_options, tiling_for

_DELTA_TILE = Tile(64, 16, 4, 1)


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
    # Packed rows after the last segment belong to no program.
    new_rows = q.new_empty if cu_seqlens_q is None else q.new_zeros
    out = new_rows((num_rows, heads, head_dim))
    sums = new_rows((num_rows, heads, num_groups), dtype=torch.float32)
    lse = q.new_empty((heads, num_rows), dtype=torch.float32)
    if out.numel() == 0:
        return out, sums, lse
    segments = Segments(num_segments, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    args, options = _kernel_args(q, k, v, key_bias, key_groups, segments, out, sums, lse, num_groups, shared_q, scale)
    tile = tiling_for(q).fwd
    _launch(fwd, tile, num_segments, triton.cdiv(max_seqlen_q, tile.block_q), args, options)
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
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    num_groups = 0 if grad_sums is None else sums.shape[-1]
    segments = Segments(num_segments, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    args, options = _kernel_args(q, k, v, key_bias, key_groups, segments, out, sums, lse, num_groups, shared_q, scale)
    tiling = tiling_for(q)
    fuse_dq = tiling.fuse_dq and not torch.are_deterministic_algorithms_enabled()
    blocks_q = triton.cdiv(max_seqlen_q, tiling.bwd_dq_shared.block_q)
    parts = _num_parts(q, num_segments, blocks_q * q.shape[1])
    # Packed rows after the last segment belong to no program; their gradients are zero.
    new_q, new_k = (q.new_empty if x is None else q.new_zeros for x in (cu_seqlens_q, cu_seqlens_k))
    if fuse_dq:
        grad_q = q.new_zeros(q.shape, dtype=torch.float32)
    else:
        grad_q = q.new_empty((parts, *q.shape), dtype=torch.float32) if shared_q else new_q(q.shape)
    args = args._replace(
        grad_out=torch.zeros_like(out) if grad_out is None else grad_out.contiguous(),
        grad_sums=sums if grad_sums is None else grad_sums.contiguous(),
        delta=lse.new_empty(lse.shape),
        grad_q=grad_q,
        grad_k=new_k(k.shape),
        grad_v=new_k(v.shape),
    )
    if len(out):
        _launch(bwd_delta, _DELTA_TILE, 1, triton.cdiv(len(out), _DELTA_TILE.block_q), args, options)
    blocks_k = triton.cdiv(max_seqlen_k, tiling.bwd_dkdv.block_k)
    _launch(bwd_dkdv, tiling.bwd_dkdv, num_segments, blocks_k, args, options._replace(FUSE_DQ=fuse_dq))
    if not fuse_dq and shared_q:
        _launch(bwd_dq_shared, tiling.bwd_dq_shared, parts, blocks_q, args, options)
        grad_q = grad_q.sum(0)
    elif not fuse_dq:
        blocks_q = triton.cdiv(max_seqlen_q, tiling.bwd_dq.block_q)
        _launch(bwd_dq, tiling.bwd_dq, num_segments, blocks_q, args, options)
    return grad_q.to(q.dtype), args.grad_k, args.grad_v


@fused_cross_attention_backward.register_fake
def _(
    grad_out, grad_sums, q, k, v, key_bias, key_groups, cu_seqlens_q, cu_seqlens_k, out, sums, lse, num_segments,
    max_seqlen_q, max_seqlen_k, shared_q, scale,
):  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _kernel_args(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    key_groups: Tensor | None,
    segments: Segments,
    out: Tensor,
    sums: Tensor,
    lse: Tensor,
    num_groups: int,
    shared_q: bool,
    scale: float,
) -> tuple[Args, KernelOptions]:
    """Arguments and options of the kernels.

    ``q`` stands for tensors that do not exist; an option tells the kernel not to read them, or another kernel does.
    """

    def rows(x: Tensor) -> Rows:
        x = x if x.stride(-1) == 1 else x.contiguous()
        return Rows(x, x.stride(0), x.stride(1))

    def optional(x: Tensor | None) -> Tensor:
        return q if x is None else x.contiguous()

    args = Args(
        q=rows(q),
        k=rows(k),
        v=rows(v),
        key_bias=optional(key_bias),
        key_groups=optional(key_groups),
        cu_seqlens_q=optional(segments.cu_seqlens_q),
        cu_seqlens_k=optional(segments.cu_seqlens_k),
        out=out,
        sums=sums,
        lse=lse,
        grad_out=q,
        grad_sums=q,
        delta=q,
        grad_q=q,
        grad_k=q,
        grad_v=q,
        scale=scale,
        num_heads=q.shape[1],
        num_rows=len(out),
        length_q=segments.max_seqlen_q,
        length_k=segments.max_seqlen_k,
        num_segments=segments.num,
        bias_length=1 if key_bias is None else len(key_bias),
        num_groups=num_groups,
    )
    options = KernelOptions(
        RAGGED_Q=segments.cu_seqlens_q is not None,
        RAGGED_K=segments.cu_seqlens_k is not None,
        SHARED_Q=shared_q,
        HAS_BIAS=key_bias is not None,
        GROUPS=max(16, triton.next_power_of_2(num_groups)) if num_groups else 0,
        HEAD_DIM=q.shape[2],
        BLOCK_D=max(16, triton.next_power_of_2(q.shape[2])),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )
    return args, options


def _launch(kernel, tile: Tile, repeats: int, num_blocks: int, args: Args, options: KernelOptions) -> None:
    """Run a kernel on ``repeats * num_blocks`` blocks of every head. ``repeats``: segments, or parts of them."""
    q = args.q.data
    args, options = args._replace(num_blocks=num_blocks), options._replace(BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k)
    with torch.cuda.device(q.device if q.is_cuda else -1):
        kernel[repeats * num_blocks, args.num_heads](args, options, **compiler_options(tile, q.element_size()))


def _num_parts(q: Tensor, num_segments: int, programs: int) -> int:
    """Number of partial sums of the gradient of shared queries, for about two programs per multiprocessor."""
    if INTERPRETED:
        return min(num_segments, 2)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return min(num_segments, triton.cdiv(2 * processors, programs))


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
