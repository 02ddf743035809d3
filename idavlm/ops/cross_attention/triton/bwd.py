"""The backward kernels. Attention weights are recomputed from ``lse``.

``bwd_delta`` computes a term that the others subtract. ``bwd_dkdv`` computes the gradients of keys and values. There
are two ways to compute the gradient of the queries:

- ``FUSE_DQ``: ``bwd_dkdv`` accumulates it with atomic additions. The backward pass takes five products in total.
- otherwise ``bwd_dq`` or ``bwd_dq_shared`` accumulates it in registers in a fixed order. The backward pass takes seven
  products in total.
"""

import triton
import triton.language as tl

from idavlm.ops.cross_attention.triton import device_functions as device


@triton.jit
def bwd_delta(args, OPTIONS: tl.constexpr):
    """Compute ``delta``. Grid: blocks of queries of all segments, heads.

    It equals ``sum(out * grad_out)`` plus ``sum(sums * grad_sums)``, so the weights themselves are not needed.
    """
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * OPTIONS.BLOCK_Q
    rows = tl.arange(0, OPTIONS.BLOCK_Q)
    block = device.Segment(first, first, args.num_rows - first, first, 0)
    out = device.contiguous(args.out, OPTIONS.HEAD_DIM, args)
    outputs = device.load_rows(out, first, head, rows, block.rows_q, OPTIONS)
    do = device.load_grad_out(block, head, rows, args, OPTIONS)
    mean = tl.sum(outputs.to(tl.float32) * do.to(tl.float32), 1)
    if OPTIONS.GROUPS:
        sums = device.load_sums(args.sums, block, head, rows, args, OPTIONS)
        mean += tl.sum(sums * device.load_sums(args.grad_sums, block, head, rows, args, OPTIONS), 1)
    tl.store(device.per_query(args.delta, block, head, rows, args), mean, mask=rows < block.rows_q)


@triton.jit
def bwd_dkdv(args, OPTIONS: tl.constexpr):
    """Compute ``grad_k`` and ``grad_v``, and add to ``grad_q`` with ``FUSE_DQ``. Grid: blocks of keys, heads.

    Tiles of weights are ``[keys, queries]``, so that neither gradient needs them transposed.
    """
    segment, head, start = device.block_of_program(OPTIONS.BLOCK_K, args, OPTIONS)
    if start >= segment.rows_k:
        return
    columns = start + tl.arange(0, OPTIONS.BLOCK_K)
    is_key = columns[:, None] < segment.rows_k
    keys = device.load_keys(segment, head, columns, args, OPTIONS)
    values = device.load_values(segment, head, columns, args, OPTIONS)
    if OPTIONS.GROUPS:
        one_hot = device.one_hot_groups(segment, columns, tl.float32, args, OPTIONS)
    dk = tl.full([OPTIONS.BLOCK_K, OPTIONS.BLOCK_D], 0.0, tl.float32)
    dv = tl.full([OPTIONS.BLOCK_K, OPTIONS.BLOCK_D], 0.0, tl.float32)
    grad_q = device.contiguous(args.grad_q, OPTIONS.HEAD_DIM, args)
    for start_q in range(0, segment.rows_q, OPTIONS.BLOCK_Q):
        rows = start_q + tl.arange(0, OPTIONS.BLOCK_Q)
        queries = device.load_queries(segment, head, rows, args, OPTIONS)
        # Infinity for rows past the end makes their weights zero.
        lse = device.load_per_query(args.lse, segment, head, rows, float("inf"), args)
        weights = device.recompute_weights(keys, queries, lse[None, :], is_key, args, OPTIONS)
        do = device.load_grad_out(segment, head, rows, args, OPTIONS)
        dv += device.dot(device.cast(weights, do.dtype), do, OPTIONS)
        grad_weights = device.dot(values, tl.trans(do), OPTIONS)
        if OPTIONS.GROUPS:
            grad_sums = device.load_sums(args.grad_sums, segment, head, rows, args, OPTIONS)
            grad_weights += device.dot(one_hot, tl.trans(grad_sums), OPTIONS)
        delta = device.load_per_query(args.delta, segment, head, rows, 0.0, args)
        grad_scores = device.cast(weights * (grad_weights - delta[None, :]), keys.dtype)
        dk += device.dot(grad_scores, queries, OPTIONS)
        if OPTIONS.FUSE_DQ:
            dq = device.dot(tl.trans(grad_scores), keys, OPTIONS) * args.scale
            pointers = device.elements(grad_q, segment.source_q, head, rows, OPTIONS)
            tl.atomic_add(pointers, dq, mask=device.exist(rows, segment.rows_q, OPTIONS), sem="relaxed")

    grad_k = device.contiguous(args.grad_k, OPTIONS.HEAD_DIM, args)
    grad_v = device.contiguous(args.grad_v, OPTIONS.HEAD_DIM, args)
    device.store_rows(grad_k, segment.first_k, head, columns, segment.rows_k, dk * args.scale, OPTIONS)
    device.store_rows(grad_v, segment.first_k, head, columns, segment.rows_k, dv, OPTIONS)


