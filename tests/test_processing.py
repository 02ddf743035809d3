"""Samples to tensors: text and labels, order and roles of images, boxes, limits; faulty data from file to trainer."""

import functools
import inspect
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, BatchFeature, pipeline

from idavlm.data import DataError, ErrorLog, RecordDataset, chat_templates, parse_sample
from idavlm.experimental.small_models import small_image_processor, small_tokenizer
from idavlm.models import BoxFormat, IDAVLMProcessor
from idavlm.models.crop_box import crop_box
from idavlm.models.packed_identities import unpack_token_identities
from idavlm.modules import identity_patch_targets
from idavlm.training import IDTrainer, IDTrainingArguments
from idavlm.utils import IGNORE_INDEX
from tests.small_models import IMAGES, TEXTS, draw_images, record, sample, small_model, small_processor

REFERENCE, SCENE, GENERAL = 0, 1, 2
QUERIES = 4


def parsed(root, entry):
    return parse_sample(entry, where="r.jsonl:1", image_root=root)


def general_record(**more):
    content = [{"type": "image", "image": "other.png"}, {"type": "text", "text": "Where is Kate?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Nowhere."}]
    return {"id": "g", "source": "general", "messages": messages, **more}


def text(processor, ids, *, placeholder="*"):
    """Decoded, an image as one character however many placeholders it has."""
    decoded = processor.tokenizer.decode(ids)
    return re.sub(f"(?:{re.escape(processor.image_token)}){{{processor.image_seq_length}}}", placeholder, decoded)


def labelled(processor, encoded):
    """What is to be learned: the texts of the runs of labels."""
    runs, before = [], IGNORE_INDEX
    for label in encoded["labels"].tolist():
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [processor.tokenizer.decode(run) for run in runs]


# --- Text and labels -------------------------------------------------------------------------------------------------


def test_identities_stand_before_the_first_user_turn_and_labels_on_the_answers(processor, root):
    encoded = processor.encode(sample(root))
    assert text(processor, encoded["input_ids"]) == (
        "<|user|>Kate is *\nTom is *\n*\nWhere is Kate?<|assistant|>4 5 14 28<|end|>"
        "<|user|>What is Kate doing?<|assistant|>Kate is reading.<|end|>"
    )
    assert labelled(processor, encoded) == ["4 5 14 28<|end|>", "Kate is reading.<|end|>"]
    at_labels = encoded["labels"] != IGNORE_INDEX
    assert torch.equal(encoded["labels"][at_labels], encoded["input_ids"][at_labels])
    assert not (at_labels & (encoded["input_ids"] == processor.image_token_id)).any()
    assert (encoded["input_ids"] == processor.image_token_id).sum() == 3 * QUERIES


def test_the_system_turn_stays_first(processor, root):
    entry = record()
    entry["messages"].insert(0, {"role": "system", "content": "Be brief."})
    encoded = processor.encode(parsed(root, entry))
    assert text(processor, encoded["input_ids"]).startswith("<|system|>Be brief.<|user|>Kate is *\nTom is *\n*\nWhere")
    assert len(labelled(processor, encoded)) == 2


def test_the_prompt_of_generation_is_the_beginning_of_training(processor, root):
    prompt = processor.encode(sample(root, answer=False), add_generation_prompt=True)
    whole = processor.encode(sample(root))
    length = len(prompt["input_ids"])
    assert torch.equal(whole["input_ids"][:length], prompt["input_ids"])
    assert torch.equal(whole["token_identity_index"][:length], prompt["token_identity_index"])
    assert (prompt["labels"] == IGNORE_INDEX).all()
    assert (whole["labels"][:length] == IGNORE_INDEX).all()
    assert whole["labels"][length] != IGNORE_INDEX


def test_formats_of_images_and_identities(root):
    processor = small_processor(image_format="<img>{image}</img>", identity_format="Photo of {name}: {image} ")
    encoded = processor.encode(sample(root, people=("Tom",)))
    assert text(processor, encoded["input_ids"]).startswith(
        "<|user|>Photo of Tom: <img>*</img> <img>*</img>\nWhere is Tom?"
    )


# --- Images ----------------------------------------------------------------------------------------------------------


