"""IdentityProcessor: the processor of any vision-language model, with identities in messages and text."""

import copy
import pickle
import re
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from transformers import AutoProcessor, ProcessorMixin, pipeline

from idavlm import IdentityProcessor, RecordDataset, parse_sample
from idavlm.data import Box, DataError, Identity, Message, Part, Sample, sample_to_messages
from idavlm.data.messages import conversation_to_sample, read_conversation
from idavlm.models.attach import attach_id_former
from idavlm.models.identity_batch import IDENTITY_FIELDS
from idavlm.models.packed_identities import FIELD, unpack_identities
from tests.vlm_families import FAMILIES, tiny_model, tiny_processor

CHAT_FAMILIES = [family for family in FAMILIES if family != "paligemma"]  # it has no chat template
TOKENIZED = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
PADDED = {**TOKENIZED, "processor_kwargs": {"padding": True}}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
IMAGE_TEXTS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"), QWEN_IMAGE),
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "ovis2"), "<image>\n"),
    "internvl": "<IMG_CONTEXT>\n",
    "gemma3": "<start_of_image>",
    "mistral3": "[IMG]",
    "glm4v": "<|begin_of_image|><|image|><|end_of_image|>",
}
"""Text of an image in the chat templates."""
GLM_END = "{% if message['role'] == 'assistant' %}<|endoftext|>{% endif %}"


