"""Every option against the restatement of tests/restated.py: tokens, maps, and the gradients of both."""

import pytest
import torch

from tests.conftest import use_padded_sdpa
from tests.restated import restate
from tests.test_id_former_properties import every_option

# Two references of one identity, two scenes in a sample, a sample without references, general images, any order.
ROLES = [0, 1, 0, 0, 1, 2, 2, 1, 0, 1]
SAMPLES = [0, 0, 0, 0, 0, 1, 1, 2, 3, 3]
IDENTITIES = [1, -1, 0, 1, -1, -1, -1, -1, 0, -1]


@every_option
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_tokens_maps_and_gradients_equal_the_restatement(small_id_former, options, padded, monkeypatch):
    """``padded`` runs on the CPU the SDPA path of accelerators."""
    if padded:
        use_padded_sdpa(monkeypatch)
    id_former = small_id_former(**options)
    features = torch.randn(len(ROLES), 9, 12, dtype=torch.float64, requires_grad=True)
    index = [torch.tensor(x) for x in (ROLES, SAMPLES, IDENTITIES)]
    results = id_former(features, *index, output_attentions=True)
    expected = restate(id_former, features, ROLES, SAMPLES, IDENTITIES, num_identities=2)
    torch.testing.assert_close(results[0], expected[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(list(results[1]), expected[1], atol=1e-10, rtol=0)
    inputs = (features, *id_former.parameters())
    for ours, theirs in ((results[0], expected[0]), (torch.stack(results[1]), torch.stack(expected[1]))):
        weight = torch.randn_like(ours)
        grads = torch.autograd.grad((ours * weight).sum(), inputs, retain_graph=True, materialize_grads=True)
        expected_grads = torch.autograd.grad((theirs * weight).sum(), inputs, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(grads, expected_grads, atol=1e-9, rtol=1e-8)


def test_identity_map_loss_is_the_mean_over_layers(small_id_former):
    id_former = small_id_former(num_identity_layers=2, null_token=True)
    features, roles = torch.randn(3, 9, 12, dtype=torch.float64), torch.tensor([0, 0, 1])
    samples = torch.zeros(3, dtype=torch.long)
    _, maps = id_former(features, roles, samples, output_attentions=True)
    targets = torch.full((3, 9), -100)
    targets[2] = torch.tensor([0, 1, -1] * 3)
    each = [-layer[2].gather(-1, (targets[2] % 3)[:, None]).log().mean() for layer in maps]
    loss = id_former.identity_map_loss(maps, targets, roles, samples)
    torch.testing.assert_close(loss, torch.stack(each).mean())
    assert abs(each[0] - each[1]) > 1e-3


def test_loss_does_not_count_images_that_attend_to_no_reference(small_id_former):
    id_former = small_id_former(null_token=True)
    features, targets = torch.randn(4, 9, 12, dtype=torch.float64), torch.full((4, 9), -1)
    targets[0] = -100
    losses = []
    for roles, samples in (([0, 1], [0, 0]), ([0, 1, 1, 2], [0, 0, 1, 2])):
        roles, samples = torch.tensor(roles), torch.tensor(samples)
        _, maps = id_former(features[: len(roles)], roles, samples, output_attentions=True)
        losses.append(id_former.identity_map_loss(maps, targets[: len(roles)], roles, samples))
    torch.testing.assert_close(*losses)


def test_loss_rejects_an_identity_the_sample_does_not_have(small_id_former):
    id_former = small_id_former()
    features, targets = torch.randn(5, 9, 12, dtype=torch.float64), torch.full((5, 9), -100)
    index = torch.tensor([0, 0, 0, 1, 1])
    roles = torch.tensor([0, 0, 1, 0, 1])
    _, maps = id_former(features, roles, index, output_attentions=True)
    targets[4, 3] = 1
    with pytest.raises(ValueError, match=r"targets\[4, 3\]=1, but image 4 has no reference .* \(it has \[0\]\)"):
        id_former.identity_map_loss(maps, targets, roles, index)


def test_hooks_on_projections_see_what_they_compute(small_id_former):
    """Forward hooks keep an output that nothing changes later; full backward hooks run."""
    id_former, kept, gradients = small_id_former(), {}, []
    projection = id_former.resampler.attention.k_proj
    projection.register_forward_hook(lambda module, inputs, output: kept.update(x=inputs[0], y=output))
    for module in id_former.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_full_backward_hook(lambda module, *_: gradients.append(module))
    features = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    id_former(features, torch.tensor([0, 1]), torch.tensor([0, 0])).sum().backward()
    torch.testing.assert_close(kept["y"], torch.nn.functional.linear(kept["x"], projection.weight, projection.bias))
    assert projection in gradients


def test_parameters_may_be_cast_alone(small_id_former):
    """transformers' default type and FSDP's mixed precision leave buffers in float32."""
    id_former = small_id_former(dtype=torch.float32)
    for parameter in id_former.parameters():
        parameter.data = parameter.data.bfloat16()
    assert id_former.resampler.query_position.dtype == torch.float32
    features = torch.randn(2, 9, 12, dtype=torch.bfloat16)
    assert id_former(features, torch.tensor([0, 1]), torch.tensor([0, 0])).dtype == torch.bfloat16


def test_identity_tokens_move(small_id_former):
    kate = small_id_former().encode_references(torch.randn(1, 9, 12, dtype=torch.float64))
    assert kate.to(torch.float32).keys.dtype == kate.to(torch.float32).image_tokens.dtype == torch.float32
    assert kate in [kate]
