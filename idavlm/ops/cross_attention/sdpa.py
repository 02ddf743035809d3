"""``attn_implementation="sdpa"``: ``torch.nn.functional.scaled_dot_product_attention``.

Dense input is one call. Ragged input is handled in one of two ways, both measured in ``benchmarks/cross_attention.py``.
On the CPU, segments with the same lengths share one call, so that no padding is computed. On other devices, and under
``torch.compile``, there is one padded call with a mask, which needs no host sync.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from idavlm.ops.cross_attention.segments import (
    Options,
    Segments,
    add_key_bias,
    group_sums,
    length_mask,
    pad_segments,
    repeat_shared,
    split_segments,
    unpad_segments,
)

_LONG = 256
"""Queries of a segment that is computed alone on the CPU."""


def sdpa_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options
) -> tuple[Tensor, Tensor | None]:
    """One call for dense input, else one call per length or one padded call."""
    q, k = repeat_shared(q, segments), add_key_bias(k, options.key_bias, segments)
    if segments.cu_seqlens_q is None and segments.cu_seqlens_k is None:
        output = _dense(q, k, v, scale=options.scale)
    elif q.device.type == "cpu" and not torch.compiler.is_compiling():
        output = _bucketed(q, k, v, segments, options.scale)
    else:
        output = _padded(q, k, v, segments, options.scale)
    return output, attention_weights(q, k, segments, options) if options.output_attentions else None


def attention_weights(q: Tensor, k: Tensor, segments: Segments, options: Options) -> Tensor:
    """Attention weights in float32, which fused kernels do not return, or their sums over groups of keys."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    num_queries = len(q)
    cu_seqlens_q, cu_seqlens_k = segments.cu_seqlens_q, segments.cu_seqlens_k
    with torch.autocast(q.device.type, enabled=False):
        q = pad_segments(q, cu_seqlens_q, segments.max_seqlen_q).to(dtype)
        k = pad_segments(k, cu_seqlens_k, segments.max_seqlen_k).to(dtype)
        scores = torch.einsum("nqhd,nkhd->nhqk", q * options.scale, k)
        if cu_seqlens_k is None:
            weights = scores.softmax(dim=-1)
        else:
            absent = ~length_mask(cu_seqlens_k, segments.max_seqlen_k)[:, None, None]
            lowest = torch.finfo(dtype).min
            weights = scores.masked_fill(absent, lowest).softmax(dim=-1).masked_fill(absent, 0)
        if cu_seqlens_q is not None:
            weights = weights * length_mask(cu_seqlens_q, segments.max_seqlen_q)[:, None, :, None]
    return weights if options.key_groups is None else group_sums(weights, num_queries, segments, options)


def cast_for_autocast(q: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast all tensors to the dtype of autocast where it is enabled, as torch does for its own attention."""
    device_type = q.device.type
    if not torch.is_autocast_enabled(device_type):
        return q, *others
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if x is None else x.to(dtype) for x in (q, *others))


def _dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """``[N, Lq, H, D]`` queries over ``[N, Lk, H, D]`` keys."""
    if k.shape[1] == 0 or q.numel() == 0:
        # SDPA kernels disagree on empty inputs. A sum over no keys is zero and still has a gradient to q, k and v.
        weights = torch.einsum("nqhd,nkhd->nhqk", q, k)
        return torch.einsum("nhqk,nkhd->nqhd", weights, v)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).transpose(1, 2)


def _bucketed(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    keys, values = (split_segments(x, segments.cu_seqlens_k) for x in (k, v))
    inputs = list(zip(split_segments(q, segments.cu_seqlens_q), keys, values, strict=True))
    buckets = defaultdict(list)
    for number, (queries, keys, _) in enumerate(inputs):
        # A long segment keeps all cores busy on its own, and is not copied.
        buckets[(len(queries), len(keys)) if len(queries) < _LONG else number].append(number)
    outputs = [q] * len(inputs)
    joined = None if torch.is_grad_enabled() else torch.empty_like(q, memory_format=torch.contiguous_format)
    if joined is not None:  # written in place, so that the outputs are not in memory twice
        outputs = list(split_segments(joined, segments.cu_seqlens_q))
    for numbers in buckets.values():
        batch = zip(*(inputs[number] for number in numbers), strict=True)
        output = _dense(*(x[0][None] if len(x) == 1 else torch.stack(x) for x in batch), scale=scale)
        for number, segment in zip(numbers, output.unbind(0), strict=True):
            if joined is None:
                outputs[number] = segment
            else:
                outputs[number].copy_(segment)
    if joined is not None:
        return joined
    return torch.stack(outputs) if segments.cu_seqlens_q is None else torch.cat(outputs)


def _padded(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    cu_seqlens_q, cu_seqlens_k = segments.cu_seqlens_q, segments.cu_seqlens_k
    # At least one key: a segment without keys attends to one zero vector, so its output and gradients are zero.
    max_seqlen_k = max(segments.max_seqlen_k, 1)
    mask = None
    if cu_seqlens_k is not None:
        mask = length_mask(cu_seqlens_k, max_seqlen_k)
        mask[:, 0] = True
        mask = mask[:, None, None]
    output = _dense(
        pad_segments(q, cu_seqlens_q, segments.max_seqlen_q),
        pad_segments(k, cu_seqlens_k, max_seqlen_k),
        pad_segments(v, cu_seqlens_k, max_seqlen_k),
        scale=scale,
        mask=mask,
    )
    return unpad_segments(output, cu_seqlens_q, q.shape[0])
