"""Labels of patches from boxes, and the loss on the identity map."""

import math

import pytest
import torch

from idavlm import identity_map_loss, identity_patch_targets
from idavlm.modules import NULL, identities_of_scenes
from idavlm.modules.identity_map import connected_cells
from idavlm.utils import IGNORE_INDEX

X, N = IGNORE_INDEX, NULL


def targets(boxes, identities=None, *, size=(40, 40), grid=(4, 4), **options):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    identities = list(range(len(boxes))) if identities is None else identities
    found = identity_patch_targets(
        boxes,
        torch.zeros(len(boxes), dtype=torch.long),
        torch.tensor(identities, dtype=torch.long),
        torch.tensor([size]),
        grid,
        **options,
    )
    return found.view(grid).tolist()


def test_a_box_on_patch_edges():
    assert targets([[10, 0, 30, 20]]) == [[N, 0, 0, N], [N, 0, 0, N], [N] * 4, [N] * 4]


def test_pixels_belong_to_the_original_image():
    """A wide image: 80 x 40 pixels, four columns of 20 pixels and four rows of 10."""
    assert targets([[20, 0, 60, 20]], size=(40, 80)) == [[N, 0, 0, N], [N, 0, 0, N], [N] * 4, [N] * 4]


def test_a_patch_cut_by_an_edge_is_half_or_left_out():
    """Half covered counts (the default threshold). A quarter does not, and is not NULL either."""
    assert targets([[5, 0, 22.5, 10]])[0] == [0, 0, X, N]
    assert targets([[5, 0, 22.5, 10]], min_coverage=0.2)[0] == [0, 0, 0, N]


def test_a_box_smaller_than_a_patch_counts_where_it_lies():
    assert targets([[12, 2, 15, 5]])[0] == [N, 0, N, N]
    assert targets([[8, 8, 12, 12]]) == [[X, X, N, N], [X, X, N, N], [N] * 4, [N] * 4]


def test_a_patch_claimed_by_two_is_left_out():
    assert targets([[0, 0, 20, 10], [10, 0, 30, 10]])[0] == [0, X, 1, N]


def test_two_boxes_of_one_identity_do_not_conflict():
    assert targets([[0, 0, 20, 10], [10, 0, 30, 10]], [1, 1])[0] == [1, 1, 1, N]


def test_a_box_reaching_out_of_the_image_is_cut():
    assert targets([[-50, -50, 10, 10]])[0] == [0, N, N, N]


def test_no_box_means_null():
    assert targets([]) == [[N] * 4] * 4


def test_only_scenes_are_labelled():
    found = identity_patch_targets(
        torch.tensor([[0.0, 0, 10, 10]]),
        torch.tensor([1]),
        torch.tensor([0]),
        torch.tensor([[10, 10], [10, 10], [10, 10]]),
        (2, 2),
        image_roles=torch.tensor([0, 1, 2]),
    )
    assert found.tolist() == [[X] * 4, [0] * 4, [X] * 4]


