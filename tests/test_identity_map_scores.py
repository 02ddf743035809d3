"""Scores that are read from the identity map alone."""

import pytest
import torch
from torch import nn

from idavlm.data import parse_sample
from idavlm.evaluation import score_identity_maps
from idavlm.evaluation.identity_map_scores import box_of_strongest
from idavlm.modules import identity_patch_targets
from idavlm.utils import ImageRole
from tests import small_models

NAMES = [f"{name}-{number}.png" for name in ("kate", "tom", "mia") for number in range(3)] + small_models.IMAGES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return small_models.draw_images(tmp_path_factory.mktemp("images"), NAMES)


@pytest.fixture(scope="module")
def processor():
    return small_models.small_processor()


def location(root, people=("Kate", "Tom"), number=0):
    return parse_sample(small_models.record(number, people=people, answer=False), where="test", image_root=root)


def matching(root, answer: int, name="kate"):
    record = {
        "id": f"{name}-{answer}",
        "type": "matching",
        "source": "identity",
        "identities": [{"name": name.title(), "images": [f"{name}.png" if name != "mia" else "other.png"]}],
        "messages": [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": f"{name}-{number}.png"} for number in range(3)),
                    {"type": "text", "text": f"Which picture shows {name.title()}?"},
                ],
            }
        ],
        "answer": f"Picture {answer}",
    }
    return parse_sample(record, where="test", image_root=root)


class PlantedMaps(nn.Module):
    """A model whose identity maps are given: ``maps(roles, sample_index)`` -> ``[I, P, G + 1]``."""

    def __init__(self, maps):
        super().__init__()
        self.id_former = nn.Identity()
        self.device = torch.device("cpu")
        self.maps = maps

    def encode_images(self, *, image_roles, sample_index, output_identity_maps, **images):
        assert output_identity_maps
        maps = self.maps(image_roles, sample_index)
        return None, (torch.full_like(maps, torch.nan), maps), (8, 8)


def test_the_box_with_the_attention_of_its_identity_is_found(root, processor):
    """Maps made from the boxes score 1, those of the other identity 0, and equal shares count as wrong."""
    samples = [location(root), location(root, ("Tom", "Kate"), 1)]
    boxes = torch.tensor([box.box for box in samples[0].boxes], dtype=torch.float)  # the first box is the target's

    def targets():
        sizes = torch.tensor([[60, 80]])
        return identity_patch_targets(boxes, torch.zeros(2, dtype=torch.long), torch.arange(2), sizes, (8, 8))[0]

    def maps(columns):
        def planted(roles, _):
            found = torch.zeros(len(roles), 64, 3)
            for column in (0, 1):
                found[roles == ImageRole.SCENE, :, column] = (targets() == columns[column]).float()
            return found

        return PlantedMaps(planted)

    right = score_identity_maps(maps((0, 1)), processor, samples)
    scores = right.summary["location"]["metrics"]
    assert [prediction.id for prediction in right.predictions] == ["0", "1"]
    assert scores["right_box"] == 1
    assert scores["mean_iou"] > 0.6
    assert right.summary["location"]["chance"]["right_box"] == 0.5
    swapped = score_identity_maps(maps((1, 0)), processor, samples).summary["location"]["metrics"]
    assert swapped["right_box"] == 0
    assert swapped["mean_iou"] < 0.1
    equal = score_identity_maps(PlantedMaps(lambda roles, _: torch.ones(len(roles), 64, 3)), processor, samples)
    assert equal.summary["location"]["metrics"]["right_box"] == 0


def test_the_image_with_the_strongest_patches_is_chosen(root, processor):
    samples = [matching(root, 3), matching(root, 1, "tom")]

    def strongest(roles, sample_index):
        found = torch.full((len(roles), 64, 2), 0.1)
        for sample in (0, 1):
            scenes = ((roles == ImageRole.SCENE) & (sample_index == sample)).nonzero().flatten()
            found[scenes[2 if sample == 0 else 1], :8, 0] = 0.9
        return found

    batched = score_identity_maps(PlantedMaps(strongest), processor, samples)
    assert [prediction.text for prediction in batched.predictions] == ["Picture 3", "Picture 2"]
    assert [prediction.scores["accuracy"] for prediction in batched.predictions] == [1, 0]
    assert batched.summary["matching"]["chance"] == {"accuracy": pytest.approx(1 / 3)}
    ties = score_identity_maps(PlantedMaps(lambda roles, _: torch.ones(len(roles), 64, 2)), processor, samples)
    assert ties.summary["matching"]["metrics"] == {"accuracy": 0}


def test_a_real_model_is_scored_with_right_and_wrong_references(root, processor, monkeypatch):
    """Wrong references show other identities; the batch size does not matter; what cannot be scored is left out."""
    model = small_models.answering_model(processor)
    samples = [location(root, ("Kate",)), location(root, ("Tom",), 1)]
    samples += [matching(root, 1), matching(root, 2, "tom"), matching(root, 3, "mia")]
    seen, encode_images = [], model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda **inputs: seen.append(inputs) or encode_images(**inputs))
    several = score_identity_maps(model, processor, samples)
    score_identity_maps(model, processor, samples, references="wrong")
    same = [a.equal(b) for a, b in zip(*(inputs["pixel_values"] for inputs in seen), strict=True)]
    assert same == (seen[0]["image_roles"] == ImageRole.SCENE).tolist()
    single = score_identity_maps(model, processor, samples, batch_size=1)
    assert [found.id for found in several.predictions] == ["0", "1", "kate-1", "tom-2", "mia-3"]
    assert several.predictions == single.predictions

    absent = small_models.record(people=("Kate", "Tom"), answer=False)
    absent["boxes"] = absent["boxes"][1:]
    absent = parse_sample(absent | {"answer": "Not here."}, where="test", image_root=root)
    assert score_identity_maps(model, processor, [absent]).predictions == []
    resampler = small_models.small_model(processor, connector="resampler")
    with pytest.raises(ValueError, match="has no ID-Former"):
        score_identity_maps(resampler, processor, samples)
    with pytest.raises(ValueError, match="references='none'"):
        score_identity_maps(model, processor, samples, references="none")


def test_a_box_is_drawn_around_connected_patches():
    """Weaker patches and strong ones elsewhere are outside; rows are heights."""
    shares = torch.zeros(4, 5)
    shares[1, 1], shares[1, 2], shares[2, 2], shares[3, 2] = 1.0, 0.5, 0.6, 0.4
    shares[3, 4] = 0.9
    assert box_of_strongest(shares, (400, 1000)) == [200, 100, 600, 300]
    shares[0, 0] = 2.0  # the strongest one has no neighbour of half its share
    assert box_of_strongest(shares, (400, 1000)) == [0, 0, 200, 100]
