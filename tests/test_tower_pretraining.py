"""Pretraining from boxes: which boxes show one individual, the two losses, and what a tower learns from them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from idavlm import IDAVLMForConditionalGeneration, RecordDataset
from idavlm.data import Sample
from idavlm.data.schema import Box, Identity, Message, Part
from idavlm.datasets import build_characters
from idavlm.experimental import pretrain_tower, small_language_model, small_processor, small_vision_tower
from idavlm.experimental.tower_pretraining import (
    LabelLoss,
    _draw_views,
    _seen,
    _viewed,
    find_appearances,
    individual_loss,
    label_loss,
)
from idavlm.models import ImageFeatures


def record(identities: dict[str, list[str]], boxes: list[Box]) -> Sample:
    images = list(dict.fromkeys(box.image for box in boxes))
    messages = [Message("user", [Part("image", image=image) for image in images])]
    return Sample(
        "", "identity", [Identity(*each) for each in identities.items()], messages, boxes=boxes, image_root=Path("root")
    )


def test_boxes_of_one_individual_are_found_although_names_differ():
    """Through shared reference photos, and through a photo that has a box in another record."""
    samples = [
        record(
            {"Kate": ["a0", "a1"], "Tom": ["b0"]},
            [Box("Kate", "s0", [0, 0, 5, 9], label="waving"), Box("Tom", "s0", [5, 0, 9, 9])],
        ),
        record({"Ida": ["a1"]}, [Box("Ida", "s1", [1, 1, 4, 8], label="reading")]),
        record({"Max": ["b1"]}, [Box("Max", "b0", [2, 2, 7, 7], label="waving")]),
    ]
    found, labels = find_appearances(samples)
    assert labels == ["reading", "waving"]
    root = Path("root")
    kate, tom = found[root, "s0"]
    assert found[root, "s1"][0].individual == kate.individual
    assert found[root, "b0"][0].individual == tom.individual != kate.individual
    assert [kate.label, tom.label, found[root, "s1"][0].label] == [1, -100, 0]


def test_boxes_are_where_the_views_show_them():
    """A white rectangle in a wide image is where its box says; a box that is half outside the view says so."""
    count, height, width = 100, 48, 64
    views = _draw_views(count, torch.Generator().manual_seed(0))
    assert 0.3 < (views[:, 0, 0] < 0).float().mean() < 0.7, "half of the views are mirrored"
    images = torch.zeros(count, 3, height, width)
    images[:, :, 12:32, 20:44] = 1
    sizes = torch.tensor([[height, width]]).expand(count, 2)
    boxes, shares = _seen(torch.tensor([[20.0, 12.0, 44.0, 32.0]]).expand(count, 4), sizes, views)
    torch.testing.assert_close(shares, torch.ones(count))
    for image, box in zip(_viewed(images, views), boxes, strict=True):
        rows, columns = (image[0] > 0.5).nonzero(as_tuple=True)
        found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        torch.testing.assert_close(found.float(), box, atol=0.6, rtol=0)

    shifted = torch.tensor([[[1.0, 1.0], [0.5, 0.0]]])  # shows the image from a quarter of its width on
    box, share = _seen(torch.tensor([[8.0, 0.0, 24.0, 48.0]]), sizes[:1], shifted)
    assert box.tolist() == [[0, 0, 8, 48]]
    assert share.tolist() == [0.5]


def test_the_contrast_is_over_the_other_boxes():
    """Equal to a loop over patches; the own box is no positive and no negative."""
    torch.manual_seed(0)
    patches, inside = torch.randn(5, 6, 8), torch.rand(5, 6) < 0.5
    inside[:, 0] = True
    individuals = torch.tensor([0, 0, 1, 2, 2])
    means = F.normalize(torch.stack([patch[mask].mean(0) for patch, mask in zip(patches, inside, strict=True)]), dim=-1)
    losses = []
    for box in (0, 1, 3, 4):  # the individual of box 2 is in no other box
        for patch in patches[box][inside[box]]:
            others = [other for other in range(5) if other != box]
            energies = (F.normalize(patch, dim=0) @ means[others].T / 0.1).exp()
            same = torch.tensor([bool(individuals[other] == individuals[box]) for other in others])
            losses.append(-(energies[same].sum() / energies.sum()).log())
    torch.testing.assert_close(individual_loss(patches, inside, individuals), torch.stack(losses).mean())
    assert individual_loss(patches[:3], inside[:3], torch.tensor([0, 1, 2])) == 0


def test_labels_are_read_from_the_box_and_from_each_patch():
    logits = torch.zeros(2, 3, 2)
    logits[0, 0, 1] = 6.0  # one of two patches of the first box knows its label 1
    inside = torch.tensor([[True, True, False], [True, False, False]])
    mean, patches = F.cross_entropy(torch.tensor([[0.0, 3.0]]), torch.tensor([1])), logits[0, :2]
    expected = mean + 0.5 * F.cross_entropy(patches, torch.tensor([1, 1]))
    torch.testing.assert_close(label_loss(logits, inside, torch.tensor([1, -100])), expected)
    assert label_loss(logits, inside, torch.tensor([-100, -100])) == 0


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    sizes = {"num_train": 12, "num_test": 5, "num_train_scenes": 12, "num_test_scenes": 4, "num_general": 2}
    records = {"num_train_records": 120, "num_test_records": 2, "num_general_records": 2}
    return build_characters(tmp_path_factory.mktemp("people") / "data", **sizes, **records, num_workers=1)


@pytest.fixture
def model_and_processor(people):
    torch.manual_seed(0)
    processor = small_processor(list(RecordDataset(people / "train.jsonl")), image_size=64)
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=32, layer_type="basic"),
        small_language_model(processor.tokenizer, hidden_size=32),
        processor=processor,
        num_queries=16,
        num_heads=2,
        num_identity_heads=1,
        gate="none",
        identity_keys="patches",
        null_token=True,
        output_proj=True,
    )
    return model, processor


def test_a_tower_learns_individuals_and_labels(people, model_and_processor):
    """Both losses fall below those of guessing; only the tower changes."""
    model, processor = model_and_processor
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples = list(RecordDataset(people / "train.jsonl"))
    log = pretrain_tower(model, processor, samples, steps=40, batch_size=24, logging_steps=10)
    assert [entry["step"] for entry in log] == [10, 20, 30, 40]
    for name in ("individual_loss", "label_loss"):
        assert log[-1][name] < 0.8 * log[0][name], name
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"vision_tower"}


def test_image_tokens_learn_labels(people, model_and_processor, tmp_path):
    """The resampler gets a gradient from the labels of boxes, and none without labels."""
    model, processor = model_and_processor
    samples = list(RecordDataset(people / "train.jsonl"))[:8]
    processor.image_loader = ImageFeatures.write(tmp_path / "features", model, processor, samples)
    without = [replace(sample, boxes=[replace(box, label="") for box in sample.boxes]) for sample in samples]
    names = {name for name, _ in model.named_parameters()}
    for shown, learns in ((samples, True), (without, False)):
        batch = processor.collate([{**processor.encode(sample), "id": sample.id} for sample in samples])
        loss_of_labels = LabelLoss(model, shown)
        model(**{name: value for name, value in batch.items() if name != "sample_ids"}, output_identity_maps=True)
        loss = loss_of_labels(batch)
        model.zero_grad()
        loss.backward()
        assert bool(model.id_former.resampler.attention.v_proj.weight.grad.any()) == learns
        assert (loss.item() > 1) == learns, "about twice the logarithm of 12"
        loss_of_labels.remove()
        assert {name for name, _ in model.named_parameters()} == names
    with pytest.raises(ValueError, match="16 samples have 8 ids"):
        LabelLoss(model, [*samples, *samples])


def test_a_tower_needs_individuals_in_two_images(model_and_processor):
    model, processor = model_and_processor
    with pytest.raises(ValueError, match="no individual with boxes in two images"):
        pretrain_tower(model, processor, [], steps=1)
