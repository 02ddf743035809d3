"""``attn_implementation="triton"``: checks of the inputs and the call of this library's kernels."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from idavlm.ops.cross_attention.sdpa import attention_weights, cast_for_autocast
from idavlm.ops.cross_attention.segments import Options, Segments, add_key_bias, repeat_shared

MAX_HEAD_DIM = 256

GROUPS_PER_PASS = 32
"""Number of groups whose sums fit into registers beside the output. More groups are computed in several passes."""


def triton_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options
) -> tuple[Tensor, Tensor | None]:
    """One call for up to :data:`GROUPS_PER_PASS` groups. Shared queries are not repeated."""
    q, k, v, key_bias = cast_for_autocast(q, k, v, options.key_bias)
    _check(q, k, v, key_bias)
    from idavlm.ops.cross_attention.triton.operator import fused_cross_attention

    key_groups, num_groups = options.key_groups, options.num_key_groups
    shared = q.dim() == 3 and segments.cu_seqlens_q is None
    dense = segments.cu_seqlens_q is None
    packed_q = q if q.dim() == 3 else q.flatten(0, 1)
    packed_k, packed_v = (x.flatten(0, 1) if x.dim() == 4 else x for x in (k, v))
    with_sums = options.output_attentions and key_groups is not None
    outputs, sums = [], []
    for first in range(0, num_groups if with_sums else 1, GROUPS_PER_PASS):
        out, partial_sums, _ = fused_cross_attention(
            packed_q,
            packed_k,
            packed_v,
            key_bias,
            (key_groups.flatten() - first).int() if with_sums else None,
            segments.cu_seqlens_q,
            segments.cu_seqlens_k,
            segments.num,
            segments.max_seqlen_q,
            segments.max_seqlen_k,
            min(num_groups - first, GROUPS_PER_PASS) if with_sums else 0,
            shared,
            options.scale,
        )
        outputs.append(out)
        sums.append(partial_sums)
    shape = (segments.num, segments.max_seqlen_q)
    output, group_sums = outputs[0], sums[0] if len(sums) == 1 else torch.cat(sums, dim=-1)
    if dense:
        output, group_sums = output.unflatten(0, shape), group_sums.unflatten(0, shape)
    if not options.output_attentions:
        return output, None
    if with_sums:
        return output, group_sums
    k = add_key_bias(k, key_bias, segments)
    return output, attention_weights(repeat_shared(q, segments), k, segments, options)


def _check(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> None:
    if find_spec("triton") is None:
        raise ImportError(
            "attn_implementation='triton' needs the package triton; run pip install triton, or use "
            "attn_implementation='sdpa'."
        )
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"attn_implementation='triton' needs a CUDA GPU, but q is on {q.device}; use attn_implementation='sdpa'. "
            "To test the kernels without a GPU, set TRITON_INTERPRET=1 before Python starts (slow)."
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"q has dtype {q.dtype}; attn_implementation='triton' supports float32, float16 and bfloat16. Cast it, or "
            "use attn_implementation='sdpa'."
        )
    for name, x in (("k", k), ("v", v), ("key_bias", key_bias)):
        if x is not None and (x.dtype != q.dtype or x.device != q.device):
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}; with "
                "attn_implementation='triton' all must have the same dtype and device."
            )
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"q has head_dim {q.shape[-1]}; attn_implementation='triton' supports at most {MAX_HEAD_DIM}. Use more "
            "heads or attn_implementation='sdpa'."
        )
