"""The public function: it checks the arguments, unifies the layouts and calls the selected backend."""

from itertools import pairwise

import torch
from torch import Tensor

from idavlm.ops.cross_attention.eager import eager_cross_attention
from idavlm.ops.cross_attention.flash import flash_cross_attention
from idavlm.ops.cross_attention.sdpa import sdpa_cross_attention
from idavlm.ops.cross_attention.segments import Options, Segments
from idavlm.ops.cross_attention.triton_backend import triton_cross_attention
from idavlm.utils import check_choice, check_positive, outside_compile

_IMPLEMENTATIONS = {
    "eager": eager_cross_attention,
    "sdpa": sdpa_cross_attention,
    "triton": triton_cross_attention,
    "flash_attention_2": flash_cross_attention,
}

ATTN_IMPLEMENTATIONS = tuple(_IMPLEMENTATIONS)
"""Values of ``attn_implementation``."""


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    attn_implementation: str = "sdpa",
    output_attentions: bool = False,
    key_groups: Tensor | None = None,
    num_key_groups: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head cross-attention ``softmax(scale * q k^T) v`` over N independent segments, dense or ragged.

    Keys and values are dense, or packed with ``cu_seqlens_k``. Queries are dense, packed with ``cu_seqlens_q``, or
    shared: all segments use the same queries, which are stored once. Their gradient is summed over the segments. All
    combinations are allowed.

    Args:
        q: ``[N, Lq, H, D]`` dense; ``[Tq, H, D]`` packed (with ``cu_seqlens_q``); ``[Lq, H, D]`` shared.
        k: ``[N, Lk, H, D]`` dense, or ``[Tk, H, D]`` packed (with ``cu_seqlens_k``).
        v: same shape as ``k``.
        key_bias: ``[L, H, D]`` added to the keys by their position in their segment, for example projected positions
            of patches. Positions are taken modulo L, so a segment of several images repeats it for every image.
        cu_seqlens_q: ``[N + 1]`` integers from 0 to Tq: segment n holds tokens ``cu_seqlens_q[n]`` up to
            ``cu_seqlens_q[n + 1]``, as in flash-attn. Segments may be empty. int32 or int64, on the device of ``q``, or
            on the CPU: then its values are checked, and a copy is made for the device.
        cu_seqlens_k: the same for keys. The output for queries of a segment without keys is zero.
        max_seqlen_q: length of the longest segment of queries; by default read from ``cu_seqlens_q``, which is a host
            sync on CUDA. A value that is too small is an error. On CUDA it is a device-side assertion, which needs no
            sync and stops the process. Under ``torch.compile`` the values of ``cu_seqlens_q`` are not checked.
        max_seqlen_k: the same for keys.
        scale: factor on the scores; by default ``D ** -0.5``.
        attn_implementation: ``"sdpa"``; ``"eager"``, the float32 reference; ``"triton"``, this library's kernels
            (``docs/kernels.md``); ``"flash_attention_2"``, the package flash-attn. The last two need a CUDA GPU.
        output_attentions: also return the attention weights.
        key_groups: integers with the shape ``k.shape[:-2]``, the group of each key. The returned weights are then
            summed over the keys of each group, for example over the references of one identity. Keys of group -1 are
            in no sum. ``"triton"`` computes the sums in the forward kernel, without a matrix of weights.
        num_key_groups: G, the number of groups; required with ``key_groups``.

    Returns:
        Output: ``[N, Lq, H, D]`` for dense and shared queries, ``[Tq, H, D]`` for packed ones. With
        ``output_attentions``, a pair of the output and the weights in float32: ``[N, H, max_seqlen_q, max_seqlen_k]``,
        zero for padding, or with ``key_groups`` ``[N, Lq, H, G]`` or ``[Tq, H, G]``. Both are differentiable.

    Raises:
        ValueError: shapes or segments that do not fit, or inputs that the backend does not support.
        ImportError: the package of the backend is not installed.
    """
    check_choice("attn_implementation", attn_implementation, ATTN_IMPLEMENTATIONS)
    _check_shapes(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _check_keys(k, key_bias, key_groups, num_key_groups)
    num_segments = k.shape[0] if cu_seqlens_k is None else cu_seqlens_k.numel() - 1
    shared = q.dim() == 3 and cu_seqlens_q is None
    num_query_segments = num_segments if shared else len(q) if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    if num_query_segments != num_segments:
        raise ValueError(
            f"q has {num_query_segments} segments, but k and v have {num_segments}; pass one segment of queries per "
            "segment of keys, or [Lq, H, D] queries without cu_seqlens_q to share them."
        )
    max_seqlen_q = len(q) if shared else _longest_segment("q", q, cu_seqlens_q, max_seqlen_q)
    max_seqlen_k = _longest_segment("k", k, cu_seqlens_k, max_seqlen_k)
    # Backends get cu_seqlens only where segments differ in length. A graph is compiled once for both.
    compiling = torch.compiler.is_compiling()
    equal_q = cu_seqlens_q is not None and not compiling and 0 < num_segments * max_seqlen_q == len(q)
    equal_k = cu_seqlens_k is not None and not compiling and 0 < num_segments * max_seqlen_k == len(k)
    if equal_q:
        q, cu_seqlens_q = q.unflatten(0, (num_segments, max_seqlen_q)), None
    if equal_k:
        k, v = (x.unflatten(0, (num_segments, max_seqlen_k)) for x in (k, v))
        cu_seqlens_k = None
        if key_groups is not None:
            key_groups = key_groups.unflatten(0, (num_segments, max_seqlen_k))
    cu_seqlens_q, cu_seqlens_k = (x if x is None else x.to(q.device) for x in (cu_seqlens_q, cu_seqlens_k))
    num_key_groups = num_key_groups or 0
    if num_segments == 0:
        output, attentions = _no_segments(q, k, v, key_bias, max_seqlen_q, max_seqlen_k, num_key_groups)
    else:
        segments = Segments(num_segments, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        options = Options(scale, key_bias, key_groups, num_key_groups, output_attentions)
        output, attentions = _IMPLEMENTATIONS[attn_implementation](q, k, v, segments, options)
    if equal_q:
        output = output.flatten(0, 1)
        if key_groups is not None and output_attentions:
            attentions = attentions.flatten(0, 1)
    return (output, attentions) if output_attentions else output


def _no_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_groups: int,
) -> tuple[Tensor, Tensor]:
    """Outputs for zero segments: empty, with a gradient to ``q``, ``k``, ``v`` and ``key_bias``."""
    if q.dim() == 3 and len(q):  # shared queries, of which there are zero copies
        q = q.expand(0, -1, -1, -1)
    if key_bias is not None:
        k = k + key_bias[:1].sum()
    shape = (*q.shape[:-1], num_groups) if num_groups else (0, q.shape[-2], max_seqlen_q, max_seqlen_k)
    weights = q.new_zeros(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return q + k.sum() + v.sum(), weights + (q.sum() + k.sum()).to(weights.dtype)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    dims_q, dims_k = (3, 4) if cu_seqlens_q is None else (3,), (4,) if cu_seqlens_k is None else (3,)
    if q.dim() not in dims_q:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [Tq, H, D] with cu_seqlens_q, [N, Lq, H, D] or "
                         "[Lq, H, D] without.")  # fmt: skip
    if k.dim() not in dims_k:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected [Tk, H, D] with cu_seqlens_k, [N, Lk, H, D] without.")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}, but k has {tuple(k.shape)}; they must be equal.")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens is None:
            continue
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; expected [N + 1] integers, "
                "int32 or int64."
            )
        if cu_seqlens.device not in (q.device, torch.device("cpu")):
            raise ValueError(f"{name} is on {cu_seqlens.device}, but q is on {q.device}; move it there, or to the CPU.")
    if q.shape[-2:] != k.shape[-2:]:
        raise ValueError(f"q has [H, D] = {list(q.shape[-2:])}, but k has {list(k.shape[-2:])}; they must be equal.")


def _check_keys(k: Tensor, key_bias: Tensor | None, key_groups: Tensor | None, num_groups: int | None) -> None:
    if key_bias is not None and (key_bias.dim() != 3 or key_bias.shape[1:] != k.shape[-2:] or not len(key_bias)):
        raise ValueError(
            f"key_bias has shape {tuple(key_bias.shape)}; expected [L, H, D] with L >= 1 and [H, D] = "
            f"{list(k.shape[-2:])}, as k has."
        )
    if (key_groups is None) != (num_groups is None):
        raise ValueError(
            f"key_groups is {'' if key_groups is None else 'not '}None, but num_key_groups={num_groups}; pass both or "
            "neither."
        )
    check_positive(num_key_groups=num_groups)
    if key_groups is not None and (key_groups.shape != k.shape[:-2] or key_groups.is_floating_point()):
        raise ValueError(
            f"key_groups has shape {tuple(key_groups.shape)} and dtype {key_groups.dtype}; expected integers "
            f"{list(k.shape[:-2])}, one per key."
        )
    for name, x in (("key_bias", key_bias), ("key_groups", key_groups)):
        if x is not None and x.device != k.device:
            raise ValueError(f"{name} is on {x.device}, but k is on {k.device}; move it there.")


def _longest_segment(name: str, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    """Check ``cu_seqlens_{name}`` and ``max_seqlen_{name}`` of ``x``; return the length of the longest segment."""
    if cu_seqlens is None:
        return x.shape[1]
    if max_seqlen is not None and torch.compiler.is_compiling():
        return max_seqlen  # values of tensors are not known in a graph
    if max_seqlen is None or cu_seqlens.device.type == "cpu":
        return _read_longest_segment(name, cu_seqlens, len(x), max_seqlen)
    lengths = cu_seqlens.diff()
    torch._assert_async(
        ((lengths >= 0) & (lengths <= max_seqlen)).all() & (cu_seqlens[-1] <= len(x)),
        f"cu_seqlens_{name} decreases, exceeds the {len(x)} packed tokens, or has a segment longer than "
        f"max_seqlen_{name}={max_seqlen}; pass the length of the longest segment, or None.",
    )
    return max_seqlen


@outside_compile
def _read_longest_segment(name: str, cu_seqlens: Tensor, num_tokens: int, max_seqlen: int | None) -> int:
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != num_tokens or values != sorted(values):
        raise ValueError(
            f"cu_seqlens_{name}={values} must increase from 0 to the number of packed tokens, {num_tokens}."
        )
    longest = max((end - start for start, end in pairwise(values)), default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"max_seqlen_{name}={max_seqlen}, but a segment has {longest} tokens; pass the length of the longest "
            "segment, or None."
        )
    return longest if max_seqlen is None else max_seqlen
