"""Properties of every IDFormer, for all options and all kinds of batches."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import id_former as id_former_benchmark
from benchmarks.measure import peak_megabytes
from idavlm import IDFormer
from idavlm.modules import attention

LEARNED = {"identity_embedding": "learned", "max_identities": 4}
OPTIONS = {
    "released": {},
    "eager": {"attn_implementation": "eager"},
    "deep": {"num_identity_layers": 3, "detach_references": False},
    "figure": {"feed_forward": "all", "intermediate_size": 20},
    "tanh gate": {"gate": "tanh", "feed_forward": "identity"},
    "open": {"gate": "none", "identity_keys": "patches"},
    "identity embedding": {
        "identity_embedding": "learned",
        "max_identities": 4,
        "null_token": True,
        "identity_keys": "patches",
    },
    "positions": {**LEARNED, "token_position_embedding": "sincos"},
    "one-hot positions": {"token_position_embedding": "one_hot"},
    "null": {"null_token": True},
    "projected": {**LEARNED, "output_proj": True},
    "wider": {**LEARNED, "output_proj": True, "output_size": 24},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())

# One sample each: references and scenes in any order, no reference, no scene, general images, both.
SAMPLES = ([0, 0, 1], [1, 0, 1, 0], [1, 1], [0, 0, 0], [2, 2], [0, 1, 2], [2])


def features_of(samples, num_patches=9):
    return [torch.randn(len(roles), num_patches, 12, dtype=torch.float64) for roles in samples]


def batch_of(samples):
    roles = torch.tensor([role for sample in samples for role in sample], dtype=torch.long)
    index = torch.tensor([number for number, sample in enumerate(samples) for _ in sample], dtype=torch.long)
    return roles, index


@every_option
def test_a_sample_does_not_see_its_neighbours(small_id_former, options):
    id_former, features = small_id_former(**options), features_of(SAMPLES)
    alone = [id_former(x, *batch_of([roles])) for x, roles in zip(features, SAMPLES, strict=True)]
    for order in itertools.islice(itertools.permutations(range(len(SAMPLES))), 0, 5000, 617):
        together = id_former(torch.cat([features[i] for i in order]), *batch_of([SAMPLES[i] for i in order]))
        torch.testing.assert_close(together, torch.cat([alone[i] for i in order]), atol=1e-12, rtol=1e-10)


@every_option
def test_images_keep_their_order_within_a_sample(small_id_former, options):
    """Scenes and general images may stand anywhere; references keep their order among themselves."""
    id_former = small_id_former(**options)
    roles, features = torch.tensor([0, 0, 1, 1, 2]), torch.randn(5, 9, 12, dtype=torch.float64)
    index = torch.zeros(5, dtype=torch.long)
    expected = id_former(features, roles, index)
    for order in ([2, 0, 1, 3, 4], [4, 3, 2, 0, 1], [0, 2, 1, 4, 3], [3, 0, 4, 1, 2]):
        out = id_former(features[order], roles[order], index)
        torch.testing.assert_close(out, expected[order], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, LEARNED], ids=["none", "learned"])
def test_only_identity_embeddings_tell_the_order_of_references(small_id_former, options):
    id_former = small_id_former(**options)
    roles, features = torch.tensor([0, 0, 1]), torch.randn(3, 9, 12, dtype=torch.float64)
    index = torch.zeros(3, dtype=torch.long)
    difference = (id_former(features, roles, index) - id_former(features[[1, 0, 2]], roles, index))[2].abs().max()
    assert (difference > 1e-3) if options else (difference < 1e-12)


@pytest.mark.parametrize("gate", ["zero_init", "tanh"])
@pytest.mark.parametrize("feed_forward", ["none", "identity", "all"])
def test_a_closed_gate_starts_as_the_resampler(small_id_former, gate, feed_forward):
    id_former = small_id_former(random=False, gate=gate, feed_forward=feed_forward, num_identity_layers=2)
    features = torch.cat(features_of(SAMPLES))
    out = id_former(features, *batch_of(SAMPLES))
    torch.testing.assert_close(out, id_former.resampler(features), atol=1e-12, rtol=0)


@pytest.mark.parametrize("gate", ["zero_init", "tanh"])
def test_a_closed_gate_opens_by_training(small_id_former, gate):
    """The first step opens the gate, the second reaches the parameters after it."""
    id_former = small_id_former(random=False, gate=gate, feed_forward="identity")
    optimiser = torch.optim.SGD(id_former.parameters(), lr=0.01)
    features, batch = torch.cat(features_of(SAMPLES)), batch_of(SAMPLES)
    for _ in range(2):
        optimiser.zero_grad()
        id_former(features, *batch).square().sum().backward()
        optimiser.step()
    for name, parameter in id_former.identity_layers.named_parameters():
        if "k_proj.bias" not in name:  # a constant added to all keys changes no softmax
            assert parameter.grad.abs().max() > 0, name


def test_an_open_gate_starts_elsewhere(small_id_former):
    id_former, features = small_id_former(random=False, gate="none"), torch.cat(features_of(SAMPLES))
    assert (id_former(features, *batch_of(SAMPLES)) - id_former.resampler(features)).abs().max() > 1e-3


@every_option
@pytest.mark.parametrize(
    "samples", [[[0, 0, 1]], [[2, 2]], [[1]], [[0]], [[0], [1]], [], [[2], [0, 1], [1]]], ids=lambda s: f"roles {s}"
)
def test_every_parameter_gets_a_gradient_whatever_the_roles(small_id_former, options, samples):
    id_former = small_id_former(**options)
    features = torch.randn(sum(map(len, samples)), 9, 12, dtype=torch.float64)
    out, maps = id_former(features, *batch_of(samples), output_attentions=True)
    assert out.shape == (len(features), 4, options.get("output_size", 16))
    assert all(layer.dtype == torch.float64 for layer in maps)
    out.sum().backward()
    for name, parameter in id_former.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@every_option
def test_gradcheck(small_id_former, options):
    id_former = small_id_former(**options)
    roles, index = batch_of([[0, 1, 0], [1, 2]])
    identity = torch.tensor([0, -1, 0, -1, -1])
    features = torch.randn(5, 4, 12, dtype=torch.float64, requires_grad=True)
    if options.get("detach_references", True):
        # Finite differences see through a detach: check the scene alone, which the detach does not touch.
        bank = [id_former.encode_references(features[[0, 2]].detach())]
        assert torch.autograd.gradcheck(
            lambda x: id_former.forward_scenes(x, bank), features[1:2].detach().requires_grad_()
        )
    else:
        assert torch.autograd.gradcheck(lambda x: id_former(x, roles, index, identity), features)
    parameters = tuple(p for name, p in id_former.named_parameters() if name.startswith(("identity_", "null")))
    assert torch.autograd.gradcheck(
        lambda *_: id_former(features.detach(), roles, index, identity), parameters, fast_mode=True
    )


@pytest.mark.parametrize("detach", [True, False])
def test_detach_keeps_scenes_out_of_the_references(small_id_former, detach):
    id_former = small_id_former(detach_references=detach)
    features = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    out = id_former(features, torch.tensor([0, 1]), torch.tensor([0, 0]))
    (grad,) = torch.autograd.grad(out[1].sum(), features)
    assert bool(grad[0].any()) is not detach


@every_option
def test_a_bank_of_identities_equals_forward(small_id_former, options):
    """Two identities, the first with two references; three frames, together and one by one."""
    id_former = small_id_former(**options)
    features = torch.randn(6, 9, 12, dtype=torch.float64)
    roles, identity = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, -1, -1, -1])
    expected, maps = id_former(features, roles, torch.zeros(6, dtype=torch.long), identity, output_attentions=True)
    bank = [id_former.encode_references(features[:2]), id_former.encode_references(features[2:3])]
    torch.testing.assert_close(id_former.reference_tokens(bank), expected[:3], atol=1e-12, rtol=0)
    out, bank_maps = id_former.forward_scenes(features[3:], bank, output_attentions=True)
    torch.testing.assert_close(out, expected[3:], atol=1e-12, rtol=0)
    for layer, bank_layer in zip(maps, bank_maps, strict=True):
        torch.testing.assert_close(bank_layer, layer[3:], atol=1e-12, rtol=0)
    for frame in range(3, 6):
        tokens = id_former.forward_scenes(features[frame : frame + 1], [i.to("cpu") for i in bank])
        torch.testing.assert_close(tokens[0], expected[frame], atol=1e-12, rtol=0)


@every_option
def test_an_empty_bank_is_the_resampler(small_id_former, options):
    id_former, features = small_id_former(**options), torch.randn(2, 9, 12, dtype=torch.float64)
    out, maps = id_former.forward_scenes(features, [], output_attentions=True)
    torch.testing.assert_close(out, id_former.resampler(features), atol=1e-12, rtol=0)
    assert all((layer == torch.ones(2, 9, 1)).all() for layer in maps)


@every_option
def test_maps_are_shares_of_attention(small_id_former, options):
    id_former, features = small_id_former(**options), torch.cat(features_of(SAMPLES))
    roles, index = batch_of(SAMPLES)
    out, maps = id_former(features, roles, index, output_attentions=True)
    torch.testing.assert_close(out, id_former(features, roles, index), atol=0, rtol=0)
    assert len(maps) == len(id_former.identity_layers)
    references = [SAMPLES[sample].count(0) for sample in index.tolist()]
    for layer in maps:
        assert layer.shape == (len(roles), 9, max(references) + 1)
        torch.testing.assert_close(layer.sum(-1), torch.ones(len(roles), 9, dtype=layer.dtype))
        for image, count in zip(layer, references, strict=True):
            assert not image[:, count:-1].any()
        for image, count, role in zip(layer, references, roles.tolist(), strict=True):
            if role == 1 and count:
                assert (image[:, :count] > 0).all()
                assert bool((image[:, -1] > 0).all()) is (id_former.null_token is not None)
            else:
                assert (image[:, -1] == 1).all()


def test_references_of_one_identity_are_one_column(small_id_former):
    id_former = small_id_former()
    features, roles = torch.randn(4, 9, 12, dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    index = torch.zeros(4, dtype=torch.long)
    _, (each,) = id_former(features, roles, index, output_attentions=True)
    _, (merged,) = id_former(features, roles, index, torch.tensor([0, 1, 0, -1]), output_attentions=True)
    torch.testing.assert_close(merged[3, :, 0], each[3, :, 0] + each[3, :, 2])
    torch.testing.assert_close(merged[3, :, 1], each[3, :, 1])


@every_option
def test_state_dict_round_trips_through_safetensors(small_id_former, options, tmp_path):
    id_former, other = small_id_former(**options), small_id_former(**options)
    save_file(id_former.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    features, batch = torch.cat(features_of(SAMPLES)), batch_of(SAMPLES)
    torch.testing.assert_close(other(features, *batch), id_former(features, *batch), atol=0, rtol=0)


def test_state_dict_keys_are_the_documented_ones():
    attention = [f"{part}_proj.{kind}" for part in ("q", "k", "v", "out") for kind in ("weight", "bias")]
    expected = {
        "resampler.query",
        "resampler.query_position",
        "resampler.query_norm.weight",
        "resampler.query_norm.bias",
        "resampler.input_proj.weight",
        "resampler.input_norm.weight",
        "resampler.input_norm.bias",
        *(f"resampler.attention.{key}" for key in attention),
        *(f"identity_layers.0.attention.{key}" for key in attention),
    }
    sizes = {"hidden_size": 16, "num_queries": 4, "num_heads": 2}
    assert set(IDFormer(**sizes, vision_hidden_size=12).state_dict()) == expected
    assert set(IDFormer(**sizes).state_dict()) == expected - {"resampler.input_proj.weight"}
    norm_up_down = [f"{part}.{kind}" for part in ("norm", "up_proj", "down_proj") for kind in ("weight", "bias")]
    options = {
        "gate": "tanh",
        "feed_forward": "all",
        "identity_embedding": "learned",
        "max_identities": 2,
        "null_token": True,
    }
    assert set(IDFormer(**sizes, **options).state_dict()) == expected - {"resampler.input_proj.weight"} | {
        *(f"{where}.feed_forward.{key}" for where in ("resampler", "identity_layers.0") for key in norm_up_down),
        "identity_layers.0.attention_gate",
        "identity_layers.0.feed_forward_gate",
        "identity_embedding.weight",
        "null_token",
    }


@every_option
def test_bfloat16_autocast_trains(small_id_former, options):
    id_former = small_id_former(dtype=torch.float32, **options)
    features, batch = torch.cat(features_of(SAMPLES)).float(), batch_of(SAMPLES)
    expected = id_former(features, *batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, maps = id_former(features, *batch, output_attentions=True)
    out.float().sum().backward()
    assert (out - expected).abs().mean() < 0.02 * expected.abs().mean()
    assert all(layer.dtype == torch.float32 for layer in maps)
    assert all(parameter.grad.isfinite().all() for parameter in id_former.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(small_id_former, dtype):
    id_former = small_id_former(dtype=dtype)
    features, batch = torch.cat(features_of(SAMPLES)), batch_of(SAMPLES)
    out = id_former(features.to(dtype), *batch)
    expected = id_former.double()(features.to(dtype).double(), *batch)
    assert out.dtype == dtype
    assert (out - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_torch_compile_gives_the_same_values_and_gradients(small_id_former):
    id_former = small_id_former(null_token=True, identity_embedding="learned", max_identities=3)
    compiled = torch.compile(id_former, backend="aot_eager")
    for samples in (SAMPLES, SAMPLES[::-1], [[2, 2]]):
        features, batch = torch.cat(features_of(samples)), batch_of(samples)
        expected, out = id_former(features, *batch), compiled(features, *batch)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        weight = torch.randn_like(out)
        parameters = tuple(id_former.parameters())
        grads = torch.autograd.grad((out * weight).sum(), parameters)
        expected_grads = torch.autograd.grad((expected * weight).sum(), parameters)
        torch.testing.assert_close(grads, expected_grads, atol=1e-11, rtol=1e-9)


def test_torch_compile_compiles_each_function_at_most_three_times(small_id_former):
    """However many images, references and samples the batches have, as in generation for one question after another."""
    torch._dynamo.reset()
    id_former = small_id_former(null_token=True, identity_embedding="learned", max_identities=4)
    compiled = torch.compile(id_former, backend="eager")
    batches = ([[0, 1]], [[0, 0, 1]], SAMPLES, SAMPLES[::-1], [[0, 1]] * 3, [[0, 0, 0, 1, 1]] * 2, [[2, 0, 1], [0, 1]])
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for samples in batches:
            features, batch = torch.cat(features_of(samples)), batch_of(samples)
            torch.testing.assert_close(compiled(features, *batch), id_former(features, *batch), atol=1e-12, rtol=0)


@pytest.mark.parametrize("identity_keys", ["tokens", "patches"])
def test_chunks_of_inference_change_nothing(small_id_former, identity_keys, monkeypatch):
    """Without gradients a CPU computes images in chunks, in the order of the batch."""
    monkeypatch.setattr(attention, "IMAGES_PER_CHUNK", 2)
    id_former = small_id_former(identity_keys=identity_keys)
    samples = [[0, 1, 0, 2], [1, 0, 1], [2, 2, 2]]
    features, batch = torch.cat(features_of(samples)), batch_of(samples)
    expected = id_former(features, *batch)
    with torch.no_grad():
        torch.testing.assert_close(id_former(features, *batch), expected, atol=1e-12, rtol=0)


def test_inference_needs_less_memory_than_the_released_loop():
    """Also where the images are not in the order in which they are computed."""
    sizes = {"hidden_size": 64, "num_heads": 2, "num_queries": 64, "vision_hidden_size": 64}
    released, id_former = id_former_benchmark.build(sizes, torch.device("cpu"), torch.float32)
    for samples in ([(3, 1)] * 8, id_former_benchmark.ragged(8)):
        roles, index = id_former_benchmark.batch(samples)
        features = torch.randn(len(roles), 256, 64)

        def megabytes(module, inputs=(features, roles, index)) -> float:
            return peak_megabytes(lambda: module(*inputs), torch.device("cpu"))

        with torch.no_grad():
            assert megabytes(id_former) <= megabytes(released)


def test_gradient_checkpointing_gives_the_same_gradients(small_id_former):
    id_former, features, batch = small_id_former(), torch.cat(features_of(SAMPLES)), batch_of(SAMPLES)
    parameters = tuple(id_former.parameters())
    expected = torch.autograd.grad(id_former(features, *batch).square().sum(), parameters)
    again = torch.utils.checkpoint.checkpoint(id_former, features, *batch, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), parameters), expected)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_peft_adapters_reach_every_projection(small_id_former, lora_bias):
    """Positions enter through the projections too: a LoRA layer must act on them, and merging must change nothing."""
    peft = pytest.importorskip("peft")
    id_former, features, batch = small_id_former(), torch.cat(features_of(SAMPLES)), batch_of(SAMPLES)
    before = id_former(features, *batch)
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, lora_bias=lora_bias)
    adapted = peft.get_peft_model(id_former, config).double()
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    out = adapted(features, *batch)
    assert (out - before).abs().max() > 1e-3
    torch.testing.assert_close(adapted.merge_and_unload()(features, *batch), out, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("keys", ["tokens", "patches"])
@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_contrastive_loss_restated(small_id_former, keys, null, heads):
    """All samples as one: each labelled patch attends to all references. Identity embeddings play no part."""
    options = {"identity_keys": keys, "null_token": null, "num_identity_heads": heads}
    id_former = small_id_former(identity_embedding="learned", max_identities=2, **options)
    features = torch.randn(6, 9, 12, dtype=torch.float64)
    roles = torch.tensor([0, 0, 1, 0, 0, 1])
    samples, identities = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 0, 0, 0])
    targets = torch.full((6, 9), -100)
    targets[2, :4] = torch.tensor([0, 1, 1, -1])
    targets[5, 3:5] = 0
    loss = id_former.contrastive_loss(features, roles, samples, identities, targets)

    without = small_id_former(**options)
    without.load_state_dict({k: v for k, v in id_former.state_dict().items() if k != "identity_embedding.weight"})
    order = torch.tensor([0, 1, 3, 4, 2, 5])
    _, maps = without(
        features[order],
        roles[order],
        torch.zeros(6, dtype=torch.long),
        torch.tensor([0, 1, 2, 2, 0, 0]),
        output_attentions=True,
    )
    scenes = maps[0][4:]
    shares = [scenes[0, 0, 0], scenes[0, 1, 1], scenes[0, 2, 1], scenes[1, 3, 2], scenes[1, 4, 2]]
    torch.testing.assert_close(loss, -torch.stack(shares).double().log().mean(), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert id_former.identity_layers[0].attention.q_proj.weight.grad.abs().max() > 0
    assert id_former.contrastive_loss(features, roles, samples, identities, torch.full((6, 9), -1)) == 0


@every_option
def test_config_round_trip(small_id_former, options):
    id_former = small_id_former(dtype=torch.float64, **options)
    config = json.loads(json.dumps(id_former.to_config()))
    assert config["hidden_size"] == 16
    assert {name: config[name] for name in options} == options
    other = IDFormer.from_config(config).double()
    other.load_state_dict(id_former.state_dict())
    features, batch = torch.cat(features_of(SAMPLES)), batch_of(SAMPLES)
    assert torch.equal(other(features, *batch), id_former(features, *batch))
