"""Processors of converted checkpoints: exact prompts of each system, images, boxes, end tokens."""

import json

import pytest
import torch
from PIL import Image

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor
from idavlm.conversion import convert
from idavlm.data import parse_sample
from idavlm.evaluation.generation import generate_texts
from tests.released import released, sentencepiece_tokenizer
from tests.small_models import draw_images

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
PROMPTS = {
    "llava-1.5": f"<s>{VICUNA} USER: {{image}}\nWho? ASSISTANT:{{answer}} It is Kate.</s>{{end}}USER: Why? ASSISTANT:",
    "yi-vl": "\n\n### Human: {image}\nWho?\n### Assistant:{answer} It is Kate.\n###{end} Human: Why?\n### Assistant:",
    "iaa": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{image}\nWho?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{answer}It is Kate.<|eot_id|>{end}"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "ida-vlm": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<img>{image}</img>\nWho?<|im_end|>"
        "\n<|im_start|>assistant\n{answer}It is Kate.<|im_end|>{end}\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
}
BOXES = {"llava-1.5": "unit", "yi-vl": "unit", "iaa": "square", "ida-vlm": "qwen"}
ENDS = {"llava-1.5": ["</s>"], "yi-vl": ["</s>"], "iaa": ["<|end_of_text|>", "<|eot_id|>"]}
ENDS["ida-vlm"] = ["<|endoftext|>", "<|im_end|>"]


@pytest.fixture(scope="module", params=PROMPTS)
def system(request):
    return request.param


@pytest.fixture(scope="module")
def folder(system, tmp_path_factory):
    folder = tmp_path_factory.mktemp(system)
    draw_images(folder, ["scene.png", "kate.png"], size=(80, 40))
    return convert(released(system, folder), folder / "out", progress=False)


@pytest.fixture(scope="module")
def processor(folder):
    return IDAVLMProcessor.from_pretrained(folder)


def sample(folder, *, turns: int = 2, **more):
    first = [{"type": "image", "image": "scene.png"}, {"type": "text", "text": "\nWho?"}]
    texts = [first, "It is Kate.", "Why?", "Because."]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts[:turns])]
    return parse_sample({"messages": messages, **more}, image_root=folder.parent)


def test_prompts_and_labels(system, folder, processor):
    asked = processor.encode(sample(folder, turns=3, type="qa_single", answer="x"), add_generation_prompt=True)
    prompt = PROMPTS[system].format(image=processor.image_token * processor.image_seq_length, answer="", end="")
    text = processor.tokenizer.decode(asked["input_ids"])
    assert text.endswith(prompt)
    assert text == prompt or (system == "yi-vl" and text.startswith("This is a chat between an inquisitive human"))
    learned = processor.encode(sample(folder))
    answer = PROMPTS[system].partition("{answer}")[2].partition("{end}")[0]
    assert processor.tokenizer.decode(learned["labels"][learned["labels"] >= 0]) == answer
    start = int((learned["labels"] >= 0).nonzero()[0])
    assert torch.equal(asked["input_ids"][:start], learned["input_ids"][:start]), (
        "training sees what generation starts from"
    )


def test_identities_boxes_and_ends(system, folder, processor):
    identities = [{"name": "Kate", "images": ["kate.png"]}]
    encoded = processor.encode(sample(folder, identities=identities))
    image = "<img>{}</img>" if system == "ida-vlm" else "{}"
    line = f"Kate is {image.format(processor.image_token * processor.image_seq_length)}\n"
    assert line in processor.tokenizer.decode(encoded["input_ids"])
    assert encoded["image_roles"].tolist() == [0, 1]
    assert processor.box_format == BOXES[system]
    model = IDAVLMForConditionalGeneration.from_pretrained(folder)
    assert model.config.image_token_id == processor.image_token_id
    ends = model.generation_config.eos_token_id
    assert processor.tokenizer.convert_ids_to_tokens(ends) == ENDS[system]


def test_a_sample_is_answered(system, folder, processor):
    model = IDAVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    asked = sample(folder, turns=1, type="qa_single", answer="x")
    ((text, size),) = generate_texts(model, processor, [asked], 24)
    assert size == (40, 80)
    if system != "yi-vl":
        return
    assert model.generation_config.stop_strings == ["###"]
    stop = processor.tokenizer.encode("#", add_special_tokens=False)[0]
    with torch.no_grad():  # a model that generates "#" only
        model.language_model.lm_head.weight.zero_()
        model.language_model.lm_head.weight[stop] = 1
        model.language_model.model.norm.weight.zero_()
    model.language_model.model.norm.register_forward_hook(lambda *_: torch.ones_like(_[2]))
    inputs = processor.collate([processor.encode(asked, add_generation_prompt=True)])
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "sample_index")}
    out = model.generate(**inputs, max_new_tokens=24, tokenizer=processor.tokenizer)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == [stop] * 3
    ((text, _),) = generate_texts(model, processor, [asked], 24)
    assert text == ""


def test_text_between_images_is_tokenized_as_in_llava(tmp_path):
    """LLaVA tokenizes each piece alone; with a SentencePiece tokenizer it starts with a space marker."""
    llava, tokenizer = released("llava-1.5", tmp_path), sentencepiece_tokenizer(320)
    tokenizer.save_pretrained(llava)
    draw_images(tmp_path, ["scene.png"])
    processor = IDAVLMProcessor.from_pretrained(convert(llava, tmp_path / "out", progress=False))
    asked = processor.encode(
        sample(tmp_path / "out", turns=1, type="qa_single", answer="x"), add_generation_prompt=True
    )
    pieces = [f"{VICUNA} USER: ", "\nWho? ASSISTANT:"]
    before, after = (tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces)
    image = [processor.image_token_id] * processor.image_seq_length
    assert asked["input_ids"].tolist() == [tokenizer.bos_token_id, *before, *image, *after]
    assert tokenizer.convert_ids_to_tokens([before[0], after[0]])[0].startswith("▁")


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_llava_pads_images_if_its_configuration_says_so(tmp_path, aspect):
    llava = released("llava-1.5", tmp_path)
    config = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": aspect}))
    processor = IDAVLMProcessor.from_pretrained(convert(llava, tmp_path / "out", progress=False))
    (pixels,) = processor._pixels([Image.new("RGB", (80, 40), "white")])
    assert (pixels[:, :12].abs().max() < 0.02) == (aspect == "pad")


@pytest.mark.parametrize("system", ["iaa"], indirect=True)
def test_grounding_pads_to_squares_and_other_workflows_crop(folder, processor):
    grounding = IDAVLMProcessor.from_pretrained(folder / "grounding")
    image = Image.new("RGB", (80, 40), "white")
    cropped, padded = (each._pixels([image])[0] for each in (processor, grounding))
    assert cropped.shape == padded.shape == (3, 56, 56)
    assert cropped.std(dim=(1, 2)).max() < 1e-4, "the centre of a white image"
    assert padded[:, :12].abs().max() < 0.02, "the mean colour at the top"
    torch.testing.assert_close(padded[:, 20:36], cropped[:, 20:36])


@pytest.mark.parametrize("system", ["ida-vlm"], indirect=True)
def test_qwen_markup_is_part_of_an_answer(processor):
    text = "<ref>Kate</ref><box>(120,40),(630,980)</box>"
    ids = processor.tokenizer(text + "<|im_end|>").input_ids
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert processor.parse_box(text, (1000, 1000)) == pytest.approx([120.12, 40.04, 630.63, 980.98], abs=0.01)
