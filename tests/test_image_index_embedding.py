"""Marks of pictures by their number within the sample, references not counted."""

import pytest
import torch

from idavlm.models import IDAVLMConfig, IDAVLMForConditionalGeneration
from idavlm.modules import ImageIndexEmbedding
from tests.small_models import sample, small_model

REFERENCE, SCENE, GENERAL = 0, 1, 2


def test_pictures_are_counted_within_their_sample():
    slots = ImageIndexEmbedding(2, 4)
    roles = torch.tensor([REFERENCE, SCENE, REFERENCE, SCENE, GENERAL, REFERENCE, SCENE])
    marks = slots.of(roles, torch.tensor([0, 0, 0, 0, 1, 2, 2]))
    nobody = torch.zeros(4)
    first, second = slots.weight
    assert torch.equal(marks, torch.stack([nobody, first, nobody, second, first, nobody, first]))
    assert slots.of(roles[:0], roles[:0]).shape == (0, 4)


def test_more_pictures_than_slots():
    with pytest.raises(ValueError, match="3 pictures but max_images=2"):
        ImageIndexEmbedding(2, 4).of(torch.tensor([SCENE] * 3), torch.tensor([5] * 3))
    with pytest.raises(ValueError, match="max_images=-1"):
        IDAVLMConfig(max_images=-1)


@pytest.mark.parametrize("connector", ["id_former", "resampler"])
def test_tokens_are_marked_behind_any_connector(processor, root, connector):
    plain = small_model(processor, connector=connector)
    marked = small_model(processor, connector=connector, max_images=3)
    marked.load_state_dict(plain.state_dict(), strict=False)
    batch = processor.collate([processor.encode(sample(root, people=people)) for people in (("Kate", "Tom"), ("Tom",))])
    images = [batch[name] for name in ("image_roles", "sample_index", "identity_index")]
    before, after = (model.eval().encode_images(batch["pixel_values"], None, *images)[0] for model in (plain, marked))
    torch.testing.assert_close(after - before, marked.image_index_embedding.of(*images[:2])[:, None].expand_as(before))
    batch.pop("source", None)
    marked.train()(**batch).loss.backward()
    assert marked.image_index_embedding.weight.grad.norm(dim=1).gt(0).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="without sample_index"):
        marked.encode_images(batch["pixel_values"])


def test_saved_loaded_and_new(processor, tmp_path):
    small_model(processor).save_pretrained(tmp_path / "without")
    new = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "without", max_images=4)
    assert 0.5 < new.image_index_embedding.weight.std() < 2  # a new one, not whatever was in memory
    new.save_pretrained(tmp_path / "with")
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "with")
    assert torch.equal(loaded.image_index_embedding.weight, new.image_index_embedding.weight)