def image(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


KATE = [image(0, 80, 60), image(1, 40, 40)]
TOM = [image(2, 30, 70)]
SCENE, OTHER = image(3), image(4, 20, 90)


def processor(family: str = "llava", **options) -> IdentityProcessor:
    wrapped = tiny_processor(family)
    if family == "glm4v":  # the template has no end of turn, which encode() refuses to label
        wrapped.chat_template = wrapped.chat_template.replace(
            "{% endfor %}{% if add", GLM_END + "{% endfor %}{% if add"
        )
    return IdentityProcessor(wrapped, **options)


def identity(name: str, images: list) -> dict:
    return {"type": "identity", "name": name, "images": images}


def user(*parts) -> dict:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def shown(photo, **fields) -> dict:
    return {"type": "image", "image": photo, **fields}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


QUESTION = [user(identity("Kate", KATE), identity("<my_cat>", TOM), shown(SCENE), "Where is Kate?")]
GENERAL = [user(shown(OTHER), "What is this?")]
TEXT = [user("Hello")]


def equal(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# Messages


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_without_identities_the_output_is_that_of_the_wrapped_processor(family):
    own, wrapped = processor(family), processor(family).processor
    for messages in (GENERAL, TEXT, [GENERAL[0], answer("A hat."), user("Sure?")]):
        for options in (TOKENIZED, {**TOKENIZED, "add_generation_prompt": True}):
            assert equal(own.apply_chat_template(messages, **options), wrapped.apply_chat_template(messages, **options))
        assert own.apply_chat_template(messages) == wrapped.apply_chat_template(messages)
    batch = [GENERAL, [user(shown(SCENE), shown(TOM[0]), "Which one?")]]
    assert equal(own.apply_chat_template(batch, **PADDED), wrapped.apply_chat_template(batch, **PADDED))
    text = f"a {own.image_token} b"
    assert equal(
        own(images=SCENE, text=text, return_tensors="pt"), wrapped(images=SCENE, text=text, return_tensors="pt")
    )


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_references_are_one_line_per_photo_before_the_scene(family):
    own = processor(family)
    text = own.apply_chat_template(QUESTION, add_generation_prompt=True)
    core = IMAGE_TEXTS.get(family, "<image>")
    lines = f"Kate is {core.strip()}\nKate is {core.strip()}\n<my_cat> is {core.strip()}\n{core}Where is Kate?"
    assert lines in text
    assert text.count(own.image_token) == 4


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_fields_of_a_batch(family):
    own = processor(family)
    batch = own.apply_chat_template([TEXT, QUESTION, GENERAL], add_generation_prompt=True, **PADDED)
    assert batch["image_roles"].tolist() == [0, 0, 0, 1, 2]
    assert batch["sample_index"].tolist() == [1, 1, 1, 1, 2]
    assert batch["identity_index"].tolist() == [0, 0, 1, 0, 0]
    sizes = [(photo.height, photo.width) for photo in (*KATE, *TOM, SCENE, OTHER)]
    assert batch["original_image_sizes"].tolist() == [list(size) for size in sizes]
    per_row = torch.zeros(3, dtype=torch.long).index_add(0, batch["sample_index"], batch["num_image_tokens"])
    assert (batch["input_ids"] == own.placeholder_id).sum(1).tolist() == per_row.tolist()
    assert own.placeholder_id == tiny_model(family).config.image_token_id
    names = batch["identity_name_ids"]
    assert names.shape[:2] == (3, 2)
    decoded = [own.tokenizer.decode(name[name >= 0]).strip() for name in names[1]]
    assert decoded == ["Kate", "<my_cat>"]
    kate = names[1, 0][names[1, 0] >= 0].tolist()
    ids = batch["input_ids"][1].tolist()
    question = max(start for start in range(len(ids)) if ids[start : start + len(kate)] == kate)
    before = own.tokenizer.decode(ids[:question]).rstrip()
    assert before.endswith("Where is"), "the tokens of a name are those of the question, with the space before it"
    assert (names[[0, 2]] == -1).all()


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_each_image_has_its_own_number_of_tokens(family):
    """The numbers are those that the processor writes for each image alone in a conversation of the same length."""
    own = processor(family)
    counts = own.apply_chat_template(QUESTION, **TOKENIZED)["num_image_tokens"].tolist()
    if family == "llava_onevision":  # several images are not split into tiles
        assert counts == [17] * 4
        return
    alone = [
        int(
            (
                own.processor(images=photo, text=own.image_token, return_tensors="pt")["input_ids"]
                == own.placeholder_id
            ).sum()
        )
        for photo in (*KATE, *TOM, SCENE)
    ]
    assert counts == alone


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3", "internvl"])
def test_left_padding_and_single_samples_agree_with_batches(family):
    own = processor(family)
    padded = {**TOKENIZED, "processor_kwargs": {"padding": True, "padding_side": "left"}}
    batch = own.apply_chat_template([QUESTION, GENERAL], **padded)
    alone = own.apply_chat_template(QUESTION, **TOKENIZED)
    length = alone["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0, -length:], alone["input_ids"][0])
    assert batch["attention_mask"].sum(1)[0] == length
    assert batch["attention_mask"][1, 0] == 0
    assert torch.equal(own.apply_chat_template([QUESTION], padding=True, **TOKENIZED)["input_ids"], alone["input_ids"])


def test_paths_bytes_and_pil_images_are_the_same_image(tmp_path):
    SCENE.save(tmp_path / "scene.png")
    buffer = BytesIO()
    SCENE.save(buffer, "PNG")
    own = processor(image_root=tmp_path)
    outputs = [
        own.apply_chat_template([user(identity("Kate", [photo]), shown(photo), "Where?")], **TOKENIZED)
        for photo in (SCENE, "scene.png", str(tmp_path / "scene.png"), tmp_path / "scene.png", buffer.getvalue())
    ]
    outputs.append(
        own.apply_chat_template(
            [user(identity("Kate", ["scene.png"]), {"type": "image", "path": "scene.png"}, "Where?")], **TOKENIZED
        )
    )
    assert all(equal(output, outputs[0]) for output in outputs)
    general = [own.apply_chat_template([user(shown(photo), "?")], **TOKENIZED) for photo in (SCENE, "scene.png")]
    assert equal(*general)


def test_transparent_and_rotated_images_are_upright_on_white(tmp_path):
    transparent = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    KATE[0].save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    own = processor()
    batch = own.apply_chat_template([user(identity("Kate", [transparent, tmp_path / "rotated.jpg"]), "?")], **TOKENIZED)
    white = own.processor(images=Image.new("RGB", (32, 32), "white"), text="<image>", return_tensors="pt")
    assert torch.equal(batch["pixel_values"][0], white["pixel_values"][0])
    assert batch["original_image_sizes"].tolist() == [[32, 32], [80, 60]]


def test_urls_only_if_allowed(tmp_path):
    import base64

    buffer = BytesIO()
    SCENE.save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    inline = f"data:image/png;base64,{text}"
    own = processor()
    for part in (shown("https://example.org/kate.jpg"), shown(inline), {"type": "image", "base64": text}):
        for messages in ([user(part, "Who?")], [user(identity("Kate", KATE), part, "Who?")]):
            with pytest.raises(DataError, match="allow_urls"):
                own.apply_chat_template(messages, **TOKENIZED)
    with pytest.raises(DataError, match="allow_urls"):
        own(images=["https://example.org/kate.jpg"], text="<image> Who?")
    allowed = processor(allow_urls=True)
    expected = own.apply_chat_template([user(identity("Kate", KATE), shown(SCENE), "Who?")], **TOKENIZED)
    for part in (shown(inline), {"type": "image", "base64": text}):
        assert equal(allowed.apply_chat_template([user(identity("Kate", KATE), part, "Who?")], **TOKENIZED), expected)


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_assistant_mask_of_a_template_that_supports_it(family):
    own = processor(family)
    messages = [*QUESTION, answer("Kate is here."), user("And Tom?"), answer("He is not.")]
    batch = own.apply_chat_template([messages, GENERAL], return_assistant_tokens_mask=True, **PADDED)
    decoded = own.tokenizer.decode(batch["input_ids"][0][batch["assistant_masks"][0].bool()])
    assert re.sub(r"\s+", " ", decoded).strip() in ("Kate is here. He is not.", "Kate is here. USER He is not.")
    assert not batch["assistant_masks"][1].any()
    assert "offset_mapping" not in batch
    # The same mask as transformers computes for the same conversation without identities.
    own_mask, wrapped_mask = (
        one.apply_chat_template(
            [user(shown(SCENE), "Hi"), *messages[1:]], return_assistant_tokens_mask=True, **TOKENIZED
        )["assistant_masks"][0]
        for one in (own, own.processor)
    )
    count = int(batch["assistant_masks"][0].sum())
    assert torch.equal(own_mask, wrapped_mask)
    if wrapped_mask.any():  # older versions of transformers mark nothing in conversations with images
        assert int(wrapped_mask.sum()) == count


def test_names_may_stand_in_angle_brackets_and_be_added_tokens():
    own = processor()
    own.tokenizer.add_tokens(["<sks>"])
    text = own.apply_chat_template([user(identity("<sks>", TOM), shown(SCENE), "Where is <sks>?")])
    batch = own(images=[TOM[0], SCENE], text=text, return_tensors="pt")
    assert batch["image_roles"].tolist() == [0, 1]
    assert batch["identity_name_ids"].tolist() == [[[own.tokenizer.convert_tokens_to_ids("<sks>")]]]
    own.tokenizer.add_special_tokens({"additional_special_tokens": ["<v1>", "<image>"]})
    batch = own.apply_chat_template([user(identity("<v1>", TOM), shown(SCENE), "Where is <v1>?")], **TOKENIZED)
    assert batch["identity_name_ids"].tolist() == [[[own.tokenizer.convert_tokens_to_ids("<v1>")]]]


def test_image_parts_with_an_identity_are_references():
    """The form for data sets with a column of images: TRL fills the image parts from the column."""
    own = processor()
    parts = [shown(KATE[0], identity="Kate"), shown(KATE[1], identity="Kate"), shown(TOM[0], identity="<my_cat>")]
    other = own.apply_chat_template([user(*parts, shown(SCENE, identity=None), "Where is Kate?")], **TOKENIZED)
    assert equal(other, own.apply_chat_template(QUESTION, **TOKENIZED))


def test_strings_as_content_and_later_turns():
    own = processor("qwen2_5_vl")
    messages = [
        {"role": "system", "content": "Be brief."},
        user(identity("Kate", KATE), "Look."),
        {"role": "assistant", "content": "Yes."},
        user(identity("Tom", TOM), shown(SCENE), "Who is it?"),
    ]
    batch = own.apply_chat_template(messages, **TOKENIZED)
    assert batch["image_roles"].tolist() == [0, 0, 0, 1]
    assert batch["identity_index"].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user({"type": "identiy", "name": "Kate"})], r"messages\[0\].content\[0\].type='identiy' is not known"),
        ([user({"text": "hello"})], r'expected a dict with a "type"'),
        ([user({"type": "text", "text": 3})], r"content\[0\].text=3 must be a string"),
        ([user(identity("Kate", []))], r"content\[0\].images=\[\] of 'Kate' must be a list of at least one photo"),
        ([user(identity("Kate", "kate.jpg"))], "must be a list of at least one photo"),
        ([user(identity("", KATE))], r"content\[0\].name='' must be a non-empty string"),
        ([user(identity(" Kate", KATE))], "must be one line without white space at its ends"),
        ([user(identity("Ka\nte", KATE))], "must be one line"),
        ([user(identity("Kate", KATE), identity("Kate", TOM))], "is a second part of 'Kate'"),
        ([user(identity("Kate", KATE), identity("KATE", TOM))], "there is 'Kate' already"),
        ([user(identity("this", KATE))], "'this' does not name anybody"),
        ([user(identity("<image>", KATE))], "holds the placeholder '<image>'"),
        ([user({**identity("Kate", KATE), "image": 1})], "unknown fields 'image'; allowed are name, images"),
        ([user(shown(SCENE), identity("Kate", KATE))], "introduces 'Kate' after an image of the same turn"),
        ([{"role": "system", "content": [identity("Kate", KATE)]}], "introduces 'Kate' in a turn of 'system'"),
        ([user(identity("Kate", ["no.png"]))], "image 'no.png' does not exist"),
        ([user(identity("Kate", ["/no/where.png"]))], "image '/no/where.png' does not exist"),
        ([user(identity("Kate", [b"no image"]))], r"content\[0\].images\[0\]' is not an image or is damaged"),
        ([user(identity("Kate", [3]))], r"content\[0\].images\[0\] is int 3; expected a path"),
        ([user(identity("Kate", [Image.new("I;16", (8, 8))]))], "mode 'I;16', whose range of brightness is unknown"),
        ([user(identity("Kate", KATE), {"type": "image"})], r"content\[1\] has no image; add a path"),
        ([user(identity("Kate", KATE), {"type": "video", "video": "a.mp4"})], "is a video; it cannot be combined"),
        ([user(identity("Kate", KATE), "Where is <image>?")], "holds the placeholder '<image>'; make it an image part"),
        ([user(identity("Kate", KATE), "Bye.<|im_end|>")], r"holds the special token '<\|im_end\|>'"),
        ([], r"messages=\[\] must be a non-empty list"),
        ([user(identity("Kate", KATE)), "?"], r"messages\[1\] is '\?'; expected a dict with 'role' and 'content'"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content=3 must be a string or a list of parts"),
    ],
)
def test_errors_say_where_and_what(messages, message):
    with pytest.raises(ValueError, match=message):
        processor().apply_chat_template(messages, **TOKENIZED)


