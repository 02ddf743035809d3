"""From tensors to launches: what is allocated, the grids, and the arguments all kernels share."""

from contextvars import copy_context

import torch
import triton
from torch import Tensor

from idavlm.ops.cross_attention.segments import Segments
from idavlm.ops.cross_attention.triton.backward_delta import attend_backward_delta
from idavlm.ops.cross_attention.triton.backward_keys import attend_backward_keys
from idavlm.ops.cross_attention.triton.backward_queries import attend_backward_queries
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
    tiling = tiling_for(common["q"], common["k"], common["v"], out)
    specialised = tiling.specialised is not None and _specialisable(common)
    tile = tiling.specialised if specialised else tiling.forward
    blocks = triton.cdiv(segments.max_seqlen_q, tile.block_q)
    common |= {"out": out, "sums": sums, "lse": lse, "num_blocks": blocks}
    grid = _grid(tile, q, segments.num * blocks, heads, specialised)
    _launch(attend_forward, tile, grid, common, specialised)
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
    tiling = tiling_for(common["q"], common["k"], common["v"], grad_out)
    joined = tiling.joined and not torch.are_deterministic_algorithms_enabled()
    grad_q = q.new_zeros(q.shape, dtype=torch.float32) if joined else None
    if num_rows:
        with _device_of(q):
            attend_backward_delta[triton.cdiv(num_rows, DELTA_ROWS), heads](
                out, grad_out, sums, grad_sums, delta, heads, num_rows, num_groups,
                GROUPS=common["GROUPS"], HEAD_DIM=head_dim, BLOCK_D=common["BLOCK_D"], BLOCK_Q=DELTA_ROWS,
            )  # fmt: skip
    common |= {"grad_out": grad_out, "grad_sums": grad_sums, "lse": lse, "delta": delta}
    keys = {"grad_q": grad_q if joined else q, "grad_k": grad_k, "grad_v": grad_v, "JOINED": joined}
    passes = [(tiling.keys, {"KEYS": True, "VALUES": tiling.values is None})]
    passes += [] if tiling.values is None else [(tiling.values, {"KEYS": False, "VALUES": True})]
    for tile, wanted in passes:
        blocks = triton.cdiv(segments.max_seqlen_k, tile.block_k)
        grid = _grid(tile, q, segments.num * blocks, heads)
        _launch(attend_backward_keys, tile, grid, common | keys | wanted | {"num_blocks": blocks})
    if joined:
        return grad_q.to(q.dtype), grad_k, grad_v
    tile = tiling.shared if shared_q else tiling.queries
    blocks = triton.cdiv(segments.max_seqlen_q, tile.block_q)
    if shared_q:
        parts = _parts(q, segments.num, blocks * heads)
        grad_q, grid = q.new_empty((parts, *q.shape), dtype=torch.float32), (parts * blocks, heads)
    else:
        grad_q, grid = q.new_empty(q.shape), _grid(tile, q, segments.num * blocks, heads)
    _launch(attend_backward_queries, tile, grid, common | {"grad_q": grad_q, "num_blocks": blocks})
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


def _specialisable(common: dict[str, object]) -> bool:
    """Whether Triton can give the forward kernel warps that only load (3.7.1 as compiled, see ``docs/kernels.md``)."""
    beside = all(x.stride(1) * x.shape[1] <= x.stride(0) for x in (common["q"], common["k"], common["v"]))
    return beside and common["HEAD_DIM"] == common["BLOCK_D"] and not common["HAS_BIAS"] and not common["GROUPS"]


def _launch(kernel, tile: Tile, grid: tuple[int, ...], arguments: dict[str, object], specialised: bool = False) -> None:
    q = arguments["q"]
    options = compiler_options(tile, q.element_size())
    dimensions = (2 if specialised else 4) if tile.tma else 0
    arguments = arguments | {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k, "TMA": dimensions} | options
    context = copy_context()
    if tile.tma and q.is_cuda:
        # Descriptors are written to memory. In a context of its own: who called may have an allocator of theirs.
        context.run(triton.set_allocator, lambda size, alignment, stream: q.new_empty(size, dtype=torch.int8))
    with _device_of(q):
        context.run(kernel[grid], **arguments)


def _grid(tile: Tile, q: Tensor, blocks: int, heads: int, specialised: bool = False) -> tuple[int, ...]:
    """A program for every block; with ``tma`` as many as a GPU holds at a time: one of 8 warps, or of special ones."""
    if not tile.tma:
        return blocks, heads
    held = 1 if specialised else max(1, 8 // tile.num_warps)
    return (min(_multiprocessors(q) * held, blocks * heads),)


def _parts(q: Tensor, num_segments: int, programs: int) -> int:
    """Over how many programs to spread the segments of shared queries: about two for each multiprocessor."""
    return min(num_segments, 2 if INTERPRETED else triton.cdiv(2 * _multiprocessors(q), programs))


def _multiprocessors(q: Tensor) -> int:
    return 3 if INTERPRETED else torch.cuda.get_device_properties(q.device).multi_processor_count


def _device_of(q: Tensor):
    return torch.cuda.device(q.device if q.is_cuda else -1)