def test_images_roles_and_sizes_in_order(processor, root, tmp_path):
    draw_images(tmp_path, ["kate.png"], size=(10, 20))
    draw_images(tmp_path, ["kate2.png"], size=(30, 40))
    draw_images(tmp_path, ["tom.png"], size=(50, 60))
    draw_images(tmp_path, ["scene.png"], size=(80, 60))
    draw_images(tmp_path, ["other.png"], size=(100, 70))
    entry = record()
    entry["identities"][0]["images"] = ["kate.png", "kate2.png"]
    entry["messages"][2]["content"] = [{"type": "image", "image": "other.png"}, {"type": "text", "text": "And here?"}]
    encoded = processor.encode(parsed(tmp_path, entry))
    assert encoded["image_roles"].tolist() == [REFERENCE, REFERENCE, REFERENCE, SCENE, SCENE]
    assert encoded["identity_index"].tolist() == [0, 0, 1, 0, 0]
    assert encoded["image_sizes"].tolist() == [[20, 10], [40, 30], [60, 50], [60, 80], [70, 100]]
    assert encoded["pixel_values"].shape == (5, 3, 64, 64)
    for place, name in enumerate(["kate.png", "kate2.png", "tom.png", "scene.png", "other.png"]):
        expected = processor.image_processor(Image.open(tmp_path / name).convert("RGB"), return_tensors="pt")
        torch.testing.assert_close(encoded["pixel_values"][place], expected["pixel_values"][0], rtol=0, atol=0)
    assert text(processor, encoded["input_ids"]).startswith("<|user|>Kate is *\nKate is *\nTom is *\n*\nWhere")


def test_general_samples_and_text_alone(processor, root):
    encoded = processor.encode(parsed(root, general_record()))
    assert encoded["image_roles"].tolist() == [GENERAL]
    assert text(processor, encoded["input_ids"]) == "<|user|>*Where is Kate?<|assistant|>Nowhere.<|end|>"
    assert (encoded["token_identity_index"] == -1).all()

    plain = general_record(messages=[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}])
    alone = processor.encode(parsed(root, plain))
    assert alone["pixel_values"].shape == (0, 3, 0, 0)
    assert alone["image_sizes"].shape == (0, 2)
    assert alone["boxes"].shape == (0, 4)
    batch = processor.collate([alone, encoded])
    assert batch["sample_index"].tolist() == [1]
    assert batch["pixel_values"].shape == (1, 3, 64, 64)


def test_prepared_images_are_kept_in_memory_by_lru_cache(root, tmp_path):
    folder = draw_images(tmp_path / "images", IMAGES)
    processor = small_processor()
    processor.image_loader = functools.lru_cache(maxsize=2)(processor.load_image)
    first = processor.encode(sample(folder))
    assert processor.image_loader.cache_info().currsize == 2
    processor.image_loader = functools.lru_cache(maxsize=None)(processor.load_image)
    processor.encode(sample(folder))
    for name in IMAGES[:3]:  # cached images are not opened again
        (folder / name).unlink()
    again = processor.encode(sample(folder))
    for name, value in first.items():
        assert torch.equal(again[name], value), name
    processor.image_loader = None
    with pytest.raises(DataError, match=r"kate\.png"):
        processor.encode(sample(folder))
    other = draw_images(tmp_path / "others", IMAGES[::-1])  # equal names below another root are other images
    assert not torch.equal(processor.encode(sample(other))["pixel_values"], first["pixel_values"])


# --- Boxes -----------------------------------------------------------------------------------------------------------


def test_boxes_of_known_persons_only(processor, root):
    entry = record()
    entry["identities"] = entry["identities"][1:]  # Kate has a box, but no photo
    encoded = processor.encode(parsed(root, entry))
    assert encoded["box_identity"].tolist() == [0]
    assert encoded["box_image"].tolist() == [1]
    assert encoded["boxes"].tolist() == [[40, 10, 65, 55]]
    assert labelled(processor, encoded)[0] == "4 5 14 28<|end|>"  # she may still be asked for


@pytest.mark.parametrize("kind", BoxFormat.KINDS)
def test_boxes_in_every_format(root, kind):
    processor = small_processor(box_format=kind)
    answer = labelled(processor, processor.encode(sample(root)))[0].removesuffix("<|end|>")
    assert answer == BoxFormat(kind).write("Kate", [10, 10, 35, 55], (60, 80))
    found = processor.parse_box(answer, (60, 80))
    assert found == pytest.approx([10, 10, 35, 55], abs=80 / 31 / 2 + 1e-3)
    assert processor.parse_box("Kate is reading.", (60, 80)) is None


def test_relative_boxes_and_boxes_of_parts(root):
    """As ms-swift's: a box without a name in the answer, in 0..1 of the image of 80 x 60."""
    entry = record(people=("Kate",))
    entry["boxes"] = [{"name": "Kate", "image": "scene.png", "box": [0.125, 0.5, 0.25, 1], "relative": True}]
    part = {"type": "box", "image": "scene.png", "box": [0.125, 0.5, 0.25, 1], "relative": True}
    entry["messages"][1]["content"] = [part, {"type": "text", "text": " and "}, part | {"name": "Kate"}]
    for kind, text in {
        "pixels": "[10, 30, 20, 60] and [10, 30, 20, 60]",
        "qwen": "<box>(125,500),(250,999)</box> and <ref>Kate</ref><box>(125,500),(250,999)</box>",
    }.items():
        processor = small_processor(box_format=kind)
        encoded = processor.encode(parsed(root, entry))
        assert labelled(processor, encoded)[0].removesuffix("<|end|>") == text
        assert encoded["boxes"].tolist() == [[10, 30, 20, 60]]
    part |= {"box": [90, 0, 95, 5], "relative": False}
    entry["messages"][1]["content"] = [part]
    with pytest.raises(DataError, match=r"box \[90, 0, 95, 5\] of '' lies outside 'scene.png' of 80 x 60"):
        processor.encode(parsed(root, entry))