def test_errors_of_a_batch_name_the_row():
    with pytest.raises(DataError, match=r"messages\[1\]\[0\].content\[0\].images=\[\]"):
        processor().apply_chat_template([GENERAL, [user(identity("Kate", []))]], **PADDED)


def test_relative_paths_do_not_leave_the_image_root(tmp_path):
    (tmp_path / "images").mkdir()
    SCENE.save(tmp_path / "scene.png")
    own = processor(image_root=tmp_path / "images")
    with pytest.raises(DataError, match="leads out of the image root"):
        own.apply_chat_template([user(identity("Kate", ["../scene.png"]))], **TOKENIZED)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "internvl"])
def test_truncation_that_would_cut_an_image_is_an_error(family):
    own = processor(family)
    whole = own.apply_chat_template(QUESTION, **TOKENIZED)
    length = whole["input_ids"].shape[1]
    for limit, side in ((length - 3, "right"), (length, "right")):
        own.tokenizer.truncation_side = side
        options = {"truncation": True, "max_length": limit}
        output = own.apply_chat_template(QUESTION, processor_kwargs=options, **TOKENIZED)
        assert torch.equal(output["input_ids"], whole["input_ids"][:, :limit])
        assert torch.equal(output["num_image_tokens"], whole["num_image_tokens"])
    options = {"truncation": True, "max_length": length // 2, "padding": True}
    with pytest.raises(ValueError, match=rf"row 1 has \d+ tokens.*max_length={length // 2}.*Raise max_length"):
        own.apply_chat_template([TEXT, QUESTION], processor_kwargs=options, **TOKENIZED)


def test_a_template_that_numbers_images_is_refused():
    own = processor("qwen2_vl")
    with pytest.raises(DataError, match=r"writes 'Picture 1: .*' for one image and 'Picture 2: "):
        own.apply_chat_template(QUESTION, add_vision_id=True, **TOKENIZED)


def test_a_template_for_strings():
    """Some templates take the content of a message as a string with placeholders."""
    own = processor("llava")
    own.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    text = own.apply_chat_template(QUESTION)
    assert text == "user: Kate is <image>\nKate is <image>\n<my_cat> is <image>\n<image>Where is Kate?\n"
    own.chat_template = "{% for m in messages %}no content{% endfor %}"
    with pytest.raises(DataError, match="does not write '<image>' for an image part"):
        own.apply_chat_template(QUESTION)


# Text


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_rendered_text_with_its_images_gives_the_same_as_messages(family):
    """Trainers render messages first and pass the text and the images later."""
    own = processor(family)
    options = {"add_generation_prompt": True}
    expected = own.apply_chat_template(QUESTION, **options, **TOKENIZED)
    text = own.apply_chat_template(QUESTION, **options)
    assert equal(own(images=[*KATE, *TOM, SCENE], text=text, return_tensors="pt"), expected)
    later = [user("Hi"), answer("Hi."), *QUESTION]
    text = own.apply_chat_template(later)
    output = own(images=[[*KATE, *TOM, SCENE]], text=[text], return_tensors="pt")
    assert equal(output, own.apply_chat_template(later, **TOKENIZED))


@pytest.mark.parametrize("family", FAMILIES)
def test_lines_of_text_introduce_identities(family):
    own = processor(family)
    text = "Kate is <image>\nKate is <image>.\n<my_cat> is <image>\n<image>\nWhere is Kate?"
    for written in (text, text.replace("\nKate is", "").replace(".\n", ", ")):  # several photos and names on a line
        batch = own(images=[*KATE, *TOM, SCENE], text=written, return_tensors="pt")
        assert batch["image_roles"].tolist() == [0, 0, 0, 1]
        assert batch["identity_index"].tolist() == [0, 0, 1, 0]
        assert (batch["input_ids"] == own.placeholder_id).sum() == batch["num_image_tokens"].sum()
    off = processor(family, read_references=False)
    assert not set(IDENTITY_FIELDS) & set(off(images=[*KATE, *TOM, SCENE], text=text, return_tensors="pt"))


@pytest.mark.parametrize(
    "line",
    ["This is <image>", "Here is <image>", "Picture 1 is <image>", "Kate is in <image>", "Kate is <image> and Tom",
     "This person is <image>", "is <image>", "Is Kate in <image>?", "The image is <image>"],
)  # fmt: skip
def test_other_lines_do_not_introduce_identities(line):
    own = processor()
    images = [SCENE] * line.count("<image>")
    assert "image_roles" not in own(images=images, text=line + "\nWhat?", return_tensors="pt")


def test_identities_of_text():
    own = processor("qwen2_5_vl")
    text = "<image>\nWhere is Kate?"
    lines = "Kate is <image>\nKate is <image>\n<my_cat> is <image>\n"
    expected = own(images=[*KATE, *TOM, SCENE], text=lines + text, return_tensors="pt")
    for identities in (
        {"Kate": KATE, "<my_cat>": TOM[0]},
        [{"name": "Kate", "images": KATE}, {"name": "<my_cat>", "images": TOM}],
        [[identity("Kate", KATE), identity("<my_cat>", TOM)]],
    ):
        assert equal(own(images=SCENE, text=text, identities=identities, return_tensors="pt"), expected)
    batch = own(
        images=[[SCENE], [OTHER], []],
        text=[text, "<image> What?", "Hello"],
        identities=[{"Kate": KATE}, None, None],
        padding=True,
        return_tensors="pt",
    )
    assert batch["image_roles"].tolist() == [0, 0, 1, 2]
    assert batch["sample_index"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"identities": {"Kate": []}}, r"identities\[0\].content|identities\[0\].*images=\[\] of 'Kate'"),
        ({"identities": [{"Kate": KATE}, {"Tom": TOM}]}, "do not fit to 1 texts"),
        ({"identities": {"this": KATE}}, "does not name anybody"),
        ({"identities": {"Kate": ["no.png"]}}, "image 'no.png' does not exist"),
        ({"identities": {"Kate": KATE}, "text": "<image> <image>"}, r"texts have \[2\] .* there are \[1\] images"),
        ({"identities": {"Kate": KATE}, "text": "<|im_start|>user\n<image>"}, "a chat template has rendered it"),
        ({"identities": {"Kate": KATE}, "text": None}, "identities"),
        ({"identities": {"Kate": KATE}, "videos": [1]}, "videos cannot be combined with identities"),
    ],
)
def test_errors_of_text(arguments, message):
    with pytest.raises(ValueError, match=message):
        processor()(**{"images": SCENE, "text": "<image>\nWhere?", "return_tensors": "pt", **arguments})


