"""Tests of the Triton kernels: interpreted on a CPU, compiled on a GPU.

Outputs are filled with NaN before a kernel runs, so every element must be written. Errors are measured against float64.
"""

import importlib
import sys
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from idavlm import CrossAttention, IDFormer, cross_attention
from tests.conftest import randomise

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    def poisoned(self: Tensor, *size, dtype=None, **kwargs) -> Tensor:
        shape = size if isinstance(size[0], int) else size[0]
        return self.new_full(shape, float("nan") if self.is_floating_point() else -1, dtype=dtype, **kwargs)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True)


def case(lengths_q, lengths_k, *, heads=2, dim=32, dtype=torch.float32, shared=False, bias=0, groups=0):
    """Inputs that need gradients, and the other arguments. ``shared`` uses only the first length of queries."""
    q = draw(lengths_q[0] if shared else sum(lengths_q), heads, dim, dtype=dtype)
    k, v = (draw(sum(lengths_k), heads, dim, dtype=dtype) for _ in range(2))
    inputs = {"q": q, "k": k, "v": v}
    options = {"cu_seqlens_k": starts(lengths_k)}
    if not shared:
        options["cu_seqlens_q"] = starts(lengths_q)
    if bias:
        inputs["key_bias"] = draw(bias, heads, dim, dtype=dtype)
    if groups:
        options["key_groups"] = torch.randint(-1, groups, (sum(lengths_k),), device=DEVICE)
        options |= {"num_key_groups": groups, "output_attentions": True}
    return inputs, options


