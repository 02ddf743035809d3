"""The preprocessing kernel of the backward pass. Both gradient kernels use its result."""

import triton
import triton.language as tl

from idavlm.ops.cross_attention.triton import device_functions as device


@triton.jit
def bwd_delta(
    out,
    grad_out,
    sums,
    grad_sums,
    delta,
    num_heads,
    num_rows,
    num_groups,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Compute ``delta``, the mean of each query's weight gradients under its weights.

    It equals ``sum(out * grad_out)`` plus ``sum(sums * grad_sums)``, so the weights themselves are not needed.
    """
    head = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_Q
    rows = tl.arange(0, BLOCK_Q)
    left = num_rows - first
    base = (first * num_heads + head) * HEAD_DIM
    mask = device.row_mask(rows, left, HEAD_DIM, BLOCK_D)
    outputs = tl.load(device.row_pointers(out + base, rows, num_heads * HEAD_DIM, BLOCK_D), mask=mask, other=0.0)
    grads = tl.load(device.row_pointers(grad_out + base, rows, num_heads * HEAD_DIM, BLOCK_D), mask=mask, other=0.0)
    mean = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    if GROUPS:
        base = (first * num_heads + head) * num_groups
        pointers, mask = device.group_elements(sums + base, rows, left, num_heads, num_groups, GROUPS)
        shares = tl.load(pointers, mask=mask, other=0.0)
        pointers, mask = device.group_elements(grad_sums + base, rows, left, num_heads, num_groups, GROUPS)
        mean += tl.sum(shares * tl.load(pointers, mask=mask, other=0.0), 1)
    tl.store(delta + head.to(tl.int64) * num_rows + first + rows, mean, mask=rows < left)