def test_a_box_outside_its_image_is_an_error_of_the_record(processor, root):
    entry = record()
    entry["boxes"][1]["box"] = [80, 10, 100, 30]  # the image ends at 80
    with pytest.raises(
        DataError, match=r"box \[80, 10, 100, 30\] of 'Tom' lies outside 'scene.png' of 80 x 60"
    ) as error:
        processor.encode(parsed(root, entry))
    assert error.value.kind == "record"
    entry["boxes"][1]["box"] = [70, 50, 100, 90]  # partly within
    assert processor.encode(parsed(root, entry))["boxes"].shape == (2, 4)


def clip_processor(**options):
    """A processor with CLIP's image processor, which crops the centre of images."""
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    images = type(small_image_processor(32))(**crop | options)
    return IDAVLMProcessor(images, small_tokenizer(TEXTS, vocab_size=320), image_seq_length=QUERIES)


SIDES = st.integers(1, 40)


@pytest.mark.parametrize("options", [{}, {"do_center_crop": False, "size": {"height": 32, "width": 32}}])
@given(data=st.data(), size=st.tuples(SIDES, SIDES), closeness=st.sampled_from([0.0, 1e-9, 1e-7, 1e-5, 1e-3, 1.0]))
def test_a_box_that_is_encoded_can_be_supervised(options, data, size, closeness):
    """Boxes close to or beyond the edges of the image and of its crop are refused by ``encode`` or have targets."""
    processor = clip_processor(**options)
    processor.image_loader = lambda root, path: (torch.zeros(3, 32, 32), size)
    left, top, right, bottom = crop_box(processor.image_processor, size)
    xs = [0, size[1], left * size[1], right * size[1], size[1] / 2]
    ys = [0, size[0], top * size[0], bottom * size[0], size[0] / 2]
    shift = st.sampled_from([-closeness, 0, closeness])
    x1, x2, y1, y2 = (data.draw(st.sampled_from(edges)) + data.draw(shift) for edges in (xs, xs, ys, ys))
    entry = record(people=("Kate",))
    entry["boxes"][0]["box"] = [x1, y1, x2, y2]
    try:
        encoded = processor.encode(parse_sample(entry, where="r.jsonl:1"))
    except DataError:
        return
    batch = processor.collate([encoded])
    described = (batch["boxes"], batch["box_image"], batch["box_identity"], batch["image_sizes"])
    targets = identity_patch_targets(*described, (4, 4), image_roles=batch["image_roles"])
    assert targets.shape == (2, 16)


def test_an_image_of_one_pixel_across_with_a_centre_crop(tmp_path):
    processor = clip_processor()
    draw_images(tmp_path, ["kate.png"])
    Image.new("RGB", (1, 200)).save(tmp_path / "scene.png")
    entry = record(people=("Kate",))
    entry["boxes"][0]["box"] = [0, 0, 1, 200]
    encoded = processor.encode(parsed(tmp_path, entry))
    assert encoded["boxes"].tolist() == [[0, 0, 1, 200]]
    entry["boxes"][0]["box"] = [0, 0, 1, 50]  # above the part that is kept
    assert processor.encode(parsed(tmp_path, entry))["boxes"].shape == (0, 4)


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_longer_than_max_length(root):
    length = len(small_processor().encode(sample(root))["input_ids"])
    assert len(small_processor(max_length=length).encode(sample(root))["input_ids"]) == length
    with pytest.raises(DataError, match=f"has {length} tokens, more than max_length={length - 1}") as error:
        small_processor(max_length=length - 1).encode(sample(root))
    assert error.value.kind == "length"


@pytest.mark.parametrize("place", ["user", "assistant", "identity", "box"])
def test_the_placeholder_in_a_record(processor, root, place):
    entry = record()
    if place == "user":
        entry["messages"][2]["content"] = "What is in <image>?"
    elif place == "assistant":
        entry["messages"][3]["content"] = "It is <image>."
    elif place == "identity":
        entry["identities"][0]["name"] = "K<image>"
    else:
        entry["boxes"][1]["name"] = "Tom<image>"
    with pytest.raises(DataError, match="holds the placeholder '<image>'") as error:
        processor.encode(parsed(root, entry))
    assert error.value.kind == "placeholders"


