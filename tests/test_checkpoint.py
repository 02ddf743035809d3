"""Checkpoints for evaluation: complete, with finite weights, or an error that names file or parameter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from idavlm import IDAVLMForConditionalGeneration
from idavlm.evaluation import load_checkpoint
from idavlm.experimental.small_models import small_vision_tower
from tests.small_models import small_model, small_processor

LAYER = "language_model.model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    processor = small_processor()
    small_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "model")


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def test_a_complete_checkpoint_is_loaded_without_a_word(complete, capfd):
    model, processor = load_checkpoint(complete)
    assert not model.training
    assert processor.box_format == "bins32"
    assert "MISSING" not in capfd.readouterr().err


def test_tied_weights_are_not_missing(tmp_path):
    processor = small_processor()
    tokenizer = processor.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=32), LlamaForCausalLM(config), processor=processor, num_heads=2
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, _ = load_checkpoint(tmp_path)
    assert loaded.language_model.lm_head.weight is loaded.language_model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {name: w for name, w in weights.items() if "language_model.model.layers" not in name},
         r"18 weights are missing: language_model\.model\.layers\.0\.input_layernorm\.weight, .* and 8 more"),
        (lambda weights: {name: w for name, w in weights.items() if name != LAYER},
         r"1 weights are missing: language_model\.model\.layers\.0\.mlp\.up_proj\.weight"),
        (lambda weights: {"other": torch.zeros(1)},
         "weights are missing: .* 1 weights do not belong to the model: other"),
        (lambda weights: weights | {"more.weight": torch.zeros(2)}, "do not belong to the model: more.weight"),
        (lambda weights: weights | {LAYER: weights[LAYER][:5].clone()},
         r"1 weights have other shapes than the model: .*up_proj\.weight \(file: \[5, 32\], model: \[\d+, 32\]\)"),
        (lambda weights: {name: w * float("nan") if w.is_floating_point() else w for name, w in weights.items()},
         r"\d+ weights hold NaN or infinite values: .* and \d+ more"),
        (lambda weights: weights | {LAYER: weights[LAYER].index_fill(0, torch.tensor([3]), float("inf"))},
         r"1 weights hold NaN or infinite values: .*up_proj\.weight\. The training diverged"),
    ],
    ids=["no layers", "one missing", "others", "one too many", "another shape", "all NaN", "one infinite"],
)  # fmt: skip
def test_weights_that_would_be_replaced_by_random_ones_are_an_error(checkpoint, change, message, capfd):
    change_weights(checkpoint, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert "MISSING" not in capfd.readouterr().err, "the error says it"


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_cut_weights_are_named(checkpoint, size):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", '"\\ud800"', ""])
@pytest.mark.parametrize("name", ["config", "generation_config", "processor_config", "tokenizer_config", "tokenizer"])
def test_a_file_that_is_no_json_object_is_named(checkpoint, name, content):
    (checkpoint / f"{name}.json").write_text(content)
    with pytest.raises(
        ValueError, match=rf"model/{name}\.json (is not valid JSON|holds a JSON|holds half a surrogate pair)"
    ):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["vision_config", "text_config", "connector_config", "image_token_id", "connector"])
@pytest.mark.parametrize("value", [None, "x", -1, [], {}])
def test_a_wrong_field_of_the_config_is_an_error_of_the_checkpoint(checkpoint, name, value):
    """Or the model that it describes is loaded, for example with default values."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, name: value}))
    message = ""
    try:
        load_checkpoint(checkpoint)
    except (ValueError, OSError) as error:
        message = str(error)
    assert not message or str(checkpoint) in message


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no 'weight_map'"), ({"weight_map": {}}, "has no 'weight_map'"), ([], "holds a JSON list"),
        ({"weight_map": {"a": 3}}, "has no 'weight_map'"), ({"weight_map": {"a": "part-1.safetensors"}}, "part-1"),
    ],
)  # fmt: skip
def test_a_broken_index_is_named(checkpoint, index, message):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json.*{message}"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cuda:-1", "meta", 99, "cuda:one"])
def test_a_device_that_cannot_be_used_is_named(complete, device):
    with pytest.raises(ValueError, match=rf"device='{device}'"):
        load_checkpoint(complete, device=device)
