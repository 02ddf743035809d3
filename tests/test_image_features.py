"""Features stored on disk equal those of the tower, and are refused if they come from another one."""

import json

import pytest
import torch

from idavlm.data import DataError, parse_sample
from idavlm.evaluation import evaluate, identity_maps
from idavlm.models import ImageFeatures
from tests.small_models import sample, small_model, small_processor


@pytest.fixture
def model(processor):
    return small_model(processor)


@pytest.fixture
def stored(processor, model, root, tmp_path):
    """A processor like ``processor`` that uses stored features."""
    stored = small_processor()
    stored.image_loader = ImageFeatures.write(tmp_path / "features", model, processor, [sample(root)], batch_size=2)
    return stored


@pytest.fixture
def text():
    """A sample without images."""
    messages = [{"role": "user", "content": "What is Tom doing?"}, {"role": "assistant", "content": "Tom is waving."}]
    return parse_sample({"id": "text", "source": "general", "messages": messages}, where="test.jsonl:2")


def test_losses_and_gradients_are_those_of_the_images(model, processor, stored, root, text):
    model.vision_tower.requires_grad_(False)
    results = []
    for prepare in (processor, stored):
        model.zero_grad()
        batch = prepare.collate([prepare.encode(sample(root)), prepare.encode(text)])
        result = model(**batch)
        result.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": result.loss.detach(), **gradients})
    assert ("pixel_values" in batch) < ("image_features" in batch)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_batch_of_text_alone(model, stored, text):
    batch = stored.collate([stored.encode(text)])
    assert batch["image_features"].shape == (0, 64, 32)
    assert model(**batch).loss.isfinite()


def test_answers_and_maps_are_those_of_the_images(model, processor, stored, root):
    asked = [sample(root, answer=False)]
    expected, result = (evaluate(model, one, asked, max_new_tokens=6) for one in (processor, stored))
    assert result.predictions == expected.predictions
    (expected, grid), (maps, same_grid) = (identity_maps(model, one, asked[0]) for one in (processor, stored))
    assert grid == same_grid == (8, 8)
    assert abs(maps[0] - expected[0]).max() < 1e-5


def test_they_are_opened_again_from_disk(model, processor, stored, root):
    folder = stored.image_loader.folder
    again = ImageFeatures(folder, model, processor)
    seen, size = again(root, "scene.png")
    assert torch.equal(seen, stored.image_loader(root, "scene.png")[0])
    assert size == (60, 80)
    assert again.shape == (3, 64, 32)


def test_the_processor_is_saved_without_them(stored, tmp_path):
    stored.save_pretrained(tmp_path / "processor")
    assert type(stored).from_pretrained(tmp_path / "processor").image_loader is None


def test_features_of_another_tower_are_refused(model, processor, stored):
    with torch.no_grad():
        next(model.vision_tower.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"another vision tower.*write them again"):
        ImageFeatures(stored.image_loader.folder, model, processor)


def test_an_incomplete_set_is_refused(model, processor, stored, root, monkeypatch):
    folder = stored.image_loader.folder
    succeeds = iter([True, False])

    def broken(pixels):
        if next(succeeds):
            return type(model).image_features(model, pixels)
        raise RuntimeError("killed")

    monkeypatch.setattr(model, "image_features", broken)
    with pytest.raises(RuntimeError, match="killed"):
        ImageFeatures.write(folder, model, processor, [sample(root)], batch_size=1)
    with pytest.raises(FileNotFoundError, match=r"index\.json does not exist; ImageFeatures\.write"):
        ImageFeatures(folder, model, processor)


def test_an_image_without_features(stored, root):
    other = sample(root)
    other.identities[0].images[0] = "other.png"
    with pytest.raises(DataError, match=r"image 'other\.png' below .* has no features in"):
        stored.encode(other)


def test_a_grid_that_is_not_square(model, processor, root, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "image_features", lambda pixels: (torch.zeros(len(pixels), 8, 32), (2, 4)))
    with pytest.raises(
        ValueError, match=r"an image has a grid of \(2, 4\) patches; stored features need a square grid"
    ):
        ImageFeatures.write(tmp_path / "features", model, processor, [sample(root)])


def test_samples_without_images(model, processor, tmp_path):
    with pytest.raises(ValueError, match="samples hold no images"):
        ImageFeatures.write(tmp_path / "features", model, processor, [])


def test_pixels_and_features_in_one_batch(processor, stored, root):
    with pytest.raises(ValueError, match=r"samples\[1\] lacks pixel_values"):
        processor.collate([processor.encode(sample(root)), stored.encode(sample(root))])


def test_the_type_of_the_tower_is_kept(processor, root, tmp_path):
    model = small_model(processor).to(torch.bfloat16)
    features = ImageFeatures.write(tmp_path / "features", model, processor, [sample(root)])
    assert json.loads((tmp_path / "features" / "index.json").read_text())["dtype"] == "bfloat16"
    assert features(root, "kate.png")[0].dtype == torch.bfloat16