def results(implementation: str, inputs: dict[str, Tensor], options: dict, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and all gradients, in float64."""
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    outputs = cross_attention(**inputs, **options, attn_implementation=implementation)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    grads = torch.autograd.grad(outputs, list(inputs.values()), weights)
    return [x.detach().double() for x in (*outputs, *grads)]


def squared_errors(inputs: dict[str, Tensor], options: dict) -> Tensor:
    """``[2, N]``: errors of the kernels and of SDPA in the dtype of the inputs, one column per output and gradient.

    SDPA computes the sums of weights in float32. For the kernels, the rounding error of float16 is allowed in addition.
    """
    expected = results("eager", inputs, options, torch.float64)
    found = [results(implementation, inputs, options, inputs["q"].dtype) for implementation in ("triton", "sdpa")]
    errors = [[(x - true).square().sum() for x, true in zip(xs, expected, strict=True)] for xs in found]
    errors = torch.tensor(errors, dtype=torch.float64)
    if "key_groups" in options:
        errors[1, 1] = (errors[1, 1].sqrt() + 2**-11 / 1.5 * expected[1].norm()) ** 2
    return errors


def totals(errors: Tensor, options: dict) -> Tensor:
    """``[2, 2]``: the total of outputs and gradients, and the sums of weights."""
    sums = errors[:, 1] if "key_groups" in options else errors.new_zeros(2)
    return torch.stack([errors.sum(1) - sums, sums], dim=1)


def as_good_as_sdpa(errors: Tensor) -> bool:
    """Whether no error is larger than 1.5 times that of SDPA."""
    kernels, sdpa = errors.sqrt()
    return bool((kernels <= 1.5 * sdpa).all())


def assert_as_good_as_sdpa(inputs: dict[str, Tensor], options: dict, *, each: bool = True) -> None:
    """Compare each output and gradient, or only the totals."""
    errors = squared_errors(inputs, options)
    assert as_good_as_sdpa(errors if each else totals(errors, options)), f"squared errors of kernels and SDPA: {errors}"


def assert_exact(inputs: dict[str, Tensor], options: dict) -> None:
    expected = results("eager", inputs, options, torch.float64)
    found = results("triton", inputs, options, torch.float32)
    for result, true in zip(found, expected, strict=True):
        torch.testing.assert_close(result, true, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@settings(max_examples=17, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 17), st.integers(0, 33)), min_size=1, max_size=3),
    heads=st.sampled_from([1, 1, 1, 2]),
    dim=st.sampled_from([5, 16, 24, 32]),
    bias=st.sampled_from([0, 0, 7, 40]),
    groups=st.sampled_from([0, 0, 0, 3, 3, 34]),
)
def test_random_cases(lengths, heads, dim, dtype, shared, bias, groups, deterministic):
    """204 cases. Rounding errors of few numbers vary by chance, so up to 16 draws are accumulated until they are small
    enough. With deterministic algorithms, the gradient of the queries has a kernel of its own.
    """
    lengths = list(map(list, zip(*lengths, strict=True)))
    options = {"heads": heads, "dim": dim, "dtype": dtype, "shared": shared, "bias": bias, "groups": groups}
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(deterministic)
    try:
        if dtype == torch.float32:
            assert_exact(*case(*lengths, **options))
            return
        errors = torch.zeros(2, 2, dtype=torch.float64)
        for _ in range(16):
            inputs, others = case(*lengths, **options)
            errors += totals(squared_errors(inputs, others), others)
            if as_good_as_sdpa(errors):
                return
        raise AssertionError(f"squared errors of kernels and SDPA: {errors}")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_head_dims(dim, dtype, shared):
    inputs, options = case([21, 40], [37, 20], heads=1, dim=dim, dtype=dtype, shared=shared, bias=20, groups=4)
    if dtype == torch.float32:
        assert_exact(inputs, options)
    else:
        assert_as_good_as_sdpa(inputs, options)


@pytest.mark.parametrize("shared", [False, True])
def test_deterministic_backward(shared, deterministic):
    inputs, options = case([33, 5, 0, 17], [20, 0, 9, 40], shared=shared)
    first, second = (results("triton", inputs, options, torch.float32) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    torch.use_deterministic_algorithms(False)
    for one, other in zip(first, results("triton", inputs, options, torch.float32), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_dense_layouts_and_strided_inputs():
    x = torch.randn(3, 2, 7, 3, 32, device=DEVICE)
    q, k = x[:, 0].transpose(1, 2).contiguous().transpose(1, 2), x[:, 1]  # heads first, and every other row
    for v in (k, k.expand_as(k).flip(-1), k[..., ::2].repeat_interleave(2, -1)[..., ::1]):
        expected, found = (
            cross_attention(q, k, v, attn_implementation=implementation) for implementation in ("eager", "triton")
        )
        assert found.shape == (3, 7, 3, 32)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = cross_attention(q, k, k, attn_implementation="triton", output_attentions=True)[1]
    torch.testing.assert_close(weights, cross_attention(q, k, k, output_attentions=True)[1])


def test_neighbouring_segments_do_not_leak():
    inputs, options = case([5, 20], [7, 30])
    with torch.no_grad():
        for x in inputs.values():
            x[5 if x is inputs["q"] else 7 :] = float("nan")
    out = cross_attention(**inputs, **options, attn_implementation="triton")
    assert out[:5].isfinite().all()
    for grad in torch.autograd.grad(out[:5].sum(), (inputs["q"], inputs["k"], inputs["v"])):
        assert grad[:5].isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="needs 9 GB of address space, which only the CPU has without using it")
def test_offsets_within_a_segment_exceed_32_bits(monkeypatch):
    """Rows of strided views lie more than 2^31 elements apart. The memory between them is never touched."""
    import mmap

    from triton.runtime import interpreter

    from idavlm.ops.cross_attention.triton.operator import fused_cross_attention, fused_cross_attention_backward

    # The interpreter copies whole storages after a kernel, here to themselves.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    stride, rows = 2**27 + 16, 18

    def spread(x: Tensor) -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = torch.frombuffer(mmap.mmap(-1, 2 * stride * rows, flags=flags), dtype=torch.float16)
        view = memory.as_strided(x.shape, (stride, x.shape[2], 1))
        return view.copy_(x)

    x = torch.randn(3, rows, 2, 16).half()
    q, k, v = map(spread, x)
    segments = (None, None, None, None, 1, rows, rows)
    far, near = [], []
    for inputs, outcome in (((q, k, v), far), (tuple(x), near)):
        saved = fused_cross_attention(*inputs, *segments, 0, False, 0.25)
        outcome.append(saved[0])
        grad = torch.ones_like(saved[0])
        outcome += fused_cross_attention_backward(
            grad, None, *inputs, *segments[:4], *saved, *segments[4:], False, 0.25
        )
    for found, expected in zip(far, near, strict=True):
        torch.testing.assert_close(found, expected)
        assert found.any()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_after_the_last_segment_have_zero_gradients(shared, deterministic):
    """The public function refuses such rows where it can read ``cu_seqlens``; the operator computes zeros for them."""
    from idavlm.ops.cross_attention.triton.operator import fused_cross_attention

    inputs, options = case([5, 4], [7, 6], shared=shared)
    extra = 3
    q, k, v = (torch.cat([x, torch.randn_like(x[:extra])]).detach().requires_grad_() for x in inputs.values())
    q = inputs["q"] if shared else q
    cu_q = None if shared else options["cu_seqlens_q"]
    torch.use_deterministic_algorithms(deterministic)
    try:
        out = fused_cross_attention(q, k, v, None, None, cu_q, options["cu_seqlens_k"], 2, 5, 7, 0, shared, 32**-0.5)[0]
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    finally:
        torch.use_deterministic_algorithms(False)
    assert shared or not out[-extra:].any()
    for grad in grads if not shared else grads[1:]:
        assert grad.isfinite().all()
        assert grad[:-extra].any()
        assert not grad[-extra:].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_of_any_width_delimit_segments(dtype):
    inputs, options = case([5, 20], [7, 30], groups=3)
    expected = cross_attention(**inputs, **options, attn_implementation="eager")
    options |= {name: options[name].to(dtype) for name in ("cu_seqlens_q", "cu_seqlens_k", "key_groups")}
    found = cross_attention(**inputs, **options, attn_implementation="triton")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_shared_queries_are_not_repeated():
    inputs, options = case([9], [20, 3, 11], shared=True)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
        cross_attention(**inputs, **options, attn_implementation="triton")
    assert shapes[0] == inputs["q"].shape


def test_loss_of_the_sums_alone():
    """A loss on the summed weights has gradients to queries and keys and none to values."""
    inputs, options = case([6, 3], [20, 9], groups=3)
    grads = {}
    for implementation in ("eager", "triton"):
        sums = cross_attention(**inputs, **options, attn_implementation=implementation)[1]
        grads[implementation] = torch.autograd.grad(sums[..., 0].sum(), list(inputs.values()), allow_unused=True)
    for expected, found in zip(*grads.values(), strict=True):
        expected = torch.zeros_like(found) if expected is None else expected
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_operator_is_registered_as_torch_expects():
    from idavlm.ops.cross_attention.triton.operator import fused_cross_attention

    inputs, options = case([4, 3], [5, 9], bias=4, groups=3)
    segments = (options["cu_seqlens_q"], options["cu_seqlens_k"], 2, 4, 9)
    arguments = (*inputs.values(), options["key_groups"].int(), *segments, 3, False, 0.2)
    torch.library.opcheck(
        fused_cross_attention, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_compile_checkpoint_and_autocast_pass_through():
    attention = randomise(CrossAttention(hidden_size=32, num_heads=2, attn_implementation="triton")).to(DEVICE)
    query, keys = torch.randn(5, 32, device=DEVICE), torch.randn(2, 9, 32, device=DEVICE, requires_grad=True)
    bias = torch.randn(9, 32, device=DEVICE)

    def gradient(function) -> Tensor:
        (out,) = (function(query, keys, key_bias=bias),)
        return torch.autograd.grad(out.square().sum(), keys)[0]

    expected = gradient(attention)
    torch.testing.assert_close(gradient(torch.compile(attention, backend="aot_eager")), expected)
    torch.testing.assert_close(gradient(lambda *a, **k: checkpoint(attention, *a, use_reentrant=False, **k)), expected)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert cross_attention(keys[None], keys[None], keys[None], attn_implementation="triton").dtype == torch.bfloat16
        mixed = gradient(attention)
    torch.testing.assert_close(mixed, expected, atol=0.1 * float(expected.abs().max()), rtol=0.1)


@pytest.mark.parametrize("options", [{}, {"null_token": True, "detach_references": False, "num_identity_layers": 2}])
def test_id_former_equals_eager(options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_queries": 4, "num_heads": 2, "vision_hidden_size": 12}
    fused = randomise(IDFormer(**sizes, attn_implementation="triton", **options)).to(DEVICE)
    eager = IDFormer(**sizes, attn_implementation="eager", **options).to(DEVICE)
    eager.load_state_dict(fused.state_dict())
    features = torch.randn(6, 9, 12, device=DEVICE)
    roles, samples = torch.tensor([0, 1, 0, 1, 2, 1]), torch.tensor([0, 0, 0, 0, 1, 2])
    outcomes = []
    for module in (fused, eager):
        out, maps = module(features, roles, samples, output_attentions=True)
        loss = out.square().mean() + sum(layer[..., 0].square().mean() for layer in maps)
        loss.backward()
        outcomes.append({"out": out, **dict(enumerate(maps)), **{n: p.grad for n, p in module.named_parameters()}})
    for name, found in outcomes[0].items():
        torch.testing.assert_close(found, outcomes[1][name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 1, 32, dtype=torch.float64)}, "q has dtype torch.float64; .* supports float32"),
        ({"v": torch.zeros(1, 2, 1, 32).half()}, "v is torch.float16 on .*, but q is torch.float32"),
        (dict.fromkeys("qkv", torch.zeros(1, 2, 1, 512)), "q has head_dim 512; .* at most 256"),
    ],
)
def test_unsupported_inputs_are_named(change, message):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 2, 1, 32)) | change
    with pytest.raises(ValueError, match=message):
        cross_attention(**{n: x.to(DEVICE) for n, x in arguments.items()}, attn_implementation="triton")


def test_without_a_gpu_the_remedy_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 2, 1, 32)
    with pytest.raises(ValueError, match=r"q is on cpu; use attn_implementation='sdpa'\. To test.*TRITON_INTERPRET=1"):
        cross_attention(x, x, x, attn_implementation="triton")


def test_an_old_triton_is_named(monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.4.0")
    with pytest.raises(
        ImportError, match=r"needs triton 3\.6 or later, but 3\.4\.0 is installed; run pip install -U triton"
    ):
        importlib.reload(sys.modules["idavlm.ops.cross_attention.triton"])
