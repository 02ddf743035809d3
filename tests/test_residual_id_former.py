"""ResidualIDFormer: equal to a plain loop over scenes, for ragged images, with all gradients; options and errors."""

import math

import pytest
import torch

from idavlm.modules import ImageTokens, ResidualIDFormer
from idavlm.modules.residual_id_former import POSITION_GRID
from tests.conftest import randomise

C, H = 12, 8
GRIDS = ((2, 3), None, (3, 1), (1, 4), (2, 2), (5, 1), None, (2, 1))
LENGTHS = (6, 5, 3, 4, 4, 5, 3, 2)
ROLES = torch.tensor([0, 0, 1, 1, 2, 1, 0, 1])
SAMPLES = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3])
IDENTITIES = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0])
SCENES = {2: (0, 1), 3: (0, 1), 7: (6,)}
"""Scenes that attend to references, and these references. Image 5 is a scene of a sample without references."""


def build(**options):
    options = {"token_size": C, "num_heads": 2, "hidden_size": H, **options}
    return randomise(ResidualIDFormer(**options)).double()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(sum(LENGTHS), C, generator=generator, dtype=torch.float64)
    return ImageTokens(tokens.requires_grad_(), LENGTHS, GRIDS)


def position_of(module, grid, cell):
    """Position of the token in row-major ``cell`` of a grid: that of the cell of the fixed grid in which it lies."""
    row, column = divmod(cell, grid[1])
    row = int((row + 0.5) / grid[0] * POSITION_GRID)
    column = int((column + 0.5) / grid[1] * POSITION_GRID)
    return module.position[row * POSITION_GRID + column]


def reference(module, images):
    """The residual of each image, one scene and one head at a time."""
    parts = images.tokens.split(LENGTHS)
    x = [module.input_norm(module.down_proj(part)) for part in parts]
    output, maps = list(parts), []
    for scene, references in SCENES.items():
        null = [] if module.null_token is None else [module.null_token]
        keys = [x[image].detach() if module.detach_references else x[image] for image in references]
        if module.reference_queries is not None:
            keys = [attend(module.reference_attention, module.reference_queries, key)[0] for key in keys]
        owners = [-1] * len(null) + [int(IDENTITIES[i]) for i, key in zip(references, keys, strict=True) for _ in key]
        packed = torch.cat(null + keys)
        y = x[scene]
        for layer in module.identity_layers:
            position = torch.zeros_like(y)
            if GRIDS[scene] is not None:
                position = torch.stack([position_of(module, GRIDS[scene], cell) for cell in range(LENGTHS[scene])])
            attended, weights = attend(layer.attention, y + position, packed)
            gate = 1 if layer.attention_gate is None else layer.attention_gate.tanh()
            y = y + gate * attended
            if layer.feed_forward is not None:
                gate = 1 if layer.feed_forward_gate is None else layer.feed_forward_gate.tanh()
                y = y + gate * layer.feed_forward(y)
        shares = torch.stack([weights[:, [o == owner for o in owners]].sum(1) for owner in (0, 1, -1)], 1)
        maps.append(shares)
        output[scene] = parts[scene] + module.up_proj(y - x[scene])
    return torch.cat(output), torch.cat(maps)