def test_against_counting_pixels():
    """Random boxes on whole pixels; the share of a patch is counted pixel by pixel."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        corner = torch.randint(0, 50, (2,), generator=generator)
        box = torch.cat([corner, corner + torch.randint(8, 30, (2,), generator=generator)])
        pixels = torch.zeros(60, 60)
        pixels[box[1] : box[3], box[0] : box[2]] = 1
        cut = torch.minimum(box, torch.tensor(60))
        area = min(100, int((cut[2] - cut[0]) * (cut[3] - cut[1])))
        share = pixels.view(6, 10, 6, 10).sum((1, 3)) / area
        expected = torch.where(share >= 0.5, 0, torch.where(share > 0, X, N))
        assert targets([box.tolist()], size=(60, 60), grid=(6, 6)) == expected.tolist()


def call(**change):
    arguments = {
        "boxes": torch.tensor([[0.0, 0.0, 5.0, 5.0]]),
        "box_image": torch.tensor([0]),
        "box_identity": torch.tensor([0]),
        "image_sizes": torch.tensor([[10, 10]]),
        "grid_size": (2, 2),
    }
    return identity_patch_targets(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(1, 3)}, r"boxes has shape \(1, 3\)"),
        ({"boxes": torch.tensor([[5.0, 0, 5, 5]])}, r"boxes\[0\]=\[5.0, 0.0, 5.0, 5.0\] is empty"),
        ({"boxes": torch.tensor([[20.0, 0, 30, 5]])}, r"boxes\[0\]=\[20.0, 0.0, 30.0, 5.0\] lies outside"),
        ({"box_image": torch.tensor([1])}, r"box_image\[0\]=1 is out of range; the batch has 1"),
        ({"box_image": torch.tensor([0, 0])}, r"box_image has shape \(2,\).*expected \[1\]"),
        ({"box_identity": torch.tensor([-1])}, r"box_identity\[0\]=-1 must be at least 0"),
        ({"image_sizes": torch.tensor([10, 10])}, r"image_sizes has shape \(2,\)"),
        ({"image_roles": torch.tensor([2])}, r"box_image\[0\]=0 has role 2; boxes belong to scenes"),
        ({"image_roles": torch.tensor([1, 1])}, r"image_roles has shape \(2,\)"),
        ({"min_coverage": 0.0}, "min_coverage=0.0 must lie in"),
    ],
)
def test_wrong_boxes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_loss_is_the_mean_log_share_of_the_labelled():
    attention = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]]], requires_grad=True)
    loss = identity_map_loss(attention, torch.tensor([[0, X, N]]), torch.tensor([[True, True]]))
    assert math.isclose(loss.item(), (math.log(2) + math.log(2)) / 2, rel_tol=1e-6)
    loss.backward()
    assert not attention.grad[0, 1].any()


def test_loss_without_labels_is_zero_and_in_the_graph():
    attention = torch.full((1, 2, 2), 0.5, requires_grad=True)
    loss = identity_map_loss(attention, torch.full((1, 2), X), torch.tensor([[True]]))
    loss.backward()
    assert loss == 0
    assert not attention.grad.any()


def test_wrong_targets_are_named():
    attention = torch.full((1, 2, 3), 1 / 3)
    for wrong in (2, 3, -7):
        with pytest.raises(ValueError, match=rf"targets\[0, 1\]={wrong}, but image 0 has no reference"):
            identity_map_loss(attention, torch.tensor([[0, wrong]]), torch.tensor([[True, True]]))
    with pytest.raises(
        ValueError, match=r"targets\[0, 0\]=0, but image 0 has no reference of that identity \(it has \[1\]"
    ):
        identity_map_loss(attention, torch.tensor([[0, 1]]), torch.tensor([[False, True]]))
    with pytest.raises(ValueError, match=r"identity_map has shape \(1, 2, 3\) and targets \(2,\)"):
        identity_map_loss(attention, torch.tensor([0, 1]), torch.tensor([[True, True]]))
    with pytest.raises(ValueError, match=r"has_reference has shape \(1, 3\)"):
        identity_map_loss(attention, torch.tensor([[0, 1]]), torch.ones(1, 3, dtype=torch.bool))


def test_without_null_token_the_loss_leaves_null_out(small_id_former):
    features, index = torch.randn(2, 9, 12, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    roles = torch.tensor([0, 1])
    labels = torch.full((2, 9), X)
    labels[1] = torch.tensor([0] * 3 + [N] * 6)
    for null_token in (False, True):
        id_former = small_id_former(null_token=null_token)
        _, maps = id_former(features, roles, index, output_attentions=True)
        loss = id_former.identity_map_loss(maps, labels, roles, index)
        share = maps[0][1, :, 0].log()[:3].sum()
        if null_token:
            torch.testing.assert_close(loss, -(share + maps[0][1, :, 1].log()[3:].sum()) / 9)
        else:
            assert abs(loss) < 1e-6  # one reference: the softmax over it alone is 1


def test_attention_that_underflows_to_zero_is_not_a_missing_reference():
    """A confident wrong map has a large loss; right data are never blamed for it."""
    sure_of_null = torch.tensor([[[0.0, 0.0, 1.0]] * 2])
    loss = identity_map_loss(sure_of_null, torch.tensor([[0, N]]), torch.tensor([[True, False]]))
    assert loss > 40
    assert torch.isfinite(loss)
    without_references = identity_map_loss(sure_of_null, torch.tensor([[N, N]]), torch.tensor([[False, False]]))
    assert without_references == 0


@pytest.mark.parametrize("difference", [10, 100, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saturated_attention_keeps_its_supervision(small_id_former, difference, dtype):
    """The identity attention is certain of null, up to differences of scores that no softmax can represent."""
    id_former = small_id_former(null_token=True, num_identity_heads=1, dtype=torch.float32)
    attention = id_former.identity_layers[0].attention
    with torch.no_grad():  # scores: a constant for null, about 0 for the reference
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        attention.q_proj.bias[0] = 1
        attention.k_proj.weight.fill_diagonal_(1)
        id_former.null_token.zero_()
        id_former.null_token[0, 0] = min(difference * 16**0.5, torch.finfo(dtype).max)
    roles, index = torch.tensor([0, 1]), torch.tensor([0, 0])
    _, maps = id_former.to(dtype)(torch.randn(2, 9, 12, dtype=dtype), roles, index, output_attentions=True)
    labels = torch.tensor([[X] * 9, [0] * 4 + [N] * 5])
    assert torch.isfinite(id_former.identity_map_loss(maps, labels, roles, index))


def test_identities_of_scenes_follow_the_roles():
    roles = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1])
    samples = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3])
    numbered = identities_of_scenes(roles, samples, torch.tensor([0, 1, 1, 0, 0, 0, 0, 9]), 2)
    each_its_own = identities_of_scenes(roles, samples, None, 3)
    assert numbered.nonzero().tolist() == [[3, 0], [3, 1], [7, 0]]
    assert each_its_own.nonzero().tolist() == [[3, 0], [3, 1], [3, 2], [7, 0]]
    assert identities_of_scenes(roles[:0], samples[:0], None, 2).shape == (0, 2)


def test_the_loss_of_a_batch_is_the_mean_of_its_images():
    """However the images are split into batches."""
    maps = torch.rand(4, 5, 3).softmax(-1)
    labels = torch.tensor([[0, X, N, X, X], [1] * 5, [X] * 5, [N] * 5])
    known = torch.tensor([[True, True]] * 4)
    per_image = identity_map_loss(maps, labels, known, reduction="none")
    assert per_image[2] == 0
    torch.testing.assert_close(identity_map_loss(maps, labels, known), per_image.sum() / 3)
    parts = [identity_map_loss(maps[i : i + 1], labels[i : i + 1], known[:1]) for i in range(4)]
    torch.testing.assert_close(per_image, torch.stack(parts))


def test_connected_cells():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert connected_cells(mask, 0).int().tolist() == [[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert connected_cells(mask, 0, diagonals=False).nonzero().tolist() == [[0, 0], [0, 1]]
    assert connected_cells(mask, 12).sum() == 1
    assert connected_cells(mask, 2) is None
