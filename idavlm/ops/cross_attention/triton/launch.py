"""Launches of the kernels: tensors become the arguments of a kernel, and a grid is chosen."""

from contextvars import copy_context

import torch
import triton
from torch import Tensor

from idavlm.ops.cross_attention.segments import Segments
from idavlm.ops.cross_attention.triton.device_functions import INTERPRETED, Inputs, KernelOptions, Rows
from idavlm.ops.cross_attention.triton.tiling import Tile, compiler_options


def kernel_inputs(
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
) -> tuple[Inputs, KernelOptions]:
    """Inputs and options that all kernels take.

    ``q`` is passed in place of optional tensors that are None; an option tells the kernel not to read them.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    heads, head_dim = q.shape[1:]
    inputs = Inputs(
        q=Rows(q, q.stride(0), q.stride(1)),
        k=Rows(k, k.stride(0), k.stride(1)),
        v=Rows(v, v.stride(0), v.stride(1)),
        key_bias=q if key_bias is None else key_bias.contiguous(),
        key_groups=q if key_groups is None else key_groups,
        cu_seqlens_q=q if segments.cu_seqlens_q is None else segments.cu_seqlens_q,
        cu_seqlens_k=q if segments.cu_seqlens_k is None else segments.cu_seqlens_k,
        scale=scale,
        num_heads=heads,
        num_rows=num_rows,
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
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )
    return inputs, options


def can_specialize_warps(inputs: Inputs, options: KernelOptions) -> bool:
    """Whether Triton can compile the forward kernel with load-only warps (as of Triton 3.7.1, ``docs/kernels.md``)."""
    heads_adjacent = all(x.head_stride * inputs.num_heads <= x.stride for x in (inputs.q, inputs.k, inputs.v))
    return heads_adjacent and options.HEAD_DIM == options.BLOCK_D and not options.HAS_BIAS and not options.GROUPS


def launch_kernel(
    kernel,
    tile: Tile,
    grid: tuple[int, ...],
    inputs: Inputs,
    *arguments: object,
    options: KernelOptions,
    warp_specialized: bool = False,
) -> None:
    """Run ``kernel(inputs, *arguments, options)`` with the tile."""
    q = inputs.q.data
    dimensions = (2 if warp_specialized else 4) if tile.tma else 0
    options = options._replace(BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, TMA=dimensions)
    context = copy_context()
    if tile.tma and q.is_cuda:
        # Triton allocates memory for descriptors. A separate context leaves the allocator of the caller in place.
        context.run(triton.set_allocator, lambda size, alignment, stream: q.new_empty(size, dtype=torch.int8))
    with device_context(q):
        context.run(kernel[grid], inputs, *arguments, options, **compiler_options(tile, q.element_size()))


def grid_of(tile: Tile, q: Tensor, blocks: int, heads: int, warp_specialized: bool = False) -> tuple[int, ...]:
    """One program per block and head; with ``tma`` as many programs as the GPU runs at the same time.

    A multiprocessor runs one program of 8 warps or one with load-only warps, or several with fewer warps.
    """
    if not tile.tma:
        return blocks, heads
    resident = 1 if warp_specialized else max(1, 8 // tile.num_warps)
    return (min(_multiprocessors(q) * resident, blocks * heads),)


def num_parts(q: Tensor, num_segments: int, programs: int) -> int:
    """Number of partial sums of the gradient of shared queries, for about two programs per multiprocessor."""
    return min(num_segments, 2 if INTERPRETED else triton.cdiv(2 * _multiprocessors(q), programs))


def _multiprocessors(q: Tensor) -> int:
    return 3 if INTERPRETED else torch.cuda.get_device_properties(q.device).multi_processor_count


def device_context(q: Tensor):
    """Context that makes the GPU of ``q`` current."""
    return torch.cuda.device(q.device if q.is_cuda else -1)
