"""The defaults are the released computation: golden tensors of the release, and a restatement in float64."""

import pytest
import torch

from benchmarks.released import ReleasedIDFormer, to_idavlm
from idavlm import IDFormer, Resampler
from tests.conftest import randomise
from tests.released import expected, released_weights

SIZES = {"hidden_size": 256, "num_queries": 16, "num_heads": 2, "vision_hidden_size": 64}
CASES = ("identity", "general", "mixed")


@pytest.fixture(scope="module")
def golden():
    return expected("ida-vlm")


@pytest.fixture(scope="module")
def weights():
    """The release's ``attn_pool.*`` (stored in bfloat16, which holds them exactly)."""
    stored, prefix = released_weights("ida-vlm"), "transformer.visual.attn_pool."
    return {key.removeprefix(prefix): value.float() for key, value in stored.items() if key.startswith(prefix)}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_id_former_gives_the_released_output(golden, weights, case, attn_implementation):
    id_former = IDFormer(**SIZES, attn_implementation=attn_implementation)
    id_former.load_state_dict(to_idavlm(weights))
    inputs = (golden[f"{case}.{name}"] for name in ("patch_features", "image_roles", "sample_index"))
    torch.testing.assert_close(id_former(*inputs), golden[f"{case}.id_former_output"], atol=2e-4, rtol=0)


def test_resampler_gives_the_released_output_of_general_images(golden, weights):
    resampler = Resampler(**SIZES)
    state = to_idavlm({key: value for key, value in weights.items() if not key.startswith("attn1.")})
    resampler.load_state_dict({key.removeprefix("resampler."): value for key, value in state.items()})
    out = resampler(golden["general.patch_features"])
    torch.testing.assert_close(out, golden["general.id_former_output"], atol=2e-4, rtol=0)


def test_the_golden_output_depends_on_the_references(golden, weights):
    """Otherwise the parity above would prove nothing about the identity layer."""
    id_former = IDFormer(**SIZES)
    id_former.load_state_dict(to_idavlm(weights))
    features, expected = golden["identity.patch_features"], golden["identity.id_former_output"]
    scenes = golden["identity.image_roles"] == 1
    assert (id_former.resampler(features)[scenes] - expected[scenes]).abs().max() > 1e-2


@pytest.mark.parametrize("vision_hidden_size", [24, 16])
@pytest.mark.parametrize("num_patches", [9, 16, 25])
def test_float64_equals_the_restatement_in_values_and_gradients(vision_hidden_size, num_patches):
    sizes = {"hidden_size": 16, "num_queries": 9, "num_heads": 4, "vision_hidden_size": vision_hidden_size}
    released = randomise(ReleasedIDFormer(**sizes)).double()
    id_former = IDFormer(**sizes).double()
    id_former.load_state_dict(to_idavlm(released.state_dict()))
    roles = torch.tensor([0, 0, 1, 2, 0, 1, 1, 1, 2, 2])
    samples = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
    features = torch.randn(len(roles), num_patches, vision_hidden_size, dtype=torch.float64, requires_grad=True)

    expected, out = released(features, roles, samples), id_former(features, roles, samples)
    assert (out - expected).abs().max() < 1e-10
    weight = torch.randn_like(out)
    names = [name for name, parameter in released.named_parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(
        (expected * weight).sum(), [features, *(dict(released.named_parameters())[name] for name in names)]
    )
    expected_grads = to_idavlm(dict(zip(names, grads[1:], strict=True)))
    (out * weight).sum().backward()
    torch.testing.assert_close(features.grad, grads[0], atol=1e-10, rtol=1e-8)
    for name, parameter in id_former.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_grads[name], atol=1e-10, rtol=1e-8, msg=name)