def test_a_template_that_loses_an_image_is_an_error(root):
    template = (
        "{% for m in messages %}{% if loop.index > 1 or messages|length == 1 %}<|user|>{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    processor = small_processor(chat_template=template)
    general = general_record(type="caption_single", answer="x")
    general["messages"].append({"role": "user", "content": "And now?"})
    with pytest.raises(DataError, match=r"the chat template does not write the content of messages\[0\]") as error:
        processor.encode(parsed(root, general), add_generation_prompt=True)
    assert error.value.kind == "template"


def test_images_without_a_root(processor):
    with pytest.raises(DataError, match="has no image_root") as error:
        processor.encode(parse_sample(record(), where="r.jsonl:1"))
    assert error.value.kind == "image"


def test_no_chat_template(root):
    images, tokenizer = small_image_processor(32), small_tokenizer(TEXTS, vocab_size=300)
    tokenizer.chat_template = None
    bare = IDAVLMProcessor(images, tokenizer, image_seq_length=QUERIES)
    with pytest.raises(ValueError, match="has no chat_template"):
        bare.encode(sample(root))
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    given = IDAVLMProcessor(images, tokenizer, image_seq_length=QUERIES, chat_template=template)
    encoded = given.encode(parsed(root, general_record()))
    assert text(given, encoded["input_ids"]) == "user: *Where is Kate?<|end|>assistant: Nowhere.<|end|>"
    assert labelled(given, encoded) == ["Nowhere.<|end|>"]


FAULTY_OPTIONS = pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_format": "<img>"}, "image_format='<img>' must contain {image} once"),
        ({"image_format": "{image}{image}"}, "image_format='{image}{image}' must contain {image} once"),
        ({"image_format": "{image} {name}"}, "image_format='{image} {name}' may contain only {image}."),
        ({"image_format": "{image}{"}, "image_format='{image}{' is not a format string"),
        ({"image_format": None}, "image_format=None is not a format string"),
        ({"identity_format": "{name}"}, "identity_format='{name}' must contain {image} once"),
        ({"identity_format": "{nam} {image}"}, "identity_format='{nam} {image}' may contain only {name}, {image}."),
        ({"identity_format": "{name:>9} {image}"}, "may contain only {name}, {image}."),
        ({"identity_format": "{name!r} {image}"}, "may contain only {name}, {image}."),
        ({"box_format": "yxyx"}, "box_format='yxyx'"),
        ({"image_seq_length": 0}, "image_seq_length=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"max_pixels": None}, "max_pixels=None must be"),
        ({"max_aspect_ratio": 1.5}, "max_aspect_ratio=1.5 must be"),
        ({"image_token": "<photo>"}, "image_token='<photo>' is not a token"),
    ],
)


@FAULTY_OPTIONS
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_processor(**options)


@FAULTY_OPTIONS
def test_options_are_checked_when_they_are_set_later(options, message):
    processor, ((name, value),) = small_processor(), options.items()
    before = getattr(processor, name)
    with pytest.raises(ValueError, match=re.escape(message)):
        setattr(processor, name, value)
    assert getattr(processor, name) == before


LATER = {
    "image_seq_length": 9,
    "image_token": "<|pad|>",
    "image_format": "({image})",
    "identity_format": "{{{name}}}: {image}\n",
    "box_format": "unit",
    "max_length": 200,
    "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}",
    "tokenizer": small_tokenizer([*TEXTS, "is * Where"], vocab_size=340),
    "image_processor": small_image_processor(32),
    "pack_identities": True,
    "max_pixels": 6000,
    "max_aspect_ratio": 2,
}

LIMITS = {"max_length": (3, "more than max_length=3"), "max_pixels": (4799, "more than max_pixels=4799; scale")}
LIMITS["max_aspect_ratio"] = (1, "more than max_aspect_ratio=1; crop")


@pytest.mark.parametrize("name", LATER)
def test_options_that_are_set_later_take_effect(root, tmp_path, name):
    """As if they had been passed to the constructor: when encoding, parsing, calling, saving."""
    parts = {"image_processor": small_image_processor(64), "tokenizer": small_tokenizer(TEXTS, vocab_size=320)}
    options = {"image_seq_length": QUERIES, "box_format": "bins32", **parts}
    assert LATER.keys() == set(inspect.signature(IDAVLMProcessor).parameters) - {"kwargs"}
    expected = IDAVLMProcessor(**options | {name: LATER[name]})
    if name == "tokenizer":
        expected.chat_template = parts["tokenizer"].chat_template
    later = IDAVLMProcessor(**options)
    default = later.encode(sample(root))  # whatever is derived from options is derived now
    call = {"images": Image.open(root / "kate.png"), "text": f"Kate is {later.image_token}"}
    later(**call)
    later.parse_box("1 2 3 4", (60, 80))
    setattr(later, name, LATER[name])
    call["text"] = f"Kate is {later.image_token}"
    for found, wanted in (
        (later.encode(sample(root)), expected.encode(sample(root))),
        (later(**call), expected(**call)),
    ):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[field]) for field, value in found.items())
    for text in ("1 2 3 4", "[0.1, 0.2, 0.3, 0.4]"):
        assert later.parse_box(text, (60, 80)) == expected.parse_box(text, (60, 80))
    assert later.image_token_id == expected.image_token_id
    later.save_pretrained(tmp_path / "later")
    expected.save_pretrained(tmp_path / "expected")
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "later" / file.name).read_text() == file.read_text(), file.name
    if name == "pack_identities":
        assert "mm_token_type_ids" in later(**call)
    elif name not in LIMITS:
        changed = later.encode(sample(root))
        assert any(not torch.equal(value, changed[field]) for field, value in default.items())
    else:
        limit, message = LIMITS[name]
        setattr(later, name, limit)
        with pytest.raises(DataError, match=message):
            later.encode(sample(root))


