"""The backward kernel over blocks of keys: gradients of keys and values, optionally also of queries.

Attention weights are recomputed from ``lse``. Wide heads do not leave enough registers to accumulate both gradients.
The kernel then runs twice, once per gradient (``bwd_dkdv`` and ``bwd_dv`` in a tiling), which costs one more product.

There are two ways to compute the gradient of the queries. The tuner measures both:

- ``fuse_dq``: this kernel accumulates it with atomic additions. The backward pass takes five products in total.
- otherwise ``bwd_dq.py`` accumulates it in registers in a fixed order. The backward pass takes seven products in total.
"""

import triton
import triton.language as tl

from idavlm.ops.cross_attention.triton import device_functions as device


@triton.jit
def bwd_dkdv(inputs, backward, grad_q, grad_k, grad_v, OPTIONS: tl.constexpr):
    """Compute ``grad_k`` (``COMPUTE_DK``) and ``grad_v`` (``COMPUTE_DV``), and add to float32 ``grad_q`` (``FUSE_DQ``).

    Blocks are assigned to programs as in ``fwd.py``.
    """
    grad_out = device.contiguous_rows(backward.grad_out, inputs, OPTIONS)
    grad_k = device.contiguous_rows(grad_k, inputs, OPTIONS)
    grad_v = device.contiguous_rows(grad_v, inputs, OPTIONS)
    if OPTIONS.TMA:
        all_q = device.describe_queries(inputs.q, inputs, OPTIONS.SHARED_Q, OPTIONS)
        all_k = device.describe_keys(inputs.k, inputs, OPTIONS)
        all_v = device.describe_keys(inputs.v, inputs, OPTIONS)
        all_do = device.describe_queries(grad_out, inputs, False, OPTIONS)
        all_dk = device.describe_keys(grad_k, inputs, OPTIONS)
        all_dv = device.describe_keys(grad_v, inputs, OPTIONS)
        first_item, programs = tl.program_id(0), tl.num_programs(0)
        for number in tl.range(inputs.num_segments, disable_licm=True):
            segment = device.load_segment(number, inputs, OPTIONS)
            blocks = tl.cdiv(segment.rows_k, OPTIONS.BLOCK_K)
            items = blocks * inputs.num_heads
            if first_item < items:
                segment_q = device.segment_queries(inputs.q, all_q, segment, inputs, OPTIONS.SHARED_Q, OPTIONS)
                segment_k = device.segment_keys(inputs.k, all_k, segment, inputs, OPTIONS)
                segment_v = device.segment_keys(inputs.v, all_v, segment, inputs, OPTIONS)
                segment_do = device.segment_queries(grad_out, all_do, segment, inputs, False, OPTIONS)
                segment_dk = device.segment_keys(grad_k, all_dk, segment, inputs, OPTIONS)
                segment_dv = device.segment_keys(grad_v, all_dv, segment, inputs, OPTIONS)
                for item in tl.range(first_item, items, programs, disable_licm=True):
                    head, start = item // blocks, (item % blocks) * OPTIONS.BLOCK_K
                    _bwd_dkdv_block(
                        segment_q, segment_k, segment_v, segment_do, grad_q, segment_dk, segment_dv, segment, head,
                        start, inputs, backward, OPTIONS,
                    )  # fmt: skip
            first_item = device.next_first_item(first_item, items, programs)
    else:
        block, head = tl.program_id(0), tl.program_id(1)
        segment = device.load_segment(block // inputs.num_blocks, inputs, OPTIONS)
        start = (block % inputs.num_blocks) * OPTIONS.BLOCK_K
        if start >= segment.rows_k:
            return
        q = device.offset_rows(inputs.q, 0, head)
        if not OPTIONS.SHARED_Q:
            q = device.offset_rows(q, segment.first_q, 0)
        k = device.offset_rows(inputs.k, segment.first_k, head)
        v = device.offset_rows(inputs.v, segment.first_k, head)
        do = device.offset_rows(grad_out, segment.first_q, head)
        dk = device.offset_rows(grad_k, segment.first_k, head)
        dv = device.offset_rows(grad_v, segment.first_k, head)
        _bwd_dkdv_block(q, k, v, do, grad_q, dk, dv, segment, head, start, inputs, backward, OPTIONS)


@device.device_function
def _bwd_dkdv_block(
    q, k, v, grad_out, grad_q, grad_k, grad_v, segment, head, start_k, inputs, backward, OPTIONS: tl.constexpr
):
    """Tiles of weights are ``[keys, queries]``, so that neither gradient needs them transposed."""
    columns = start_k + tl.arange(0, OPTIONS.BLOCK_K)
    bias = inputs.key_bias + head * OPTIONS.HEAD_DIM
    index_q = 0 if OPTIONS.SHARED_Q else segment.index_q
    grad_q = device.contiguous_rows(grad_q, inputs, OPTIONS)
    if not OPTIONS.SHARED_Q:
        grad_q = device.offset_rows(grad_q, segment.first_q, 0)
    grad_q = device.offset_rows(grad_q, 0, head)
    grad_sums = backward.grad_sums + (segment.first_q * inputs.num_heads + head) * inputs.num_groups
    lse = backward.lse + (segment.first_q + head.to(tl.int64) * inputs.num_rows)
    delta = backward.delta + (segment.first_q + head.to(tl.int64) * inputs.num_rows)

    keys = device.read_keys(k, bias, segment, head, start_k, inputs, OPTIONS)
    if OPTIONS.COMPUTE_DK:
        values = device.read_rows(v, segment.index_k, head, start_k, segment.rows_k, OPTIONS.BLOCK_K, OPTIONS)
        if OPTIONS.GROUPS:
            one_hot = device.key_group_one_hot(segment, start_k, inputs, tl.float32, OPTIONS)
        dk = tl.full([OPTIONS.BLOCK_K, OPTIONS.BLOCK_D], 0.0, tl.float32)
    if OPTIONS.COMPUTE_DV:
        dv = tl.full([OPTIONS.BLOCK_K, OPTIONS.BLOCK_D], 0.0, tl.float32)
    for start in tl.range(0, segment.rows_q, OPTIONS.BLOCK_Q, disable_licm=OPTIONS.TMA):
        rows = start + tl.arange(0, OPTIONS.BLOCK_Q)
        queries = device.read_rows(q, index_q, head, start, segment.rows_q, OPTIONS.BLOCK_Q, OPTIONS)
        # Infinity for rows past the end makes their weights zero.
        lse_tile = tl.load(lse + rows, mask=rows < segment.rows_q, other=float("inf"))
        scores = device.dot(keys, tl.trans(queries), OPTIONS) * (inputs.scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(columns[:, None] < segment.rows_k, scores - lse_tile[None, :], float("-inf")))
        do = device.read_rows(grad_out, segment.index_q, head, start, segment.rows_q, OPTIONS.BLOCK_Q, OPTIONS)
        if OPTIONS.COMPUTE_DV:
            dv += device.dot(device.cast(weights, do.dtype), do, OPTIONS)
        if OPTIONS.COMPUTE_DK:
            grad_weights = device.dot(values, tl.trans(do), OPTIONS)
            if OPTIONS.GROUPS:
                pointers, mask = device.group_elements(
                    grad_sums, rows, segment.rows_q, inputs.num_heads, inputs.num_groups, OPTIONS.GROUPS
                )
                grad_weights += device.dot(one_hot, tl.trans(tl.load(pointers, mask=mask, other=0.0)), OPTIONS)
            delta_tile = tl.load(delta + rows, mask=rows < segment.rows_q, other=0.0)
            grad_scores = device.cast(weights * (grad_weights - delta_tile[None, :]), keys.dtype)
            dk += device.dot(grad_scores, queries, OPTIONS)
            if OPTIONS.FUSE_DQ:
                dq = device.dot(tl.trans(grad_scores), keys, OPTIONS) * inputs.scale
                mask = device.row_mask(rows, segment.rows_q, OPTIONS.HEAD_DIM, OPTIONS.BLOCK_D)
                pointers = device.row_pointers(grad_q.data, rows, grad_q.stride, OPTIONS.BLOCK_D)
                tl.atomic_add(pointers, dq, mask=mask, sem="relaxed")

    if OPTIONS.COMPUTE_DK:
        dk *= inputs.scale
        device.write_rows(grad_k, dk, segment.index_k, head, start_k, segment.rows_k, OPTIONS.BLOCK_K, OPTIONS)
    if OPTIONS.COMPUTE_DV:
        device.write_rows(grad_v, dv, segment.index_k, head, start_k, segment.rows_k, OPTIONS.BLOCK_K, OPTIONS)
