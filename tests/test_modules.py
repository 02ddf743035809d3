"""CrossAttention, positions, Resampler and connectors, against torch's own and against formulas."""

import itertools
import math

import pytest
import torch
from torch import nn

from idavlm import CrossAttention, Resampler, build_connector
from idavlm.modules.positions import one_hot_positions_2d, resize_positions, sincos_positions_2d
from tests.conftest import randomise


def as_multihead(attention: CrossAttention) -> nn.MultiheadAttention:
    reference = nn.MultiheadAttention(attention.hidden_size, attention.num_heads, batch_first=True).double()
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    reference.load_state_dict(
        {
            "in_proj_weight": torch.cat([part.weight for part in parts]),
            "in_proj_bias": torch.cat([part.bias for part in parts]),
            "out_proj.weight": attention.out_proj.weight,
            "out_proj.bias": attention.out_proj.bias,
        }
    )
    return reference


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_cross_attention_equals_torch_multihead_attention(attn_implementation):
    attention = CrossAttention(hidden_size=24, num_heads=3, attn_implementation=attn_implementation)
    attention = randomise(attention).double()
    reference = as_multihead(attention)
    query, keys = torch.randn(5, 7, 24).double(), torch.randn(5, 11, 24).double()
    query_position, key_position = torch.randn(7, 24).double(), torch.randn(11, 24).double()
    out, weights = attention(
        query,
        keys,
        query_position=query_position,
        key_bias=attention.key_bias(key_position),
        output_attentions=True,
    )
    expected, expected_weights = reference(
        query + query_position, keys + key_position, keys, average_attn_weights=False
    )
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=0)
    torch.testing.assert_close(weights, expected_weights, atol=1e-12, rtol=0)


def test_cross_attention_takes_images_as_one_packed_sequence():
    attention = CrossAttention(hidden_size=16, num_heads=2, key_value_hidden_size=6).double()
    query, keys = torch.randn(3, 5, 16).double(), torch.randn(4, 2, 6).double()
    segments = {"cu_seqlens_q": torch.tensor([0, 10, 15]), "cu_seqlens_k": torch.tensor([0, 2, 8])}
    out = attention(query, keys, **segments)
    assert out.shape == query.shape
    torch.testing.assert_close(out[:2].flatten(0, 1), attention(query[:2].reshape(1, 10, 16), keys[:1])[0])
    torch.testing.assert_close(out[2:], attention(query[2:], keys[1:].reshape(1, 6, 6)))


def test_positions_follow_the_formula():
    positions = sincos_positions_2d(8, (3, 5)).view(3, 5, 8)
    for row, column in ((0, 0), (2, 1), (1, 4)):
        expected = [wave(p * w) for p in (column, row) for wave in (math.sin, math.cos) for w in (1.0, 0.01)]
        torch.testing.assert_close(positions[row, column], torch.tensor(expected))


def test_resizing_commutes_with_a_linear_map_and_keeps_a_constant():
    positions, weight = sincos_positions_2d(16, (4, 4)).double(), torch.randn(16, 16).double()
    resized = resize_positions(positions, (4, 4), (5, 9))
    assert resized.shape == (45, 16)
    torch.testing.assert_close(resize_positions(positions @ weight, (4, 4), (5, 9)), resized @ weight)
    torch.testing.assert_close(resize_positions(torch.ones(16, 2), (4, 4), (7, 3)), torch.ones(21, 2))
    assert resize_positions(positions, (4, 4), (4, 4)) is positions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [(8, 8), (5, 9), (2, 3), (4, 1)])