@pytest.mark.parametrize("name", ["max_pixels", "max_aspect_ratio"])
def test_limits_on_images_hold_before_decoding_on_every_way_in(root, monkeypatch, name):
    """Files of records, files and PIL images of messages and of the call; the images have 80 x 60 pixels."""
    limit, message = LIMITS[name]
    processor, file = small_processor(**{name: limit}), str(root / "kate.png")
    question = [{"role": "user", "content": [{"type": "image", "image": file}, {"type": "text", "text": "Who?"}]}]
    in_memory = Image.open(root / "kate.png")
    monkeypatch.setattr(Image.Image, "load", None)  # a decoded image is an error of another type
    for refused in (
        lambda: processor.encode(sample(root)),
        lambda: processor.apply_chat_template(question, tokenize=True),
        lambda: processor(images=[file], text="<image>"),
        lambda: processor(images=[in_memory], text="<image>"),
        lambda: processor(images=[np.zeros((60, 80, 3), np.uint8)], text="<image>"),
    ):
        with pytest.raises(DataError, match=message):
            refused()


def test_parts_that_are_set_later_are_checked(root):
    processor = small_processor()
    without_placeholder = small_tokenizer(TEXTS, vocab_size=320, image_token="<photo>")
    with pytest.raises(ValueError, match="image_token='<image>' is not a token of the tokenizer"):
        processor.tokenizer = without_placeholder
    with pytest.raises(ValueError, match="does not bring all images to one size"):
        processor.image_processor = type(small_image_processor(32))(size={"shortest_edge": 32}, do_center_crop=False)
    processor.image_loader = functools.lru_cache(maxsize=None)(processor.load_image)
    with pytest.raises(ValueError, match="image_loader holds images that the present image_processor prepared"):
        processor.image_processor = small_image_processor(32)


# --- transformers' usual ways ----------------------------------------------------------------------------------------