# Packed identities


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_packed_identities_are_the_same_identities(family):
    own, packing = processor(family), processor(family, pack_identities=True)
    texts = [
        own.apply_chat_template(messages, add_generation_prompt=True) for messages in (QUESTION, GENERAL, QUESTION)
    ]
    images = [[*KATE, *TOM, SCENE], [OTHER], [*TOM, *KATE, OTHER]]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    expected = own(images=images, text=texts, **options)
    packed = dict(packing(images=images, text=texts, padding=True, return_tensors="pt"))
    assert packed.keys() == {*expected.keys(), FIELD} - set(IDENTITY_FIELDS)
    rows = torch.tensor([2, 0, 1])
    reordered = {FIELD: packed[FIELD][rows]}  # rows and columns may move
    unpack_identities(packed)
    for name in set(expected) - {"original_image_sizes"}:
        assert torch.equal(packed[name], expected[name]), name
    unpack_identities(reordered)
    assert reordered["sample_index"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert torch.equal(reordered["identity_name_ids"], expected["identity_name_ids"][rows])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_model_takes_packed_identities(family):
    model = attach_id_former(tiny_model(family), num_heads=4, gate="none", identity_embedding="name")
    own, packing = processor(family), processor(family, pack_identities=True)
    text = own.apply_chat_template(QUESTION, add_generation_prompt=True)
    images = [*KATE, *TOM, SCENE]
    fields = own(images=images, text=text, return_tensors="pt")
    packed = packing(images=images, text=text, return_tensors="pt")
    without = {name: value for name, value in fields.items() if name not in IDENTITY_FIELDS}
    with torch.no_grad():
        expected, found, other = (model(**inputs).logits for inputs in (fields, packed, without))
        hidden = model.base_model(**packed).last_hidden_state
        assert torch.equal(hidden, model.base_model(**fields).last_hidden_state)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, other)


