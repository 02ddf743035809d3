"""The bound on the size of an image within an image processor, against the sizes that processors resize to."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image
from transformers import image_processing_backends

from idavlm._compat import pil_image_processor
from idavlm.data import DataError
from idavlm.experimental.small_models import small_tokenizer
from idavlm.models import IDAVLMProcessor
from idavlm.models.resized_size import resized_size
from tests.small_models import TEXTS

SIZES = [(2, 100), (100, 2), (30, 40), (300, 200), (1, 1)]
KINDS = [
    ("clip", "CLIPImageProcessor", {}),
    ("clip", "CLIPImageProcessor", {"size": {"height": 224, "width": 224}, "do_center_crop": False}),
    ("clip", "CLIPImageProcessor", {"do_resize": False}),
    ("siglip", "SiglipImageProcessor", {}),
    ("vit", "ViTImageProcessor", {}),
    ("deit", "DeiTImageProcessor", {}),
    ("beit", "BeitImageProcessor", {}),
    ("bit", "BitImageProcessor", {}),
    ("chameleon", "ChameleonImageProcessor", {}),
    ("convnext", "ConvNextImageProcessor", {}),
    ("convnext", "ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    ("efficientnet", "EfficientNetImageProcessor", {}),
    ("levit", "LevitImageProcessor", {}),
    ("llava", "LlavaImageProcessor", {}),
    ("llava", "LlavaImageProcessor", {"do_pad": True}),
    ("mobilenet_v2", "MobileNetV2ImageProcessor", {}),
    ("mobilevit", "MobileViTImageProcessor", {}),
    ("perceiver", "PerceiverImageProcessor", {}),
    ("poolformer", "PoolFormerImageProcessor", {}),
    ("poolformer", "PoolFormerImageProcessor", {"size": {"height": 224, "width": 224}}),
    ("sam", "SamImageProcessor", {}),
]


@pytest.mark.parametrize(("model", "name", "options"), KINDS)
def test_no_processor_resizes_to_more(monkeypatch, model, name, options):
    processor = pil_image_processor(model, name)(**options)
    made = []
    resize = image_processing_backends.np_resize

    def recorded(image, size, **more):
        made.append(tuple(size))
        made.append(image.shape[-2:])
        return resize(image, size, **more)

    monkeypatch.setattr(image_processing_backends, "np_resize", recorded)
    for height, width in SIZES:
        made.clear()
        processor([Image.new("RGB", (width, height))], return_tensors="pt")
        bound = resized_size(processor, (height, width))
        assert made or not processor.do_resize
        for size in made:
            assert size[0] * size[1] <= bound[0] * bound[1], (size, bound)


def clip(**options):
    return pil_image_processor("clip", "CLIPImageProcessor")(**options)


def processor_of(image_processor):
    return IDAVLMProcessor(image_processor, small_tokenizer(TEXTS, vocab_size=320), image_seq_length=4)


CROPPED = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
STRETCHED = {"size": {"height": 336, "width": 336}, "do_center_crop": False}


def test_a_strip_is_refused_before_it_is_resized(tmp_path):
    """A PNG of 1 x 5000 pixels has about 100 bytes. Resized so that its width is 336, it would have 6 GB."""
    Image.new("RGB", (1, 5000)).save(tmp_path / "strip.png")
    for options in (CROPPED, STRETCHED):
        processor = processor_of(clip(**options))
        tracemalloc.start()
        with pytest.raises(DataError, match=r"'strip.png' has 1 x 5000 pixels, an aspect ratio of 5000.*; crop or pad"):
            processor.load_image(tmp_path, "strip.png")
        with pytest.raises(ValueError, match=r"'images\[1\]' has 1 x 5000 pixels, an aspect ratio of 5000"):
            processor(images=[Image.new("L", (9, 9)), Image.new("L", (1, 5000))], text="<image><image>")
        with pytest.raises(DataError, match=r"images\[0\] has 1 x 5000 pixels, an aspect ratio of 5000"):
            processor(images=[np.zeros((5000, 1, 3), np.uint8)], text="<image>")
        assert tracemalloc.get_traced_memory()[1] < 5e6
        tracemalloc.stop()


def test_the_limit_follows_from_the_settings_of_the_processor(tmp_path):
    Image.new("RGB", (2, 300)).save(tmp_path / "strip.png")  # an aspect ratio of 150
    height, width = processor_of(clip(**CROPPED)).load_image(tmp_path, "strip.png")[1]
    assert (height, width) == (300, 2)
    large = {"size": {"shortest_edge": 700}, "crop_size": {"height": 64, "width": 64}}
    with pytest.raises(DataError, match=r"would resize it to 700 x 105000 pixels, more than max_pixels=64000000"):
        processor_of(clip(**large)).load_image(tmp_path, "strip.png")
    assert processor_of(clip(**{**large, "do_resize": False})).load_image(tmp_path, "strip.png")[1] == (300, 2)
    padding = pil_image_processor("llava", "LlavaImageProcessor")(do_pad=True)
    Image.new("L", (100, 9000)).save(tmp_path / "strip.png")
    with pytest.raises(DataError, match=r"would resize it to 9000 x 9000 pixels"):
        processor_of(padding).load_image(tmp_path, "strip.png")


def test_an_image_that_the_processor_refuses_is_an_error_of_the_image(tmp_path):
    """BridgeTower's processor resizes a wide image to a height of 0."""
    processor = processor_of(pil_image_processor("bridgetower", "BridgeTowerImageProcessor")())
    Image.new("RGB", (50, 40)).save(tmp_path / "good.png")
    Image.new("RGB", (200, 1)).save(tmp_path / "strip.png")
    processor.load_image(tmp_path, "good.png")
    with pytest.raises(DataError, match=r"'strip.png' of 200 x 1 pixels cannot be prepared by BridgeTower.*ValueError"):
        processor.load_image(tmp_path, "strip.png")


def test_an_image_that_comes_out_with_another_shape_is_an_error_of_the_image(tmp_path):
    class Uneven(pil_image_processor("clip", "CLIPImageProcessor")):
        def center_crop(self, image, size, **more):
            return image if image.shape[-1] > 3 * image.shape[-2] else super().center_crop(image, size, **more)

    processor = processor_of(Uneven(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))
    Image.new("RGB", (100, 10)).save(tmp_path / "wide.png")
    with pytest.raises(DataError, match=r"its output has shape \[3, 32, 320\] in place of \[3, 32, 32\]") as caught:
        processor.load_image(tmp_path, "wide.png")
    assert (caught.value.kind, caught.value.file) == ("image", "wide.png")