def test_called_with_text_and_images(processor, root):
    first, second, third = (Image.open(root / name).convert("RGB") for name in IMAGES[:3])
    alone = processor(images=first, text="<image> Where is Kate?")
    assert isinstance(alone, BatchFeature)
    assert text(processor, alone["input_ids"][0]) == "* Where is Kate?"
    assert alone["image_roles"].tolist() == [GENERAL]
    texts = ["<image> and <image>", "Kate?", "<image>"]
    batch = processor(images=[first, second, third], text=texts)
    assert batch["sample_index"].tolist() == [0, 0, 2]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [2 * QUERIES, 0, QUERIES]
    assert batch["attention_mask"].sum(1).tolist() == [
        len(processor(text=t, images=i)["input_ids"][0])
        for t, i in zip(texts, ([first, second], None, third), strict=True)
    ]
    expected = processor.image_processor([first, second, third], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert "pixel_values" not in processor(text="Kate?")
    model = small_model(processor)
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape
    assert model.generate(**alone, max_new_tokens=2).shape[1] == alone["input_ids"].shape[1] + 2
    with pytest.raises(DataError, match=r"have \[2\] image placeholders, but there are \[1\] images"):
        processor(images=first, text="<image><image>")
    with pytest.raises(DataError, match=r"have \[\] image placeholders, but there are \[1\] images"):
        processor(images=first)
    with pytest.raises(ValueError, match="row 0 has 1 image placeholders in place of 4: truncation"):
        processor(images=first, text="<image> Kate?", truncation=True, max_length=1)


def test_the_call_equals_encoding_the_same_conversation(processor, root):
    general = parsed(root, general_record())
    encoded = processor.encode(general)
    chat = [{"role": "user", "content": "<image>Where is Kate?"}, {"role": "assistant", "content": "Nowhere."}]
    rendered = processor.apply_chat_template(chat, tokenize=False)
    called = processor(images=Image.open(root / "other.png").convert("RGB"), text=rendered)
    assert torch.equal(called["input_ids"][0], encoded["input_ids"])
    assert torch.equal(called["pixel_values"], encoded["pixel_values"])
    assert torch.equal(called["image_roles"], encoded["image_roles"])


def conversation(root, *turns):
    """Two identities, a scene, and further turns of text."""
    photos = [Image.open(root / name).convert("RGB") for name in IMAGES]
    parts = [
        {"type": "identity", "name": "Kate", "images": photos[:1]},
        {"type": "identity", "name": "Tom", "images": photos[1:2]},
        {"type": "image", "image": photos[2]},
        {"type": "text", "text": "Where is Kate? And Kate's user?"},
    ]
    messages = [{"role": "user", "content": parts}]
    for number, text in enumerate(turns):
        messages.append({"role": ("assistant", "user")[number % 2], "content": [{"type": "text", "text": text}]})
    return messages, photos[:3]


FORMATS = {
    "default": {},
    "image_format": {"image_format": "({image})"},
    "vicuna": {"chat_template": chat_templates.VICUNA},
    "llama_3": {"chat_template": chat_templates.LLAMA_3},
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("turns", [(), ("Tom is here.", "And what is Tom doing?")], ids=["one turn", "three turns"])
def test_rendered_text_and_messages_have_the_same_fields(root, options, turns):
    """References, names in questions and what they are about; not the names in earlier answers."""
    processor = small_processor(**options)
    messages, photos = conversation(root, *turns)
    expected = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    found = processor(images=photos, text=rendered)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert expected["image_roles"].tolist() == [0, 0, 1]
    assert expected["identity_index"].tolist() == [0, 1, 0]


def test_lines_and_identities_of_text(processor, root):
    _, (kate, tom, scene) = conversation(root)
    expected = processor(images=[kate, tom, scene], text="Kate is <image>\nTom is <image>\n<image> Where is Kate?")
    assert expected["image_roles"].tolist() == [0, 0, 1]
    named = {"Kate": kate, "Tom": [tom]}
    for identities in (named, [{"name": "Kate", "images": [kate]}, {"name": "Tom", "images": [tom]}]):
        found = processor(images=scene, text="<image> Where is Kate?", identities=identities)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    # A batch pads on either side; other rows have general images.
    texts = ["Where is <image>?", "<image> Where is Kate?"]
    for side in ("left", "right"):
        batch = processor(images=[tom, scene], text=texts, identities=[None, named], padding_side=side)
        assert batch["image_roles"].tolist() == [2, 0, 0, 1]
        assert batch["sample_index"].tolist() == [0, 1, 1, 1]
        kept = batch["attention_mask"][0].bool()
        assert (batch["token_identity_index"][0] == -1).all()
        assert not batch["name_mask"][0].any()
        for name in ("input_ids", "token_identity_index", "name_mask"):
            assert torch.equal(batch[name][1], expected[name][0])
        assert kept.sum() == len(processor(images=tom, text=texts[0])["input_ids"][0])
    # A pronoun is no name and introduces no identity.
    assert processor(images=scene, text="This is <image>")["image_roles"].tolist() == [GENERAL]


def test_packed_identities_are_unpacked(root):
    processor, packing = small_processor(), small_processor(pack_identities=True)
    texts = ["Kate is <image>\nTom is <image>\n<image> Where is Kate?", "<image> What?", "Tom is <image>\n<image>Tom?"]
    images = [Image.open(root / name).convert("RGB") for name in (*IMAGES[:3], *IMAGES[1:])]
    expected = processor(images=images, text=texts, padding_side="left")
    packed = packing(images=images, text=texts)
    assert packed.keys() == {"input_ids", "attention_mask", "pixel_values", "mm_token_type_ids"}
    fields = unpack_token_identities(packed["mm_token_type_ids"])
    for name, value in fields.items():
        assert torch.equal(value, expected[name]), name
    appended = torch.nn.functional.pad(packed["mm_token_type_ids"], (0, 2))
    longer = unpack_token_identities(appended)
    index = expected["token_identity_index"]
    assert torch.equal(longer["token_identity_index"], torch.cat([index, index[:, -1:].expand(-1, 2)], 1))
    assert torch.equal(longer["name_mask"], torch.nn.functional.pad(expected["name_mask"], (0, 2)))
    assert unpack_token_identities(torch.ones(2, 3, dtype=torch.long)) == {}
    model = small_model(processor, identity_embedding="name")
    with torch.no_grad():
        logits = model(**expected).logits
        assert torch.equal(model(**packed).logits, logits)
        assert torch.equal(model.get_output_embeddings()(model.base_model(**packed).last_hidden_state), logits)


def test_options_of_tokenizing_messages(processor, root):
    messages, _ = conversation(root)
    short = [{"role": "user", "content": "Hello"}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    tensors = processor.apply_chat_template([messages, short], return_tensors="pt", **options)
    lists = processor.apply_chat_template([messages, short], **options)
    for row, mask in enumerate(tensors["attention_mask"].bool()):
        for name in ("input_ids", "attention_mask", "token_identity_index", "name_mask"):
            assert lists[name][row] == tensors[name][row][mask].tolist()
    assert processor.apply_chat_template(short, tokenize=True) == [[*lists["input_ids"][1][:-1]]]
    limit = len(lists["input_ids"][0]) - 3
    cut = processor.apply_chat_template(messages, return_tensors="pt", truncation=True, max_length=limit, **options)
    assert cut["input_ids"].tolist() == [lists["input_ids"][0][:limit]]
    with pytest.raises(ValueError, match="max_length=5 would cut image placeholders"):
        processor.apply_chat_template(messages, processor_kwargs={"truncation": True, "max_length": 5}, **options)
    for name, value in {"padding": "max_length", "pad_to_multiple_of": 8, "max_length": 9, "tools": [1]}.items():
        with pytest.raises(ValueError, match=f"{name}=.* cannot take effect"):
            processor.apply_chat_template(messages, **{name: value}, **options)
    later = [messages[0], {"role": "assistant", "content": "Here."}, messages[0]]
    later[2] = {"role": "user", "content": [{**messages[0]["content"][0], "name": "Ann"}]}
    with pytest.raises(DataError, match="has the images in another order than the messages"):
        processor.apply_chat_template(later)


def test_pipeline_answers_with_an_identity_part(processor, root):
    model = small_model(processor, identity_embedding="name")
    messages, _ = conversation(root)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    found = pipe(text=messages, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert found == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    several = pipe(text=[messages, messages], max_new_tokens=6, return_full_text=False)
    assert [one[0]["generated_text"] for one in several] == [found, found]
    with pytest.raises(ValueError, match="row 0 of input_ids holds 12 image placeholders"):  # not silently wrong
        pipe(text=[messages, messages], max_new_tokens=6, batch_size=2)


def test_saved_and_loaded_with_all_options(root, tmp_path):
    options = {
        "image_seq_length": 9,
        "image_format": "<i>{image}</i>",
        "identity_format": "{name}: {image};",
        "box_format": "unit",
        "max_length": 300,
        "max_pixels": 6000,
        "max_aspect_ratio": 2,
    }
    processor = small_processor(**options)
    processor.encode(sample(root))  # what is cached is not saved
    processor.save_pretrained(tmp_path)
    for loaded in (
        IDAVLMProcessor.from_pretrained(tmp_path, backend="pil"),
        AutoProcessor.from_pretrained(tmp_path, backend="pil"),
    ):
        assert isinstance(loaded, IDAVLMProcessor)
        assert {name: getattr(loaded, name) for name in options} == options
        assert loaded.chat_template == processor.chat_template
        assert loaded.image_token_id == processor.image_token_id
        expected = processor.encode(sample(root))
        for name, value in loaded.encode(sample(root)).items():
            assert torch.equal(value, expected[name]), name
    assert (
        not {"image_loader", "_boxes", "_crop_boxes", "image_token_id"}
        & json.loads((tmp_path / "processor_config.json").read_text()).keys()
    )


# --- Faulty data, from the file to the trainer -----------------------------------------------------------------------

FAULTS = {
    "missing": ("image", "does not exist"),
    "truncated": ("image", "damaged"),
    "oversized": ("image", "more than max_pixels"),
    "no_image": ("image", "not an image"),
    "placeholder": ("placeholders", "holds the placeholder"),
    "outside_box": ("record", "lies outside"),
    "too_long": ("length", "more than max_length"),
    "bad_json": ("json", "invalid JSON"),
    "bad_role": ("record", "role='narrator' is not known"),
    "escape": ("record", "leaves the image root"),
    "link": ("image", "leads out of the image root"),
    "no_answer": ("record", "has no text"),
    "long_number": ("record", "must be four numbers"),
    "thin_box": ("record", "is empty in 32-bit precision"),
    "edge_box": ("record", "lies outside"),
    "surrogate": ("record", "half of a surrogate pair"),
    "type_is_list": ("record", "type=['location'] is not known"),
    "repeated_key": ("json", "the key 'id' occurs 2 times"),
    "nested": ("json", "nested too deeply"),
    "two_parts": ("placeholders", "holds the placeholder"),
    "strip": ("image", "an aspect ratio of 5000"),
    "float_image": ("image", "floating-point"),
}
AT_ONCE = ("bad_json", "bad_role", "escape", "no_answer", "long_number", "thin_box", "surrogate", "type_is_list")
AT_ONCE += ("repeated_key", "nested")


def faulty_line(fault: str) -> str:
    entry = record(people=("Kate",))
    files = {"missing": "missing.png", "truncated": "cut.png", "oversized": "huge.png", "no_image": "text.png"}
    files |= {"escape": "../outside.png", "link": "link.png", "strip": "strip.png", "float_image": "float.tif"}
    boxes = {"outside_box": [500, 500, 600, 600], "long_number": [0, 0, 10**400, 50]}
    boxes |= {"thin_box": [10, 11, 10.0000001, 60], "edge_box": [79.99999999, 0, 90, 50]}
    if fault in files:
        entry["identities"][0]["images"] = [files[fault]]
    elif fault == "placeholder":
        entry["messages"][2]["content"] = "See <image>."
    elif fault in boxes:
        entry["boxes"][0]["box"] = boxes[fault]
    elif fault == "surrogate":
        entry["messages"][2]["content"] = "\ud83d"
    elif fault == "type_is_list":
        entry["type"] = ["location"]
    elif fault == "two_parts":
        entry["messages"][2]["content"] = [{"type": "text", "text": text} for text in ("See <ima", "ge>.")]
    elif fault == "too_long":
        entry["messages"][2]["content"] = "What? " * 200
    elif fault == "bad_role":
        entry["messages"][0]["role"] = "narrator"
    elif fault == "no_answer":
        entry["messages"][3]["content"] = "  "
    line = json.dumps(entry)
    if fault in ("repeated_key", "nested"):
        return '{"id": ' + ("1, " if fault == "repeated_key" else "[" * 100_000 + "]" * 100_000 + ", ") + line[1:]
    return line[:-20] if fault == "bad_json" else line


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Folder of a file with valid lines before, between and after faulty ones, and the number of each faulty line."""
    folder = tmp_path_factory.mktemp("faulty")
    images = draw_images(folder / "images", IMAGES)
    whole = (images / "kate.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("no image at all")
    Image.new("1", (9000, 9000)).save(images / "huge.png")
    Image.new("RGB", (1, 5000)).save(images / "strip.png")
    Image.new("F", (8, 8)).save(images / "float.tif")
    Image.new("RGB", (8, 8)).save(folder / "outside.png")
    (images / "link.png").symlink_to(folder / "outside.png")
    lines, places = [json.dumps(record(0))], {}
    for fault in FAULTS:
        lines += [faulty_line(fault), json.dumps(record(len(lines), people=("Tom", "Kate")))]
        places[fault] = len(lines) - 1
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder, places


def test_each_fault_is_raised_with_file_and_line(faulty, tmp_path):
    folder, places = faulty
    processor = small_processor(max_length=200)
    lines = (folder / "train.jsonl").read_text().splitlines()
    for fault, (kind, message) in FAULTS.items():
        # The same file with this fault alone.
        kept = [line if number == places[fault] or number % 2 else "" for number, line in enumerate(lines, 1)]
        path = tmp_path / f"{fault}.jsonl"
        path.write_text("\n".join(kept) + "\n")
        where = rf"{fault}\.jsonl:{places[fault]}: .*{re.escape(message)}"
        if fault in AT_ONCE:
            with pytest.raises(DataError, match=where) as error:
                RecordDataset(path, folder / "images", encode=processor.encode)
        else:
            records = RecordDataset(path, folder / "images", encode=processor.encode)
            for index in range(len(records)):
                if index != places[fault] // 2:
                    records[index]
            with pytest.raises(DataError, match=where) as error:
                records[places[fault] // 2]
        assert error.value.kind == kind, fault


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_faults_are_skipped_and_counted_and_the_rest_trains(faulty, tmp_path, monkeypatch):
    folder, places = faulty
    monkeypatch.setattr(ErrorLog, "MAX_MESSAGES", len(FAULTS))
    processor = small_processor(max_length=200)
    records = RecordDataset(folder / "train.jsonl", folder / "images", encode=processor.encode, on_error="skip")
    assert len(records) == len(FAULTS) + 1 + len(FAULTS) - len(AT_ONCE)
    assert records.errors.total == len(AT_ONCE)
    clean = [line for number, line in enumerate((folder / "train.jsonl").read_text().splitlines(), 1) if number % 2]
    (tmp_path / "clean.jsonl").write_text("\n".join(clean) + "\n")
    expected = RecordDataset(tmp_path / "clean.jsonl", folder / "images", encode=processor.encode)
    arguments = IDTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = IDTrainer(small_model(processor), arguments, train_dataset=records, data_collator=processor.collate)
    trainer.train()
    logged = [entry["loss_identity"] for entry in trainer.state.log_history if "loss_identity" in entry]
    assert len(logged) == 3
    assert all(0 < loss < 10 for loss in logged)
    seen = {text(processor, records[index]["input_ids"]) for index in range(len(records))}
    assert seen == {text(processor, expected[index]["input_ids"]) for index in range(len(expected))}
    assert records.errors.total == len(FAULTS)
    kinds = [kind for kind, _ in FAULTS.values()]
    assert dict(records.errors.counts) == {kind: kinds.count(kind) for kind in kinds}
    for fault, (_, message) in FAULTS.items():
        assert any(f"train.jsonl:{places[fault]}: " in line and message in line for line in records.errors.messages), (
            fault
        )


@pytest.mark.parametrize("template", ["chatml", "generation"])
def test_tokens_are_counted_without_decoding_images(root, monkeypatch, template):
    processor = small_processor()
    if template == "generation":
        marked = "{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
        processor.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
            + marked
            + "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        )
    text = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Nothing."}]
    entries = [record(), record(1, people=("Tom",)), general_record(), general_record(messages=text)]
    samples = [parsed(root, entry) for entry in entries]
    expected = [len(processor.encode(one)["input_ids"]) for one in samples]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("an image was decoded"))
    assert [processor.num_tokens(one) for one in samples] == expected
