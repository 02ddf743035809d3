"""Boxes when an image processor crops or pads: against the pixels that the processor keeps."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import BatchFeature

from idavlm._compat import pil_image_processor
from idavlm.data import DataError, parse_sample
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
    assert crop_box(image_processor(**options), size) == pytest.approx(expected, abs=1e-9)


def check_kept_pixels(processor, size: tuple[int, int], *, tolerance: float) -> None:
    """Compare the crop box with the pixels of the output when the processor resizes to the nearest pixel.

    Args:
        tolerance: allowed distance from the kept pixel, relative to the side of the image.
    """
    height, width = size
    step = 255 // max(size)
    columns = np.broadcast_to(np.arange(width) * step, size)
    rows = np.broadcast_to(np.arange(height)[:, None] * step, size)
    images = [
        Image.fromarray(np.repeat(values.astype(np.uint8)[..., None], 3, axis=2))
        for values in (columns, rows, np.zeros(size), np.full(size, 255))
    ]
    column, row, dark, light = (
        processor([image], resample=Image.Resampling.NEAREST, return_tensors="pt")["pixel_values"][0, 0].double()
        for image in images
    )
    left, top, right, bottom = crop_box(processor, size)
    is_image = (light - dark).abs() > 1e-3
    for found, inside, begin, end, length in (
        (column, is_image, left, right, width),
        (row.T, is_image.T, top, bottom, height),
    ):
        index = (found - (dark if found is column else dark.T)) / torch.where(
            inside, light - dark if found is column else (light - dark).T, 1.0
        )
        number = len(index[0])
        place = begin + (torch.arange(number) + 0.5) / number * (end - begin)  # relative to the image
        shown = inside.any(0)
        assert torch.equal(shown, (place > 0) & (place < 1)) or tolerance > 1e-3
        pixel = (index.nan_to_num() * inside).sum(0) / inside.sum(0).clamp(min=1) * 255 / step
        pixel, place = pixel[shown].round(), place[shown] * length
        assert (place >= pixel - tolerance * length - 1e-4).all()
        assert (place <= pixel + 1 + tolerance * length + 1e-4).all()


LLAVA = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
SETTINGS = {
    "stretched": {"size": {"height": 64, "width": 48}, "do_center_crop": False},
    "cut": CUT,
    "closer": CLOSER,
    "padded": PADDED,
    "odd": {**CUT, "size": {"shortest_edge": 37}, "crop_size": {"height": 50, "width": 31}},
    "not resized": {"do_resize": False, "crop_size": {"height": 24, "width": 24}},
    "padded at the end": {
        "size": {"height": 40, "width": 50},
        "do_center_crop": False,
        "do_pad": True,
        "pad_size": {"height": 80, "width": 72},
    },
}


@pytest.mark.parametrize("settings", [*SETTINGS, "llava", "llava pads"])
def test_small_images_are_exact(settings):
    """Every size from 1 to 40 pixels, as far as the sides are not more unequal than 20 to 1."""
    if settings in SETTINGS:
        processor = image_processor(**SETTINGS[settings])
    else:
        processor = pil_image_processor("llava", "LlavaImageProcessor")(**LLAVA, do_pad=settings == "llava pads")
    sides = [1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 20, 23, 31, 40]
    for size in [(height, width) for height in sides for width in sides]:
        if max(size) <= 20 * min(size):
            check_kept_pixels(processor, size, tolerance=0)


COMPUTED = ["bit/Bit", "blip/Blip", "chinese_clip/ChineseCLIP", "clip/CLIP", "deit/DeiT", "llava/Llava", "pvt/Pvt"]
COMPUTED += ["mobilenet_v1/MobileNetV1", "siglip/Siglip", "vit/ViT", "chameleon/Chameleon"]
MEASURED = ["beit/Beit", "convnext/ConvNext", "dpt/DPT", "efficientnet/EfficientNet", "levit/Levit"]
MEASURED += ["mobilevit/MobileViT", "poolformer/PoolFormer"]


@pytest.mark.parametrize("name", [*COMPUTED, *MEASURED])
def test_image_processors_of_transformers(name):
    """With their default settings. Some flip the colours, crop by a share of the image, or resize in another way."""
    model, _, kind = name.partition("/")
    processor = pil_image_processor(model, f"{kind}ImageProcessor")()
    tolerance = 0 if name in COMPUTED else 4e-3
    for size in [(30, 40), (9, 6), (120, 80)]:
        check_kept_pixels(processor, size, tolerance=tolerance)


def test_settings_may_change_later():
    processor = IDAVLMProcessor(image_processor(**CUT), small_tokenizer(TEXTS, vocab_size=320), image_seq_length=4)
    assert processor._crop([0, 0, 80, 80], (80, 80)) == [0, 0, 80, 80]
    processor.image_processor.size = {"shortest_edge": 80}
    assert processor._crop([8, 8, 72, 72], (80, 80)) == pytest.approx([0, 0, 80, 80])
    processor.image_processor = image_processor(**PADDED)
    assert processor._crop([0, 0, 80, 80], (80, 80)) == pytest.approx([15, 15, 65, 65])
    measured = pil_image_processor("convnext", "ConvNextImageProcessor")()
    assert crop_box(measured, (100, 80)) == FULL_IMAGE
    measured.size, measured.crop_pct = {"shortest_edge": 300}, 0.5  # below 384 ConvNeXt's crops
    assert crop_box(measured, (100, 80)) != FULL_IMAGE


class Tiles(type(small_image_processor(64))):
    """Puts two copies of the image side by side."""

    def _preprocess(self, images, **options):
        pixels = super()._preprocess(images, **options)["pixel_values"]
        return BatchFeature({"pixel_values": torch.cat([torch.as_tensor(pixels)] * 2, dim=-1)})


class CornerOnly(type(small_image_processor(64))):
    """Keeps the first 32 x 32 pixels and never resizes."""

    def _preprocess(self, images, **options):
        padded = [np.pad(image, [(0, 0), (0, 32), (0, 32)])[:, :32, :32] for image in images]
        return BatchFeature({"pixel_values": torch.as_tensor(np.stack(padded)).float()})


def test_what_cannot_be_measured_is_an_error():
    with pytest.raises(ValueError, match="image_processor=Tiles does not bring one part of an image to its output"):
        crop_box(Tiles(size={"height": 64, "width": 64}, do_center_crop=False), (80, 100))
    corner = CornerOnly()
    assert crop_box(corner, (64, 128)) == pytest.approx((0, 0, 0.25, 0.5), abs=5e-3)
    with pytest.raises(
        DataError, match="an image of 10 x 12 pixels is too small to find out which part of it CornerOnly"
    ):
        crop_box(corner, (12, 10))


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
