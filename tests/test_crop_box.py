"""Boxes when an image processor crops or pads. The crop is measured by colours, not derived from settings."""

import pytest
import torch
from PIL import Image, ImageDraw

from idavlm.data import parse_sample
from idavlm.experimental.small_models import small_image_processor, small_tokenizer
from idavlm.models import IDAVLMProcessor
from idavlm.models.crop_box import FULL_IMAGE, crop_box
from idavlm.modules import identity_patch_targets
from tests.small_models import TEXTS, record

CUT = {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}}
CLOSER = {"size": {"shortest_edge": 80}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}}
PADDED = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}}
SIZES = [(96, 128), (128, 96), (80, 80), (300, 211)]


def image_processor(**options):
    """CLIP's, on Pillow."""
    return type(small_image_processor(64))(**options, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({"size": {"height": 64, "width": 64}, "do_center_crop": False}, (96, 128), FULL_IMAGE),
        (CUT, (96, 128), (10 / 85, 0, 74 / 85, 1)),  # 85 pixels wide before the crop
        (CUT, (128, 96), (0, 10 / 85, 1, 74 / 85)),
        (CUT, (80, 80), FULL_IMAGE),
        (CLOSER, (80, 80), (0.1, 0.1, 0.9, 0.9)),
        (PADDED, (80, 80), (-0.3, -0.3, 1.3, 1.3)),
    ],
    ids=["stretched", "wide", "high", "square", "closer", "padded"],
)
def test_known_parts(options, size, expected):
    assert crop_box(image_processor(**options), size) == pytest.approx(expected, abs=4e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [CUT, CLOSER, PADDED], ids=["cut", "closer", "padded"])
def test_targets_lie_on_the_pixels_of_the_identity(tmp_path, options, size):
    """A red box in a black image: patches labelled with it are red, NULL patches are not."""
    height, width = size
    box = [width * 0.3, height * 0.35, width * 0.8, height * 0.75]
    image = Image.new("RGB", (width, height))
    box = [round(edge) for edge in box]
    ImageDraw.Draw(image).rectangle([*box[:2], box[2] - 1, box[3] - 1], fill=(255, 0, 0))
    for name in ("scene.png", "kate.png"):
        image.save(tmp_path / name)
    fields = {"id": "0", "source": "identity", "messages": record()["messages"][2:]}
    fields["messages"][0]["content"] = [{"type": "image", "image": "scene.png"}, {"type": "text", "text": "Kate?"}]
    fields |= {"identities": [{"name": "Kate", "images": ["kate.png"]}]}
    fields |= {"boxes": [{"name": "Kate", "image": "scene.png", "box": box}]}
    tokenizer = small_tokenizer(TEXTS, vocab_size=320)
    processor = IDAVLMProcessor(image_processor(**options), tokenizer, image_seq_length=4, box_format="bins32")
    encoded = processor.encode(parse_sample(fields, where="test.jsonl:1", image_root=tmp_path))
    red = encoded["pixel_values"][1, 0] * 0.2 + 0.4  # rescaled, not normalised
    targets = identity_patch_targets(
        encoded["boxes"], encoded["box_image"], encoded["box_identity"], encoded["image_sizes"], (8, 8)
    )[1].view(8, 8)
    redness = red.view(8, 8, 8, 8).mean((1, 3))
    assert (targets == 0).any()
    assert (redness[targets == 0] > 0.45).all()
    assert (redness[targets == -1] < 0.1).all()


def test_a_person_who_is_cut_off_is_nowhere():
    processor = IDAVLMProcessor(image_processor(**CUT), small_tokenizer(TEXTS, vocab_size=320), image_seq_length=4)
    assert processor._crop([0, 0, 10, 90], (96, 128)) is None
    left, width = 128 * 10 / 85, 128 * 64 / 85
    expected = [128 * (32 - left) / width, 0, 128 * (64 - left) / width, 48]
    assert processor._crop([32, 0, 64, 48], (96, 128)) == pytest.approx(expected, abs=0.5)


def test_text_keeps_the_numbers_of_the_original(tmp_path, root):
    """Prompts and answers refer to the whole image."""
    texts = []
    for options in (CUT, {"size": {"height": 64, "width": 64}, "do_center_crop": False}):
        processor = IDAVLMProcessor(
            image_processor(**options), small_tokenizer(TEXTS, vocab_size=320), image_seq_length=4, box_format="bins32"
        )
        texts.append(processor.encode(parse_sample(record(), where="test.jsonl:1", image_root=root))["input_ids"])
    assert torch.equal(*texts)