def attend(attention, query, key):
    heads = []
    q, k, v = attention.q_proj(query), attention.k_proj(key), attention.v_proj(key)
    weights = []
    for q_h, k_h, v_h in zip(*(x.chunk(attention.num_heads, -1) for x in (q, k, v)), strict=True):
        weights.append((q_h @ k_h.T / math.sqrt(q_h.shape[-1])).softmax(-1))
        heads.append(weights[-1] @ v_h)
    return attention.out_proj(torch.cat(heads, -1)), torch.stack(weights).mean(0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"null_token": False},
        {"hidden_size": None, "num_heads": 3},
        {"num_identity_layers": 3, "gate": "tanh"},
        {"feed_forward": True, "detach_references": False},
        {"feed_forward": True, "gate": "tanh"},
        {"identity_keys": "queries", "num_queries": 3},
        {"attn_implementation": "eager", "gate": "none"},
    ],
    ids=str,
)
def test_equal_to_a_loop_over_scenes(options):
    module, images = build(**options), batch()
    output = module(images, ROLES, SAMPLES, IDENTITIES)
    expected, expected_map = reference(module, images)
    torch.testing.assert_close(output.tokens, expected)
    in_scene = torch.cat([torch.full((length,), image in SCENES) for image, length in enumerate(LENGTHS)])
    tolerance = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(output.identity_maps[-1][in_scene].double(), expected_map, **tolerance)
    assert (output.identity_maps[-1][~in_scene] == torch.tensor([0.0, 0.0, 1.0])).all()
    weight, map_weight = torch.randn_like(expected), torch.randn_like(expected_map)
    inputs = [images.tokens, *module.parameters()]
    ours = (output.tokens * weight).sum() + (output.identity_maps[-1][in_scene] * map_weight).sum()
    theirs = (expected * weight).sum() + (expected_map * map_weight).sum()
    grads, expected_grads = (torch.autograd.grad(x, inputs, materialize_grads=True) for x in (ours, theirs))
    torch.testing.assert_close(grads, expected_grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gate", ["zero_init", "tanh"])
@pytest.mark.parametrize("identity_embedding", [None, "learned", "name"])
def test_changes_nothing_before_training(gate, identity_embedding):
    options = {"max_identities": 2} if identity_embedding == "learned" else {}
    module = ResidualIDFormer(
        token_size=C, num_heads=2, gate=gate, identity_embedding=identity_embedding, feed_forward=True, **options
    )
    tokens = torch.randn(sum(LENGTHS), C)
    for dtype in (torch.float32, torch.bfloat16):
        images = ImageTokens(tokens.to(dtype), LENGTHS, GRIDS)
        output = module(images, ROLES, SAMPLES, IDENTITIES, name_embeddings=torch.randn(4, 2, C))
        assert output.tokens.dtype == dtype
        assert torch.equal(output.tokens, images.tokens)


def test_only_scenes_change_and_only_by_their_own_sample():
    module, images = build(), batch()
    output = module(images, ROLES, SAMPLES, IDENTITIES).tokens
    changed = [not torch.equal(a, b) for a, b in zip(output.split(LENGTHS), images.tokens.split(LENGTHS), strict=True)]
    assert changed == [image in SCENES for image in range(8)]
    other = images.tokens.detach().clone()
    other[: LENGTHS[0]] = 5.0  # a reference of sample 0
    output_2 = module(ImageTokens(other, LENGTHS, GRIDS), ROLES, SAMPLES, IDENTITIES).tokens
    affected = [not torch.equal(a, b) for a, b in zip(output.split(LENGTHS), output_2.split(LENGTHS), strict=True)]
    assert affected == [image in (0, 2, 3) for image in range(8)]


@pytest.mark.parametrize("count", [0, 1])
def test_batches_without_scenes_references_or_images(count):
    """Every parameter is part of the graph, so that every process of a distributed run has the same gradients."""
    module = build(identity_keys="queries", num_queries=2, identity_embedding="learned", max_identities=2)
    tokens = torch.randn(3 * count, C, dtype=torch.float64)
    images = ImageTokens(tokens, (3,) * count, (None,) * count)
    for role in (0, 1, 2):
        output = module(images, torch.full((count,), role), torch.zeros(count, dtype=torch.long))
        assert output.tokens.shape == tokens.shape
        output.tokens.sum().backward()
        missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
        assert not missing
        module.zero_grad()


def test_the_embedding_of_an_identity_follows_the_map():
    """Tokens of references carry their own identity, tokens of scenes the identities they attend to."""
    names = torch.randn(4, 2, C, dtype=torch.float64)
    module, images = build(identity_embedding="name"), batch()
    with_names = module(images, ROLES, SAMPLES, IDENTITIES, name_embeddings=names)
    without = module(images, ROLES, SAMPLES, IDENTITIES, name_embeddings=torch.zeros_like(names))
    difference = (with_names.tokens - without.tokens) / module.identity_embedding_gate.tanh()
    shares = with_names.identity_maps[-1][:, :2].double().split(LENGTHS)
    for image, part in enumerate(difference.split(LENGTHS)):
        sample = int(SAMPLES[image])
        expected = shares[image] @ names[sample]
        if ROLES[image] == 0:
            expected = names[sample, IDENTITIES[image]].expand(LENGTHS[image], -1)
        torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-5)
    targets = torch.full((sum(LENGTHS),), -100)
    start = sum(LENGTHS[:2])
    targets[start : start + 3] = torch.tensor([1, -1, -100])
    forced = module(
        images, ROLES, SAMPLES, IDENTITIES, name_embeddings=names, targets=targets, teacher_forcing=True
    ).tokens
    difference = (forced - without.tokens) / module.identity_embedding_gate.tanh()
    expected = torch.stack([names[0, 1], torch.zeros(C).double(), shares[2][2] @ names[0]])
    torch.testing.assert_close(difference[start : start + 3], expected, atol=1e-6, rtol=1e-5)