def test_positions_are_resized_by_bicubic_interpolation(dtype, target):
    positions = torch.randn(16, 6, dtype=dtype)
    image = positions.to(torch.promote_types(dtype, torch.float32)).T.reshape(1, 6, 4, 4)
    expected = torch.nn.functional.interpolate(image, size=target, mode="bicubic", align_corners=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which does not round the interpolation
        resized = resize_positions(positions, (4, 4), target)
    torch.testing.assert_close(resized, expected[0].flatten(1).T.to(dtype))


def test_one_hot_positions_are_at_right_angles():
    positions = one_hot_positions_2d(22, (3, 4)).view(3, 4, 22)
    for row, column in itertools.product(range(3), range(4)):
        columns, rows = positions[row, column].split(11)
        assert {c * 4 // 11 for c in columns.nonzero().flatten().tolist()} == {column}
        assert {c * 3 // 11 for c in rows.nonzero().flatten().tolist()} == {row}
    assert positions[0, 0] @ positions[1, 1] == 0
    even = one_hot_positions_2d(24, (3, 4))
    torch.testing.assert_close(even.square().mean(-1), torch.full((12,), 0.5))
    assert one_hot_positions_2d(8, (4, 4), dtype=torch.float64).unique(dim=0).shape == (16, 8)
    with pytest.raises(ValueError, match=r"hidden_size=6 must be even and at least 8: .*3 rows and 4 columns"):
        one_hot_positions_2d(6, (3, 4))
    with pytest.raises(ValueError, match=r"hidden_size=4 must be even and at least 6"):
        Resampler(hidden_size=4, num_queries=9, num_heads=2, token_position_embedding="one_hot")


def test_resampler_reads_each_image_alone_and_in_any_grid():
    resampler = randomise(Resampler(hidden_size=16, num_queries=9, num_heads=4, vision_hidden_size=10)).double()
    features = torch.randn(4, 12, 10).double()
    out = resampler(features, grid_size=(3, 4))
    assert out.shape == (4, 9, 16)
    for image in range(4):
        torch.testing.assert_close(out[image], resampler(features[image : image + 1], grid_size=(3, 4))[0])
    assert (out - resampler(features, grid_size=(4, 3))).abs().max() > 1e-4


def test_resampler_sees_where_a_patch_stands():
    resampler = randomise(Resampler(hidden_size=16, num_queries=4, num_heads=2)).double()
    features = torch.randn(1, 16, 16).double()
    assert (resampler(features) - resampler(features.flip(1))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("mlp1x_gelu", ["Linear"]),
        ("mlp2x_gelu", ["Linear", "GELU", "Linear"]),
        ("mlp3x_gelu", ["Linear", "GELU", "Linear", "GELU", "Linear"]),
        ("mlp2x_gelu_norm", ["Linear", "LayerNorm", "GELU", "Linear", "LayerNorm"]),
    ],
)
def test_mlp_connectors_have_the_released_layers(kind, layers):
    connector = build_connector(kind, vision_hidden_size=6, hidden_size=10)
    assert [type(layer).__name__ for layer in connector] == layers
    x = expected = torch.randn(2, 5, 6)
    for layer in connector:
        expected = layer(expected)
    torch.testing.assert_close(connector(x), expected)
    assert connector(x).shape == (2, 5, 10)


def test_other_connectors():
    x = torch.randn(2, 9, 6)
    assert set(build_connector("linear", vision_hidden_size=6, hidden_size=8).state_dict()) == {"weight", "bias"}
    assert build_connector("identity", vision_hidden_size=6, hidden_size=6)(x) is x
    resampler = build_connector("resampler", vision_hidden_size=6, hidden_size=8, num_queries=4, num_heads=2)
    assert isinstance(resampler, Resampler)
    assert resampler(x).shape == (2, 4, 8)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mlp0x_gelu", {}, "kind='mlp0x_gelu' is not a connector; choose"),
        ("mlp2x_relu", {}, "kind='mlp2x_relu' is not a connector"),
        ("identity", {}, "vision_hidden_size=6 and hidden_size=8; choose 'linear'"),
        ("linear", {"num_queries": 4}, "'linear' has no options but got num_queries"),
    ],
)
def test_wrong_connectors_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        build_connector(kind, vision_hidden_size=6, hidden_size=8, **options)
