"""Errors name the argument, the value and the remedy."""

import pytest
import torch
from torch import nn
from transformers import LlamaModel

from idavlm import add_inner_adaptors, load_adaptors, save_adaptors
from idavlm.modules.inner_adaptor import train_workflow, use_workflow
from tests.inner_adaptor_models import adapted, language_model, prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": [1, 4]},
            r"layers=\[1, 4\]: 4 does not exist; pass distinct indices of the 4 layers of LlamaModel, 0 to 3",
        ),
        ({"layers": [-1]}, r"layers=\[-1\]: -1 does not exist"),
        ({"layers": [1.5]}, r"1\.5 does not exist"),
        ({"layers": []}, r"layers=\[\]: the list is empty"),
        ({"layers": [1, 1]}, "an index is repeated"),
        ({"every": 5}, "every=5 exceeds the 4 layers of LlamaModel; pass at most 4"),
        ({"every": 0}, "every=0 must be"),
        ({}, "layers=None and every=None: pass exactly one"),
        ({"layers": [0], "every": 2}, r"layers=\[0\] and every=2: pass exactly one"),
        ({"every": 2, "workflows": ()}, r"workflows=\[\]: pass at least one"),
        ({"every": 2, "workflows": ("text",)}, "workflows contains 'text'; 'text' always exists and is not listed"),
        ({"every": 2, "workflows": ("a.b",)}, r"workflows contains 'a\.b'"),
        ({"every": 2, "workflows": ("options",)}, "workflows contains 'options'.*not be an attribute"),
        ({"every": 2, "workflows": ("a", "a")}, "no name twice"),
        (
            {"every": 2, "composition": "series"},
            "composition='series' is not known; choose one of 'serial'",
        ),
        ({"every": 2, "rank": 0}, "rank=0 must be an integer of at least 1"),
        (
            {"every": 2, "modules_to_copy": ("head",)},
            "modules_to_copy='head' is not known; choose one of 'embeddings', 'norm', 'lm_head'",
        ),
        ({"every": 2, "modules_to_copy": ("connector",)}, "belong together; pass both or neither"),
    ],
)
def test_wrong_choices(options, message):
    model = language_model()
    with pytest.raises(ValueError, match=message):
        add_inner_adaptors(model, **options)
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is unchanged"
    assert not hasattr(model, "inner_adaptor")


def test_unknown_workflow():
    model = adapted()
    message = "workflow='ground' is not known; choose one of 'multimodal', 'grounding', 'text'"
    with pytest.raises(ValueError, match=message), use_workflow(model, "ground"):
        pass
    with pytest.raises(ValueError, match=message), model.inner_adaptor.workflow("ground"):
        pass
    with pytest.raises(ValueError, match=message):
        train_workflow(model, "ground")
    assert model.inner_adaptor.active == "multimodal"
    with pytest.raises(ValueError, match="workflow='text', but LlamaForCausalLM has no inner adaptors"):
        train_workflow(language_model(), "text")


def test_workflow_is_not_an_argument_of_a_language_model():
    """Its forward method would ignore it."""
    model = adapted()
    message = r"workflow='grounding' is not an argument of LlamaModel.*with use_workflow\(model, 'grounding'\)"
    with pytest.raises(ValueError, match=message):
        model(prompt(), workflow="grounding")
    with pytest.raises(ValueError, match=r"not used by the model: \['workflow'\]"):
        model.generate(prompt(), workflow="grounding", max_new_tokens=1)


@pytest.mark.parametrize("name", ["embeddings", "lm_head"])
def test_vocabulary_resized_afterwards(name):
    model = adapted(modules_to_copy=(name,), options={"tie_word_embeddings": False})
    model.resize_token_embeddings(80)
    message = rf"{name} of the language model: 80 tokens, but 64 in the copies.*before add_inner_adaptors"
    with pytest.raises(ValueError, match=message):
        model(prompt())
    with use_workflow(model, "text"):
        assert model(prompt()).logits.shape[-1] == 80
    resizable = adapted(modules_to_copy=("norm",))
    resizable.resize_token_embeddings(80)
    assert resizable(prompt() + 16).logits.shape[-1] == 80


def test_layers_that_cannot_be_found():
    model = language_model()
    model.model.layers = nn.ModuleList([nn.ModuleList(model.model.layers[:3]), model.model.layers[3]])
    message = r"LlamaForCausalLM: no nn.ModuleList of num_hidden_layers=4.*'layers' of length 2, 'layers.0' of length 3"
    with pytest.raises(ValueError, match=message):
        add_inner_adaptors(model, every=2)
    with pytest.raises(ValueError, match="language_model=Linear is not a transformers model"):
        add_inner_adaptors(nn.Linear(2, 2), every=2)


def test_parts_that_do_not_exist():
    headless = LlamaModel(language_model().config)
    with pytest.raises(ValueError, match="contains 'lm_head', which LlamaModel does not have; leave it out"):
        add_inner_adaptors(headless, every=2, modules_to_copy=("lm_head",))
    add_inner_adaptors(headless, every=2)
    with torch.no_grad():
        outputs = [headless(prompt()).last_hidden_state]
        with use_workflow(headless, "text"):
            outputs.append(headless(prompt()).last_hidden_state)
    assert not torch.equal(*outputs)


def test_adaptors_twice():
    with pytest.raises(ValueError, match="already has inner adaptors for 'multimodal', 'grounding'"):
        add_inner_adaptors(adapted(), every=2)


def test_weights_that_cannot_be_copied():
    model = language_model()
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"rank=None.*'mlp.up_proj.weight' of LlamaDecoderLayer is quantised.*rank=16"):
        add_inner_adaptors(model, layers=[1])
    add_inner_adaptors(model, layers=[1], rank=2)
    sharded = language_model()
    sharded.lm_head.weight.full_tensor = None  # a method of DTensors
    with pytest.raises(ValueError, match=r"sharded by FSDP.*before"):
        add_inner_adaptors(sharded, every=2)


def test_loading_into_another_model(tmp_path):
    save_adaptors(adapted(), tmp_path)
    with pytest.raises(ValueError, match=r"trained on .*'llama'.*, but language_model is .*'qwen2'"):
        load_adaptors(language_model("qwen2"), tmp_path)
    with pytest.raises(ValueError, match=r"'num_hidden_layers': 4.*but.*'num_hidden_layers': 3"):
        load_adaptors(language_model(num_hidden_layers=3), tmp_path)
    other = language_model()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"another language model of the same sizes.*'2.mlp.up_proj.weight'"):
        load_adaptors(other, tmp_path)
    assert not hasattr(other, "inner_adaptor")
    with pytest.raises(ValueError, match=r"saved with layers=\[1, 2\], but language_model has layers=\[3\]"):
        load_adaptors(adapted(layers=[3]), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*save_adaptors"):
        load_adaptors(language_model(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no inner adaptors; call add_inner_adaptors"):
        save_adaptors(language_model(), tmp_path)
