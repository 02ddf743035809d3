"""Launches of the kernels: outputs are allocated, grids chosen, and tensors turned into the arguments of a kernel."""

from contextvars import copy_context

import torch
import triton
from torch import Tensor

from idavlm.ops.cross_attention.segments import Segments
from idavlm.ops.cross_attention.triton.bwd_delta import bwd_delta
from idavlm.ops.cross_attention.triton.bwd_dkdv import bwd_dkdv
from idavlm.ops.cross_attention.triton.bwd_dq import bwd_dq
from idavlm.ops.cross_attention.triton.device_functions import INTERPRETED
from idavlm.ops.cross_attention.triton.fwd import fwd
from idavlm.ops.cross_attention.triton.tiling import Tile, compiler_options, tiling_for

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
    """See :func:`idavlm.ops.cross_attention.triton.operator.fused_cross_attention`."""
    num_rows = segments.num * segments.max_seqlen_q if shared_q else q.shape[0]
    heads, head_dim = q.shape[1:]
    out = q.new_empty((num_rows, heads, head_dim))
    sums = q.new_empty((num_rows, heads, num_groups), dtype=torch.float32)
    lse = q.new_empty((heads, num_rows), dtype=torch.float32)
    if out.numel() == 0:
        return out, sums, lse
    common = _shared_arguments(q, k, v, key_bias, key_groups, segments, num_rows, num_groups, shared_q, scale)
    tiling = tiling_for(common["q"], common["k"], common["v"], out)
    warp_specialized = tiling.fwd_warp_specialized is not None and _can_specialize(common)
    tile = tiling.fwd_warp_specialized if warp_specialized else tiling.fwd
    blocks = triton.cdiv(segments.max_seqlen_q, tile.block_q)
    common |= {"out": out, "sums": sums, "lse": lse, "num_blocks": blocks}
    grid = _grid(tile, q, segments.num * blocks, heads, warp_specialized)
    _launch(fwd, tile, grid, common, warp_specialized)
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
    """See :func:`idavlm.ops.cross_attention.triton.operator.fused_cross_attention_backward`."""
    num_rows, heads, head_dim = out.shape
    num_groups = 0 if grad_sums is None else sums.shape[-1]
    grad_sums = sums if grad_sums is None else grad_sums
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    grad_k, grad_v, delta = k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)
    common = _shared_arguments(q, k, v, key_bias, key_groups, segments, num_rows, num_groups, shared_q, scale)
    tiling = tiling_for(common["q"], common["k"], common["v"], grad_out)
    fuse_dq = tiling.fuse_dq and not torch.are_deterministic_algorithms_enabled()
    grad_q = q.new_zeros(q.shape, dtype=torch.float32) if fuse_dq else None
    if num_rows:
        with _device_context(q):
            bwd_delta[triton.cdiv(num_rows, DELTA_ROWS), heads](
                out, grad_out, sums, grad_sums, delta, heads, num_rows, num_groups,
                GROUPS=common["GROUPS"], HEAD_DIM=head_dim, BLOCK_D=common["BLOCK_D"], BLOCK_Q=DELTA_ROWS,
            )  # fmt: skip
    common |= {"grad_out": grad_out, "grad_sums": grad_sums, "lse": lse, "delta": delta}
    outputs = {"grad_q": grad_q if fuse_dq else q, "grad_k": grad_k, "grad_v": grad_v, "FUSE_DQ": fuse_dq}
    passes = [(tiling.bwd_dkdv, {"COMPUTE_DK": True, "COMPUTE_DV": tiling.bwd_dv is None})]
    passes += [] if tiling.bwd_dv is None else [(tiling.bwd_dv, {"COMPUTE_DK": False, "COMPUTE_DV": True})]
    for tile, gradients in passes:
        blocks = triton.cdiv(segments.max_seqlen_k, tile.block_k)
        grid = _grid(tile, q, segments.num * blocks, heads)
        _launch(bwd_dkdv, tile, grid, common | outputs | gradients | {"num_blocks": blocks})
    if fuse_dq:
        return grad_q.to(q.dtype), grad_k, grad_v
    tile = tiling.bwd_dq_shared if shared_q else tiling.bwd_dq
    blocks = triton.cdiv(segments.max_seqlen_q, tile.block_q)
    if shared_q:
        parts = _num_parts(q, segments.num, blocks * heads)
        grad_q, grid = q.new_empty((parts, *q.shape), dtype=torch.float32), (parts * blocks, heads)
    else:
        grad_q, grid = q.new_empty(q.shape), _grid(tile, q, segments.num * blocks, heads)
    _launch(bwd_dq, tile, grid, common | {"grad_q": grad_q, "num_blocks": blocks})
    return grad_q.sum(0).to(q.dtype) if shared_q else grad_q, grad_k, grad_v


def _shared_arguments(
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
    """Arguments that all kernels take, by name.

    ``q`` is passed in place of optional tensors that are None; a flag tells the kernel not to read them.
    """
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
        "num_segments": segments.num,
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


def _can_specialize(common: dict[str, object]) -> bool:
    """Whether Triton can compile the forward kernel with load-only warps (as of Triton 3.7.1, ``docs/kernels.md``)."""
    heads_adjacent = all(x.stride(1) * x.shape[1] <= x.stride(0) for x in (common["q"], common["k"], common["v"]))
    return (
        heads_adjacent and common["HEAD_DIM"] == common["BLOCK_D"] and not common["HAS_BIAS"] and not common["GROUPS"]
    )


def _launch(
    kernel, tile: Tile, grid: tuple[int, ...], arguments: dict[str, object], warp_specialized: bool = False
) -> None:
    q = arguments["q"]
    options = compiler_options(tile, q.element_size())
    dimensions = (2 if warp_specialized else 4) if tile.tma else 0
    arguments = arguments | {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "TMA": dimensions} | options
    context = copy_context()
    if tile.tma and q.is_cuda:
        # Triton allocates memory for descriptors. A separate context leaves the allocator of the caller in place.
        context.run(triton.set_allocator, lambda size, alignment, stream: q.new_empty(size, dtype=torch.int8))
    with _device_context(q):
        context.run(kernel[grid], **arguments)


def _grid(tile: Tile, q: Tensor, blocks: int, heads: int, warp_specialized: bool = False) -> tuple[int, ...]:
    """One program per block and head; with ``tma`` as many programs as the GPU runs at the same time.

    A multiprocessor runs one program of 8 warps or one with load-only warps, or several with fewer warps.
    """
    if not tile.tma:
        return blocks, heads
    resident = 1 if warp_specialized else max(1, 8 // tile.num_warps)
    return (min(_multiprocessors(q) * resident, blocks * heads),)


def _num_parts(q: Tensor, num_segments: int, programs: int) -> int:
    """Number of partial sums of the gradient of shared queries, for about two programs per multiprocessor."""
    return min(num_segments, 2 if INTERPRETED else triton.cdiv(2 * _multiprocessors(q), programs))


def _multiprocessors(q: Tensor) -> int:
    return 3 if INTERPRETED else torch.cuda.get_device_properties(q.device).multi_processor_count


def _device_context(q: Tensor):
    return torch.cuda.device(q.device if q.is_cuda else -1)
