"""Wrong input is a ValueError that names the argument, the value and the remedy."""

import pytest
import torch

from idavlm import CrossAttention, IDFormer, Resampler

SIZES = {"hidden_size": 16, "num_queries": 4, "num_heads": 2}
FEATURES = torch.zeros(3, 9, 16)
ROLES = torch.tensor([0, 0, 1])
INDEX = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide hidden_size=16"),
        ({"num_heads": 0}, "num_heads=0 must be an integer of at least 1"),
        ({"hidden_size": 18}, "hidden_size=18 must be divisible by 4"),
        ({"num_queries": 5}, "num_queries=5 is not a square number.*choose 4 or 9"),
        ({"num_queries": 2.0}, "num_queries=2.0 must be an integer"),
        ({"num_identity_layers": 0}, "num_identity_layers=0 must be"),
        ({"attn_implementation": "flash"}, "attn_implementation='flash'.*'eager', 'sdpa'"),
        ({"gate": "sigmoid"}, "gate='sigmoid'.*'zero_init', 'tanh', 'none'"),
        ({"token_position_embedding": "rows"}, "token_position_embedding='rows'.*None, 'sincos', 'one_hot'"),
        ({"feed_forward": "both"}, "feed_forward='both'.*'none', 'identity', 'all'"),
        ({"identity_keys": "values"}, "identity_keys='values'.*'tokens', 'patches'"),
        ({"identity_embedding": "learned", "max_identities": -1}, "max_identities=-1 must be"),
        ({"max_identities": 2}, "identity_embedding=None and max_identities=2"),
        ({"identity_embedding": "learned"}, "identity_embedding='learned' and max_identities=None"),
        ({"identity_embedding": "names"}, "identity_embedding='names'.*None, 'learned', 'name'"),
        (
            {"output_size": 24},
            "output_size=24 differs from hidden_size=16, .* set output_proj=True",
        ),
        ({"output_size": 0, "output_proj": True}, "output_size=0 must be"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be"),
        ({"vision_hidden_size": 0}, "vision_hidden_size=0 must be"),
    ],
)
def test_constructor(change, message):
    with pytest.raises(ValueError, match=message):
        IDFormer(**{**SIZES, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FEATURES[0], ROLES, INDEX), r"image_features has shape \(9, 16\); expected \[I, P, 16\]"),
        ((FEATURES[..., :8], ROLES, INDEX), r"image_features has shape \(3, 9, 8\)"),
        ((FEATURES[:, :7], ROLES, INDEX), "P, the number of patches of image_features,=7 is not a square number"),
        ((FEATURES, ROLES[:2], INDEX), r"image_roles has shape \(2,\).*image_features has 3 images"),
        ((FEATURES, ROLES.float(), INDEX), r"image_roles has shape \(3,\) and dtype torch.float32"),
        ((FEATURES, torch.tensor([0, 3, 1]), INDEX), r"image_roles\[1\]=3 is not a role; use 0 \(reference\)"),
        ((FEATURES, torch.tensor([0, 1, -1]), INDEX), r"image_roles\[2\]=-1 is not a role"),
        ((FEATURES, ROLES, INDEX[:1]), r"sample_index has shape \(1,\)"),
        ((FEATURES, ROLES, torch.tensor([0, 1, 0])), r"sample_index\[2\]=0 follows 1.*sort the images"),
        ((FEATURES, ROLES, torch.tensor([-1, 0, 0])), r"sample_index\[0\]=-1 follows the start"),
        ((FEATURES, ROLES, INDEX, torch.tensor([0])), r"identity_index has shape \(1,\)"),
        ((FEATURES, ROLES, INDEX, torch.tensor([0, -1, 0])), r"identity_index\[1\]=-1 belongs to a reference"),
        ((FEATURES, ROLES, INDEX, torch.tensor([0, 2, 0])), r"identity_index\[1\]=2 belongs to .* with 2 references"),
        ((FEATURES, [0, 0, 1], INDEX), r"image_roles is a list; pass a tensor of \[3\] integers"),
    ],
)
def test_forward(arguments, message):
    with pytest.raises(ValueError, match=message):
        IDFormer(**SIZES)(*arguments)


def test_grid_size_must_fit_the_patches():
    id_former = IDFormer(**SIZES)
    with pytest.raises(ValueError, match=r"grid_size=\(2, 4\) has 8 cells but image_features has 9 patches"):
        id_former(FEATURES, ROLES, INDEX, grid_size=(2, 4))
    with pytest.raises(ValueError, match=r"grid_size=9 must be a pair"):
        id_former(FEATURES, ROLES, INDEX, grid_size=9)
    with pytest.raises(ValueError, match=r"grid_size\[0\]=-3 must be an integer of at least 1"):
        id_former(FEATURES, ROLES, INDEX, grid_size=(-3, -3))
    assert id_former(FEATURES[:, :8], ROLES, INDEX, grid_size=(2, 4)).shape == (3, 4, 16)


def test_more_identities_than_embeddings():
    with pytest.raises(ValueError, match=r"2 identities but max_identities=1; .* max_identities=2 or more"):
        IDFormer(**SIZES, identity_embedding="learned", max_identities=1)(FEATURES, ROLES, INDEX)


def test_a_bank_from_another_id_former():
    bank = [IDFormer(**{**SIZES, "hidden_size": 8}).encode_references(FEATURES[..., :8])]
    with pytest.raises(ValueError, match=r"identities\[0\]\.keys has shape \(3, 4, 8\).*16"):
        IDFormer(**SIZES).forward_scenes(FEATURES, bank)


@pytest.mark.parametrize("module", [CrossAttention, Resampler])
def test_parts_check_as_well(module):
    sizes = {**SIZES, "num_heads": 5}
    if module is CrossAttention:
        del sizes["num_queries"]
    with pytest.raises(ValueError, match="num_heads=5 does not divide hidden_size=16"):
        module(**sizes)
