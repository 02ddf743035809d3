"""Tests of ragged cross-attention: values and gradients of every backend and layout against a simple loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idavlm import cross_attention
from idavlm.ops.cross_attention import interface
from idavlm.ops.cross_attention.segments import pad_segments, unpad_segments
from tests.conftest import use_padded_sdpa

IMPLEMENTATIONS = ("eager", "sdpa", "sdpa padded")


def run(implementation: str, *args, **kwargs):
    """``"sdpa padded"`` is the padded variant of ``"sdpa"``, which accelerators use, on the CPU."""
    if implementation != "sdpa padded":
        return cross_attention(*args, attn_implementation=implementation, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        use_padded_sdpa(patch)
        return cross_attention(*args, attn_implementation="sdpa", **kwargs)


def restated(queries, keys, values):
    """Textbook attention of one segment and head, ``[L, D]`` each."""
    weights = torch.exp(queries @ keys.T / keys.shape[-1] ** 0.5)
    return weights @ values / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def packed(lengths, heads, dim, dtype=torch.float64):
    x = torch.randn(sum(lengths), heads, dim, dtype=dtype, requires_grad=True)
    return x, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def restated_packed(q, k, v, lengths_q, lengths_k):
    rows = [
        torch.stack([restated(a[:, h], b[:, h], c[:, h]) for h in range(q.shape[1])], dim=1)
        for a, b, c in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 5, 32]),
)
def test_ragged_values_and_gradients(implementation, lengths, heads, dim):
    lengths_q, lengths_k = [q for q, _ in lengths], [k for _, k in lengths]
    (q, cu_q), (k, cu_k) = packed(lengths_q, heads, dim), packed(lengths_k, heads, dim)
    v = torch.randn_like(k, requires_grad=True)
    out = run(implementation, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    expected = restated_packed(q, k, v, lengths_q, lengths_k)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128, 256])
def test_head_dims_in_float32(implementation, head_dim):
    lengths_q, lengths_k = [33, 1, 17], [19, 64, 5]
    (q, cu_q), (k, cu_k) = (packed(lengths, 2, head_dim, torch.float32) for lengths in (lengths_q, lengths_k))
    out = run(implementation, q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    expected = restated_packed(q.double(), k.double(), k.double(), lengths_q, lengths_k)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shared_queries_equal_repeated_ones_and_sum_their_gradient(implementation):
    q = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    k, cu_k = packed([3, 0, 6], 2, 8)
    shared = run(implementation, q, k, k, cu_seqlens_k=cu_k)
    repeated = run(implementation, q.expand(3, -1, -1, -1), k, k, cu_seqlens_k=cu_k)
    assert shared.shape == (3, 5, 2, 8)
    torch.testing.assert_close(shared, repeated)
    weight = torch.randn_like(shared)
    (grad,) = torch.autograd.grad((shared * weight).sum(), q)
    each = q.detach().repeat(3, 1, 1, 1).requires_grad_()
    (grads,) = torch.autograd.grad((run(implementation, each, k, k, cu_seqlens_k=cu_k) * weight).sum(), each)
    torch.testing.assert_close(grad, grads.sum(0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dense_and_packed_layouts_mix(implementation):
    dense = torch.randn(3, 4, 2, 8, dtype=torch.float64)
    k, cu_k = packed([2, 5, 1], 2, 8)
    q, cu_q = packed([2, 0, 3], 2, 8)
    both_dense = run(implementation, dense, dense, dense)
    cu_dense = torch.arange(4, dtype=torch.int32) * 4
    flat = dense.flatten(0, 1)
    all_packed = run(implementation, flat, flat, flat, cu_seqlens_q=cu_dense, cu_seqlens_k=cu_dense)
    torch.testing.assert_close(both_dense.flatten(0, 1), all_packed)
    one = run(implementation, dense, k, k, cu_seqlens_k=cu_k)
    other = run(implementation, flat, k, k, cu_seqlens_q=cu_dense, cu_seqlens_k=cu_k)
    torch.testing.assert_close(one.flatten(0, 1), other)
    one = run(implementation, q, dense, dense, cu_seqlens_q=cu_q)
    other = run(implementation, q, flat, flat, cu_seqlens_q=cu_q, cu_seqlens_k=cu_dense)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_segment_without_keys_has_zero_output_and_gradients(implementation):
    (q, cu_q), (k, cu_k) = packed([4, 2], 1, 32), packed([0, 3], 1, 32)
    out = run(implementation, q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert not out[:4].any()
    grad_q, grad_k = torch.autograd.grad(out.sum(), (q, k))
    assert not grad_q[:4].any()
    assert grad_k.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([], []), ([0, 0], [3, 0]), ([3, 1], [0, 0])])
def test_empty_inputs_stay_in_the_graph(implementation, lengths_q, lengths_k):
    (q, cu_q), (k, cu_k) = packed(lengths_q, 2, 8), packed(lengths_k, 2, 8)
    v = torch.randn_like(k, requires_grad=True)
    out, weights = run(implementation, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, output_attentions=True)
    assert out.shape == q.shape
    assert weights.shape[:2] == (len(lengths_q), 2)
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_weights_are_the_ones_used(implementation):
    lengths_q, lengths_k = [2, 3, 1], [4, 0, 6]
    (q, cu_q), (k, cu_k) = packed(lengths_q, 2, 8), packed(lengths_k, 2, 8)
    segments = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    out, weights = run(implementation, q, k, k, **segments, output_attentions=True)
    assert weights.shape == (3, 2, 3, 6)
    torch.testing.assert_close(out, run(implementation, q, k, k, **segments), atol=0, rtol=0)
    values = pad_segments(k, cu_k, 6)
    again = unpad_segments(torch.einsum("nhqk,nkhd->nqhd", weights, values), cu_q, 6)
    torch.testing.assert_close(again, out)
    assert not weights[1].any()
    assert not weights[0, :, 2:].any()
    assert not weights[0, :, :, 4:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_float64(dtype):
    (q, cu_q), (k, cu_k) = packed([40, 7], 4, 64, dtype), packed([30, 9], 4, 64, dtype)
    expected = restated_packed(q.double(), k.double(), k.double(), [40, 7], [30, 9])
    for implementation in IMPLEMENTATIONS:
        out = run(implementation, q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        assert out.dtype == dtype
        assert (out.double() - expected).abs().max() < 4 * torch.finfo(dtype).eps


def test_autocast_keeps_the_reference_in_float32():
    q = torch.randn(1, 9, 2, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cross_attention(q, q, q, attn_implementation="eager")
    torch.testing.assert_close(inside, cross_attention(q, q, q, attn_implementation="eager"), atol=0, rtol=0)


X = torch.zeros(2, 3, 2, 8)
CU = torch.tensor([0, 2, 6])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X, X, X), {"attn_implementation": "flash"}, r"attn_implementation='flash' is .* 'sdpa', 'triton', 'flash_at"),
        ((X, X, X), {"key_bias": X}, r"key_bias has shape \(2, 3, 2, 8\); expected \[L, H, D\]"),
        ((X, X, X), {"key_groups": CU}, r"key_groups is not None, but num_key_groups=None; pass both"),
        ((X, X, X), {"num_key_groups": 2}, r"key_groups is None, but num_key_groups=2; pass both"),
        ((X, X, X), {"key_groups": CU, "num_key_groups": 2}, r"key_groups has shape \(3,\) .* \[2, 3\], one per key"),
        ((X, X, X), {"key_groups": X[..., 0, 0].int(), "num_key_groups": 0}, r"num_key_groups=0 must be"),
        ((X[0, 0], X, X), {}, r"q has shape \(2, 8\)"),
        ((X, X, X), {"cu_seqlens_q": CU}, r"q has shape \(2, 3, 2, 8\); expected \[Tq, H, D\]"),
        ((X, X[0], X[0]), {}, r"k has shape \(3, 2, 8\)"),
        ((X, X, X[:, :2]), {}, r"v has shape \(2, 2, 2, 8\), but k has \(2, 3, 2, 8\)"),
        ((X, X[..., :4], X[..., :4]), {}, r"q has \[H, D\] = \[2, 8\], but k has \[2, 4\]"),
        ((X[:1], X, X), {}, r"q has 1 segments, but k and v have 2"),
        (
            (X.flatten(0, 1), X, X),
            {"cu_seqlens_q": CU.float()},
            r"cu_seqlens_q has shape \(3,\) and dtype torch.float32",
        ),
        (
            (X.flatten(0, 1), X, X),
            {"cu_seqlens_q": CU.short()},
            r"dtype torch.int16; expected .* int32 or int64",
        ),
        (
            (X.flatten(0, 1), X, X),
            {"cu_seqlens_q": CU.to("meta")},
            r"cu_seqlens_q is on meta, but q is on cpu; move",
        ),
        ((X, X, X), {"key_bias": X[0].to("meta")}, r"key_bias is on meta, but k is on cpu; move it there"),
        (
            (X, X, X),
            {"key_groups": X[..., 0, 0].to("meta", torch.int32), "num_key_groups": 2},
            r"key_groups is on meta, but k is on cpu; move it there",
        ),
        ((X.flatten(0, 1), X, X), {"cu_seqlens_q": CU - 1}, r"cu_seqlens_q=\[-1, 1, 5\] must increase from 0 .* 6"),
        (
            (X.flatten(0, 1), X, X),
            {"cu_seqlens_q": CU, "max_seqlen_q": 3},
            r"max_seqlen_q=3, but a segment has 4 tokens",
        ),
        ((X.flatten(0, 1), X, X), {"cu_seqlens_q": CU[[0, 2, 1]]}, r"cu_seqlens_q=\[0, 6, 2\] must increase"),
    ],
)
def test_wrong_arguments_are_named(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cross_attention(*args, **kwargs)


class _OnDevice(torch.Tensor):
    """``cu_seqlens`` that look as if they were not on the CPU, whose values cannot be read without a sync."""

    @property
    def device(self):
        return torch.device("cuda")

    def tolist(self):
        raise AssertionError("read on the host")


@pytest.mark.parametrize(
    ("values", "max_seqlen", "error"),
    [([0, 2, 6], 4, None), ([0, 2, 5], 4, None), ([0, 2, 6], 3, "max_seqlen_k=3"), ([0, 4, 2], 4, "decreases"),
     ([0, 4, 8], 4, "exceeds the 6")],
)  # fmt: skip
def test_segments_on_a_gpu_are_checked_without_reading_them(values, max_seqlen, error):
    """The check is a device-side assertion, which a CPU raises at once."""
    cu_seqlens = torch.tensor(values).as_subclass(_OnDevice)

    def check():
        return interface._longest_segment("k", torch.zeros(6, 1, 8), cu_seqlens, max_seqlen)

    if error is None:
        assert check() == max_seqlen
    else:
        with pytest.raises(RuntimeError, match=error):
            check()
