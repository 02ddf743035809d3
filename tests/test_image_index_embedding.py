"""ImageIndexEmbedding: images are numbered within their sample; references are not counted."""

import pytest
import torch

from idavlm import ImageIndexEmbedding
from idavlm.models import IDAVLMConfig, IDAVLMForConditionalGeneration
from tests.small_models import sample, small_model

REFERENCE, SCENE, GENERAL = 0, 1, 2


def test_images_are_counted_within_their_sample():
    embedding = ImageIndexEmbedding(2, 4)
    roles = torch.tensor([REFERENCE, SCENE, REFERENCE, SCENE, GENERAL, REFERENCE, SCENE])
    embedded = embedding.embed_images(roles, torch.tensor([0, 0, 0, 0, 1, 2, 2]))
    zero = torch.zeros(4)
    first, second = embedding.weight
    assert torch.equal(embedded, torch.stack([zero, first, zero, second, first, zero, first]))
    assert embedding.embed_images(roles[:0], roles[:0]).shape == (0, 4)


def test_more_images_than_embeddings():
    with pytest.raises(ValueError, match=r"3 images \(references not counted\) but max_images=2"):
        ImageIndexEmbedding(2, 4).embed_images(torch.tensor([SCENE] * 3), torch.tensor([5] * 3))
    with pytest.raises(ValueError, match="max_images=-1"):
        IDAVLMConfig(max_images=-1)


@pytest.mark.parametrize("connector", ["id_former", "resampler"])
def test_tokens_are_embedded_after_any_connector(processor, root, connector):
    without = small_model(processor, connector=connector)
    model = small_model(processor, connector=connector, max_images=3)
    model.load_state_dict(without.state_dict(), strict=False)
    batch = processor.collate([processor.encode(sample(root, people=people)) for people in (("Kate", "Tom"), ("Tom",))])
    images = [batch[name] for name in ("image_roles", "sample_index", "identity_index")]
    before, after = (each.eval().encode_images(batch["pixel_values"], None, *images)[0] for each in (without, model))
    embedded = model.image_index_embedding.embed_images(*images[:2])
    torch.testing.assert_close(after - before, embedded[:, None].expand_as(before))
    batch.pop("source", None)
    model.train()(**batch).loss.backward()
    assert model.image_index_embedding.weight.grad.norm(dim=1).gt(0).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="without sample_index"):
        model.encode_images(batch["pixel_values"])


def test_saved_loaded_and_new(processor, tmp_path):
    small_model(processor).save_pretrained(tmp_path / "without")
    new = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "without", max_images=4)
    assert 0.5 < new.image_index_embedding.weight.std() < 2  # initialised, not whatever was in memory
    new.save_pretrained(tmp_path / "with")
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "with")
    assert torch.equal(loaded.image_index_embedding.weight, new.image_index_embedding.weight)