@triton.jit
def bwd_dq(args, OPTIONS: tl.constexpr):
    """Compute ``grad_q`` of queries that belong to one segment. Grid: blocks of queries, heads."""
    segment, head, start = device.block_of_program(OPTIONS.BLOCK_Q, args, OPTIONS)
    if start >= segment.rows_q:
        return
    rows = start + tl.arange(0, OPTIONS.BLOCK_Q)
    queries = device.load_queries(segment, head, rows, args, OPTIONS)
    dq = tl.full([OPTIONS.BLOCK_Q, OPTIONS.BLOCK_D], 0.0, tl.float32)
    dq = _accumulate_dq(dq, queries, segment, head, rows, args, OPTIONS)
    grad_q = device.contiguous(args.grad_q, OPTIONS.HEAD_DIM, args)
    device.store_rows(grad_q, segment.first_q, head, rows, segment.rows_q, dq * args.scale, OPTIONS)


@triton.jit
def bwd_dq_shared(args, OPTIONS: tl.constexpr):
    """Compute partial sums of ``grad_q`` of queries that all segments share. Grid: parts * blocks of queries, heads.

    A program keeps one block of queries, loops over every ``num_parts``-th segment and writes its partial sum.
    """
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0) // args.num_blocks
    num_parts = tl.num_programs(0) // args.num_blocks
    rows = (tl.program_id(0) % args.num_blocks) * OPTIONS.BLOCK_Q + tl.arange(0, OPTIONS.BLOCK_Q)
    queries = device.load_rows(args.q, 0, head, rows, args.length_q, OPTIONS)
    dq = tl.full([OPTIONS.BLOCK_Q, OPTIONS.BLOCK_D], 0.0, tl.float32)
    # Without disable_licm, LLVM hoists so much out of this loop that registers spill.
    for number in tl.range(part, args.num_segments, num_parts, disable_licm=True):
        segment = device.load_segment(number, args, OPTIONS)
        dq = _accumulate_dq(dq, queries, segment, head, rows, args, OPTIONS)
    grad_q = device.contiguous(args.grad_q, OPTIONS.HEAD_DIM, args)
    first = part.to(tl.int64) * args.length_q
    device.store_rows(grad_q, first, head, rows, args.length_q, dq * args.scale, OPTIONS)


@device.device_function
def _accumulate_dq(dq, queries, segment, head, rows, args, OPTIONS: tl.constexpr):
    """Add the gradient of a block of queries over all keys of one segment to ``dq``, without the factor ``scale``."""
    lse = device.load_per_query(args.lse, segment, head, rows, float("inf"), args)
    delta = device.load_per_query(args.delta, segment, head, rows, 0.0, args)
    do = device.load_grad_out(segment, head, rows, args, OPTIONS)
    if OPTIONS.GROUPS:
        grad_sums = device.load_sums(args.grad_sums, segment, head, rows, args, OPTIONS)
    for start_k in range(0, segment.rows_k, OPTIONS.BLOCK_K):
        columns = start_k + tl.arange(0, OPTIONS.BLOCK_K)
        is_key = columns[None, :] < segment.rows_k
        keys = device.load_keys(segment, head, columns, args, OPTIONS)
        # Loaded before the products so that one barrier serves both. With a second barrier, float32 would have to
        # keep an operand in registers across it.
        values = device.load_values(segment, head, columns, args, OPTIONS)
        weights = device.recompute_weights(queries, keys, lse[:, None], is_key, args, OPTIONS)
        grad_weights = device.dot(do, tl.trans(values), OPTIONS)
        if OPTIONS.GROUPS:
            one_hot = device.one_hot_groups(segment, columns, tl.float32, args, OPTIONS)
            grad_weights += device.dot(grad_sums, tl.trans(one_hot), OPTIONS)
        grad_scores = device.cast(weights * (grad_weights - delta[:, None]), keys.dtype)
        dq += device.dot(grad_scores, keys, OPTIONS)
    return dq