def test_losses_of_targets():
    module, images = build(num_identity_layers=2), batch()
    targets = torch.full((sum(LENGTHS),), -100)
    start = sum(LENGTHS[:2])
    targets[start : start + 5] = torch.tensor([1, -1, -100, 0, 0])
    output = module(images, ROLES, SAMPLES, IDENTITIES, targets=targets, with_contrastive_loss=True)
    first, second = [], []
    for layer in output.identity_maps:
        nll = -layer.log()[torch.arange(start, start + 5), [1, 2, 0, 0, 0]]
        first.append(nll[:2].mean())
        second.append(nll[3:].mean())
    expected = torch.zeros(8, dtype=torch.float64)
    expected[2], expected[3] = torch.stack(first).mean(), torch.stack(second).mean()
    torch.testing.assert_close(output.map_losses, expected)
    # Contrastive: against the references of all samples, the null token once.
    x = module.input_norm(module.down_proj(images.tokens)).split(LENGTHS)
    attention = module.identity_layers[0].attention
    keys = torch.cat([module.null_token, x[0], x[1], x[6]])
    owner = torch.tensor([-1] + [1] * 6 + [0] * 5 + [2] * 3)
    losses = []
    for image, cell, identity in ((2, 0, 1), (3, 0, 0), (3, 1, 0)):
        query = x[image][cell] + position_of(module, GRIDS[image], cell)
        _, weights = attend(attention, query[None], keys)
        losses.append(-weights[0, owner == identity].sum().log())
    torch.testing.assert_close(output.contrastive_loss, torch.stack(losses).sum())


def test_deepstack_levels_have_residuals_of_their_own():
    module, images = build(num_deepstack_levels=2), batch()
    levels = [torch.randn(sum(LENGTHS), C, dtype=torch.float64) for _ in range(2)]
    output = module(images, ROLES, SAMPLES, IDENTITIES, deepstack_tokens=levels)
    for own, level, result in zip(module.deepstack, levels, output.deepstack_tokens, strict=True):
        alone = own(ImageTokens(level, LENGTHS, GRIDS), ROLES, SAMPLES, IDENTITIES).tokens
        assert torch.equal(result, alone)
        assert not torch.equal(result, level)
    untouched = build()(images, ROLES, SAMPLES, IDENTITIES, deepstack_tokens=levels).deepstack_tokens
    assert all(torch.equal(a, b) for a, b in zip(untouched, levels, strict=True))
    with pytest.raises(ValueError, match="num_deepstack_levels=2 but deepstack_tokens has 1 levels"):
        module(images, ROLES, SAMPLES, IDENTITIES, deepstack_tokens=levels[:1])


def test_a_position_depends_on_the_place_and_not_on_the_resolution():
    """The centre of the image has one position, whatever the grid; tokens without a grid have none."""
    module, sides = build(), (1, 3, 5)
    images = ImageTokens(torch.zeros(38, C).double(), (1, 9, 25, 3), (*((side, side) for side in sides), None))
    positions = module._token_positions(images).split(images.lengths)
    centres = [part[len(part) // 2] for part in positions[:3]]
    assert torch.equal(centres[0], centres[1])
    assert torch.equal(centres[0], centres[2])
    assert len({tuple(position.tolist()) for position in positions[2]}) == 25
    assert not positions[3].any()


def test_configuration_round_trip():
    module = build(identity_embedding="learned", max_identities=3, num_identity_layers=2)
    again = ResidualIDFormer.from_config(module.to_config()).double()
    again.load_state_dict(module.state_dict())
    outputs = [m(batch(), ROLES, SAMPLES, IDENTITIES).tokens for m in (module, again)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identity_keys": "queries"}, "identity_keys='queries' and num_queries=None: pass .* together"),
        ({"num_queries": 3}, "identity_keys='tokens' and num_queries=3"),
        ({"identity_embedding": "learned"}, "identity_embedding='learned' and max_identities=None"),
        ({"max_identities": 3}, "identity_embedding=None and max_identities=3"),
        ({"identity_keys": "patches"}, "identity_keys='patches' is not known"),
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=8"),
        ({"gate": "sigmoid"}, "gate='sigmoid' is not known"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_inputs_that_do_not_fit_are_named():
    module = build()
    with pytest.raises(ValueError, match=r"images.tokens has shape \(4, 7\); expected \[N, 12\]"):
        module(ImageTokens(torch.zeros(4, 7), (4,), (None,)), ROLES[:1], SAMPLES[:1])
    with pytest.raises(ValueError, match="2 images of 5 tokens with 2 grids, but tokens has shape"):
        ImageTokens(torch.zeros(4, C), (4, 1), (None, None))
    with pytest.raises(ValueError, match=r"grids\[0\]=\(2, 3\) has 6 cells, but image 0 has 4 tokens"):
        ImageTokens(torch.zeros(4, C), (4,), ((2, 3),))
    with pytest.raises(ValueError, match="image_roles has shape"):
        module(batch(), ROLES[:3], SAMPLES)
    named = build(identity_embedding="name")
    for names in (None, torch.zeros(4, 1, C), torch.zeros(2, 2, C)):
        with pytest.raises(ValueError, match="identity_embedding='name' needs name_embeddings"):
            named(batch(), ROLES, SAMPLES, IDENTITIES, name_embeddings=names)