# Samples


def sample(number: int = 0) -> Sample:
    """An identity sample, a general sample and a sample of text only."""
    if number == 1:
        parts = [Part("image", image=OTHER), Part("text", text="What is this?")]
        return Sample("1", "general", [], [Message("user", parts), Message("assistant", [Part("text", text="A hat")])])
    if number == 2:
        turns = [Message("user", [Part("text", text="Hello")]), Message("assistant", [Part("text", text="Hi there.")])]
        return Sample("2", "general", [], turns)
    turns = [
        Message("user", [Part("image", image=SCENE), Part("text", text="Where is Kate?")]),
        Message("assistant", [Part("text", text="At "), Part("box", name="Kate", image=SCENE), Part("text", text=".")]),
        Message("user", [Part("text", text="And Tom?")]),
        Message("assistant", [Part("text", text="Tom is reading.")]),
    ]
    identities = [Identity("Kate", KATE), Identity("<my_cat>", TOM)]
    return Sample("0", "identity", identities, turns, [Box("Kate", SCENE, [10, 10, 30, 40])])


BOX_TEXT = "[156, 208, 468, 832]"


def labelled(own: IdentityProcessor, labels: torch.Tensor) -> list[str]:
    """The texts of consecutive labels."""
    texts, run = [], []
    for label in [*labels.tolist(), -100]:
        if label != -100:
            run.append(label)
        elif run:
            texts.append(own.tokenizer.decode(run))
            run = []
    return texts


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_samples_render_to_the_same_messages(family):
    own = processor(family)
    for number in range(3):
        messages = sample_to_messages(sample(number), lambda part: BOX_TEXT)
        expected = own.apply_chat_template(messages, **TOKENIZED)
        encoded = own.encode(sample(number))
        assert torch.equal(encoded["input_ids"], expected["input_ids"][0])
        for name in set(expected) - {"input_ids", "attention_mask", "sample_index", *IDENTITY_FIELDS}:
            assert torch.equal(encoded[name].squeeze(0), expected[name].squeeze(0)), name
        prompt = own.encode(sample(number), add_generation_prompt=True)
        assert (prompt["labels"] == -100).all()
    assert torch.equal(own.encode(sample())["image_roles"], torch.tensor([0, 0, 0, 1]))


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_labels_are_the_answers_with_the_end_of_turn(family):
    own = processor(family)
    end = "" if family.startswith("llava") else own.tokenizer.eos_token  # templates that mark the text only
    texts = [text.strip() for text in labelled(own, own.encode(sample())["labels"])]
    assert texts == [f"At {BOX_TEXT}.{end}", f"Tom is reading.{end}"]
    assert [text.strip() for text in labelled(own, own.encode(sample(1))["labels"])] == [f"A hat{end}"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_collating_equals_processing_the_whole_batch(family, side):
    own = processor(family)
    samples = [sample(number) for number in range(3)]
    batch = own.collate([{"source": s.source, **own.encode(s)} for s in samples], padding_side=side)
    messages = [sample_to_messages(s, lambda part: BOX_TEXT) for s in samples]
    options = {**TOKENIZED, "processor_kwargs": {"padding": True, "padding_side": side}}
    expected = own.apply_chat_template(messages, **options)
    for name, value in expected.items():
        if family in ("smolvlm", "idefics3") and name.startswith("pixel"):
            assert not value[2].any()  # a row without images
            value = value[:2]
        assert torch.equal(batch[name], value), name
    assert batch["source"] == ["identity", "general", "general"]
    assert batch["box_image"].tolist() == [3]
    assert batch["box_identity"].tolist() == [0]
    general = own.collate([own.encode(s) for s in samples[1:]], padding_side=side)
    assert not set(general) & {*IDENTITY_FIELDS, "boxes"}


def test_boxes_are_moved_with_the_crop():
    kept = processor("llava").encode(sample())["boxes"][0]  # CLIP crops the centre: 48 of 64 columns
    assert kept == pytest.approx([10 - 8 + 10 / 3, 10, 30 - 8 + 30 / 3, 40], abs=6.0)
    assert kept[0] < 10
    assert processor("qwen2_5_vl").encode(sample())["boxes"].tolist() == [[10, 10, 30, 40]]


def test_boxes_are_written_and_read_in_the_same_form():
    for form, text in (("unit", "[0.156, 0.208, 0.469, 0.833]"), ("pixels", "[10, 10, 30, 40]")):
        own = processor("qwen2_5_vl", box_format=form)
        assert text in labelled(own, own.encode(sample())["labels"])[0]
        assert own.parse_box(text, (48, 64)) == pytest.approx([10, 10, 30, 40], abs=0.1)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_narrow_images_are_refused_before_any_resize(family):
    """CLIP's processor would bring 2 x 8000 pixels to gigabytes."""
    strip = Image.new("RGB", (2, 8000))
    own = processor(family)
    for image in (strip, np.asarray(strip)):
        with pytest.raises(DataError, match=r"has 2 x 8000 pixels, .* of 4000, more than max_aspect_ratio=200; crop"):
            own(images=[image], text="<image> What?", return_tensors="pt")
    with pytest.raises(ValueError, match="max_aspect_ratio=0 must be"):
        processor(family, max_aspect_ratio=0)
    with pytest.raises(DataError, match="an aspect ratio of 3, more than max_aspect_ratio=2;"):
        processor(family, max_aspect_ratio=2)(images=[Image.new("RGB", (30, 10))], text="<image>", return_tensors="pt")


def test_relative_boxes_and_boxes_of_parts():
    """As ms-swift's: the image has 64 x 48 pixels."""
    own = processor("qwen2_5_vl", box_format="pixels")
    one = sample()
    part = Part("box", image=one.boxes[0].image, box=[0.5, 0, 1, 0.5], relative=True)
    box = Box("Kate", one.boxes[0].image, [0.5, 0, 1, 0.5], relative=True)
    messages = [*one.messages[:1], Message("assistant", [Part("text", text="At "), part])]
    encoded = own.encode(replace(one, boxes=[box], messages=messages))
    assert labelled(own, encoded["labels"])[0].startswith("At [32, 0, 64, 24]")
    assert encoded["boxes"].tolist() == [[32, 0, 64, 24]]


def test_boxes_of_the_resized_image_follow_the_wrapped_image_processor():
    own = processor("qwen2_5_vl", box_format="resized")
    image_processor = own.processor.image_processor
    grid = image_processor(images=[Image.new("RGB", (90, 70))], return_tensors="pt")["image_grid_thw"][0]
    height, width = (grid[1:] * image_processor.patch_size).tolist()
    assert own.parse_box(f"[0, 0, {width}, {height}]", (70, 90)) == [0, 0, 90, 70]
    assert own.read_box(f"[0, 0, {2 * width}, {height}]", (70, 90)) == (None, "convention")
    with pytest.raises(ValueError, match=r"box_format='resized': \w+ does not resize as Qwen2\.5-VL does"):
        processor("llava", box_format="resized")


def test_errors_of_encode():
    with pytest.raises(DataError, match=r"sample '0' has \d+ tokens, more than max_length=20") as caught:
        processor("qwen2_5_vl", max_length=20).encode(sample())
    assert caught.value.kind == "length"
    outside = sample()
    outside.boxes[0] = Box("Kate", SCENE, [100, 10, 120, 30])
    with pytest.raises(DataError, match="lies outside its image of 64 x 48 pixels"):
        processor().encode(outside)
    with pytest.raises(ValueError, match=r"has no chat template; set processor\.chat_template"):
        processor("paligemma").encode(sample())
    glm = IdentityProcessor(tiny_processor("glm4v"))
    with pytest.raises(DataError, match="assistant turns have no end-of-turn text"):
        glm.encode(sample())


def test_records_of_a_file(tmp_path):
    import json

    for name, photo in (("kate.png", KATE[0]), ("scene.png", SCENE)):
        photo.save(tmp_path / name)
    record = {
        "id": 1,
        "identities": [{"name": "Kate", "images": ["kate.png"]}],
        "messages": [
            {"role": "user", "content": [shown("scene.png"), {"type": "text", "text": "Where is Kate?"}]},
            {"role": "assistant", "content": [{"type": "box", "name": "Kate"}]},
        ],
        "boxes": [{"name": "Kate", "image": "scene.png", "box": [10, 10, 30, 40]}],
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    own = processor("qwen2_5_vl")
    dataset = RecordDataset(tmp_path / "train.jsonl", tmp_path, encode=own.encode)
    batch = own.collate([dataset[0], dataset[0]])
    assert batch["source"] == ["identity"] * 2
    assert batch["sample_ids"] == ["1"] * 2
    assert batch["image_roles"].tolist() == [0, 1] * 2
    assert batch["box_image"].tolist() == [1, 3]


def test_a_record_to_ask_needs_no_answer():
    record = {
        "identities": [{"name": "Kate", "images": ["kate.png"]}],
        "messages": [{"role": "user", "content": "Where is Kate?"}],
    }
    with pytest.raises(DataError, match="training record ends with the answer"):
        parse_sample(record)
    asked = parse_sample(record, prompt=True)
    assert asked.task is None
    assert not asked.is_evaluation
    record["messages"].append({"role": "assistant", "content": "Here."})
    with pytest.raises(DataError, match="a prompt ends with the question: remove the last assistant turn"):
        parse_sample(record, prompt=True)


def test_messages_become_a_sample():
    """The way back, for processors that encode samples."""
    messages = [*QUESTION, answer("There."), user("Sure?")]
    conversation = read_conversation(messages)
    found = conversation_to_sample(conversation, [photo.image for photo in conversation.photos])
    assert [found.source, [one.name for one in found.identities]] == ["identity", ["Kate", "<my_cat>"]]
    assert found.identities[0].images == KATE
    assert found.message_images == [SCENE]
    assert [message["role"] for message in sample_to_messages(found)] == ["user", "assistant", "user"]
    again = read_conversation(sample_to_messages(found))
    assert again.identities == conversation.identities
    assert [photo.identity for photo in again.photos] == [photo.identity for photo in conversation.photos]
    wrong = read_conversation([{"role": "assistant", "content": [shown(SCENE)]}])
    with pytest.raises(DataError, match="only user turns have images"):
        conversation_to_sample(wrong, [SCENE])


# An ordinary processor


def test_it_is_a_processor():
    own = processor("qwen2_5_vl")
    assert isinstance(own, ProcessorMixin)
    assert own.tokenizer is own.processor.tokenizer
    assert own.image_processor is own.processor.image_processor
    assert own.image_token == "<|image_pad|>"
    assert not hasattr(own, "feature_extractor")
    assert own.model_input_names == [*own.processor.model_input_names, *IDENTITY_FIELDS]
    ids = own.tokenizer("Kate")["input_ids"]
    assert own.decode(ids) == own.batch_decode([ids])[0] == "Kate"
    assert own.post_process_image_text_to_text(torch.tensor([ids])) == ["Kate"]
    own.chat_template = "{{ messages[0]['content'] }}"
    assert own.processor.chat_template == own.chat_template
    assert "IdentityProcessor(Qwen2_5_VLProcessor" in repr(own)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_save_and_load(family, tmp_path):
    own = processor(family, box_format="unit", max_length=500, allow_urls=True, image_root=tmp_path)
    own.save_pretrained(tmp_path)
    loaded = IdentityProcessor.from_pretrained(tmp_path)
    assert loaded.options() == own.options()
    assert loaded.image_root is None
    assert type(loaded.processor) is type(own.processor)
    options = {**TOKENIZED, "add_generation_prompt": True}
    assert equal(loaded.apply_chat_template(QUESTION, **options), own.apply_chat_template(QUESTION, **options))
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(own.processor)
    other = IdentityProcessor.from_pretrained(tmp_path, box_format="pixels", image_root=tmp_path)
    assert (other.box_format, other.max_length, other.image_root) == ("pixels", 500, tmp_path)


def test_a_saved_wrapped_processor_can_be_wrapped(tmp_path):
    tiny_processor("llava").save_pretrained(tmp_path)
    assert IdentityProcessor.from_pretrained(tmp_path).options() == processor().options()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_copies_and_pickles(family):
    own = processor(family, box_format="unit")
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert other.options() == own.options()
        assert other.tokenizer is not own.tokenizer
        assert equal(other.apply_chat_template(QUESTION, **TOKENIZED), own.apply_chat_template(QUESTION, **TOKENIZED))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"identity_format": "{name}: {image}\n"}, "set read_references=False"),
        ({"identity_format": "{name}\n", "read_references": False}, r"must contain \{image\} once"),
        ({"identity_format": "{name} {image}", "read_references": False}, "end it with a line break"),
        ({"box_format": "corners"}, "box_format='corners' is not known"),
        ({"max_length": 0}, "max_length"),
        ({"placeholder": "<no>"}, "placeholder='<no>' is not a token"),
    ],
)
def test_errors_of_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_only_processors_of_vision_language_models_are_wrapped():
    with pytest.raises(ValueError, match="processor is an IdentityProcessor already"):
        IdentityProcessor(processor())
    with pytest.raises(ValueError, match="is not the processor of a vision-language model"):
        IdentityProcessor(processor().tokenizer)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_pipeline_answers_with_an_identity_part(family):
    model = attach_id_former(tiny_model(family), num_heads=4, gate="none", identity_embedding="name")
    own = processor(family)
    pipe = pipeline("image-text-to-text", model=model, processor=own)
    found = pipe(text=QUESTION, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
    inputs = own.apply_chat_template(QUESTION, add_generation_prompt=True, **TOKENIZED)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = own.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == new


# TRL

REFERENCES = [{"type": "image", "identity": "Kate"}] * 2 + [{"type": "image", "identity": "<my_cat>"}]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_collator_of_sft(family, tmp_path):
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    own = processor(family, image_root=tmp_path)
    for number, photo in enumerate([*KATE, *TOM, SCENE]):
        photo.save(tmp_path / f"{number}.png")
    collator = sft.DataCollatorForVisionLanguageModeling(own)
    asked = [user(*REFERENCES, {"type": "image"}, "Where is Kate?")]
    expected = own.apply_chat_template(
        [[*QUESTION, answer("Here.")]], **TOKENIZED, processor_kwargs={"add_special_tokens": False}
    )
    rows = [
        {"messages": [*asked, answer("Here.")], "images": [*KATE, *TOM, SCENE]},
        {"messages": [*asked, answer("Here.")], "images": ["0.png", "1.png", "2.png", "3.png"]},
        # Arrow fills the fields that a part lacks with None.
        {
            "messages": [
                user(
                    {**identity("Kate", ["0.png", "1.png"]), "text": None, "identity": None},
                    {**identity("<my_cat>", ["2.png"]), "text": None, "identity": None},
                    {"type": "image", "text": None, "name": None, "images": None, "identity": None},
                    "Where is Kate?",
                ),
                answer("Here."),
            ],
            "images": [SCENE],
        },
    ]
    for row in rows:
        batch = collator([row])
        assert all(torch.equal(batch[name], value) for name, value in expected.items())
    batch = collator([{"prompt": asked, "completion": [answer("Here.")], "images": [*KATE, *TOM, SCENE]}])
    for name in (*IDENTITY_FIELDS, "pixel_values"):
        assert torch.equal(batch[name], expected[name]), name


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_grpo_passes_the_identities_to_the_model(family, tmp_path, monkeypatch):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    own = processor(family, pack_identities=True)
    own.tokenizer.padding_side = "left"
    model = attach_id_former(tiny_model(family), num_heads=4, gate="none", identity_embedding="name")
    seen = []

    def forward(images, image_roles, sample_index, identity_index, **options):
        seen.append((image_roles.tolist(), sample_index.tolist(), options["name_embeddings"] is not None))
        return type(model.id_former).forward(
            model.id_former, images, image_roles, sample_index, identity_index, **options
        )

    monkeypatch.setattr(model.id_former, "forward", forward)
    rows = [
        {"prompt": [user(*REFERENCES, {"type": "image"}, "Where is Kate?")], "images": [*KATE, *TOM, SCENE]},
        {"prompt": [user({"type": "image", "identity": "Tom"}, {"type": "image"}, "Tom?")], "images": [*TOM, OTHER]},
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    args = trl.GRPOConfig(
        output_dir=tmp_path, max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=3,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model, lambda completions, **_: [float(len(one[0]["content"])) for one in completions], args, dataset,
        processing_class=own,
    )  # fmt: skip
    trainer.train()
    generation, loss = seen  # rows are shuffled in between
    assert sorted(generation[0]) == sorted(loss[0]) == [0] * 8 + [1] * 4
    assert sorted(generation[1].count(row) for row in range(4)) == [2, 2, 4, 4]
    assert sorted(loss[1].count(row) for row in range(4)) == [2, 2, 4, 4]
    assert generation[2] is loss[2] is True


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "smolvlm", "internvl", "gemma3"])
def test_tokens_are_counted_without_decoding_images(family, tmp_path, monkeypatch):
    """Images of several sizes, which most families give different numbers of tokens."""
    sizes = {"kate.png": (80, 60), "tom.png": (30, 70), "scene.png": (120, 40), "wide.png": (60, 20)}
    for seed, (name, size) in enumerate(sizes.items()):
        image(seed, *size).save(tmp_path / name)
    one = processor(family)
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "image": "scene.png"}, {"type": "text", "text": "Where is Kate?"}],
        },
        {"role": "assistant", "content": [{"type": "box", "name": "Kate"}]},
    ]
    people = [{"name": "Kate", "images": ["kate.png"]}, {"name": "Tom", "images": ["tom.png", "kate.png"]}]
    boxes = [{"name": "Kate", "image": "scene.png", "box": [10, 5, 60, 38]}]
    general = [{"role": "user", "content": "What is Tom doing?"}, {"role": "assistant", "content": "Tom is waving."}]
    records = [
        {"id": "0", "source": "identity", "identities": people, "messages": turns, "boxes": boxes},
        {"id": "1", "source": "general", "messages": general},
        {"id": "2", "source": "general", "messages": [{"role": "user", "content": turns[0]["content"]}, general[1]]},
    ]
    samples = [parse_sample(entry, where="x:1", image_root=tmp_path) for entry in records]
    expected = [len(one.encode(sample)["input_ids"]) for sample in samples]
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("an image was decoded"))
    assert [one.num_tokens(sample) for sample in samples] == expected
