"""Inner adaptors compute what the release of IAA computes: golden tensors of ``iaa-tiny`` in all three workflows."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

from idavlm import add_inner_adaptors, build_connector
from idavlm.modules.inner_adaptor import use_workflow
from tests.released import FIXTURES, expected, released_weights

LAYERS = [0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31]
WORKFLOWS = {"multimodal": "MM", "grounding": "G", "text": "Text"}
KEYS = {
    r"model\.condition_layers\.": "inner_adaptor.multimodal.layers.",
    r"model\.condition_layers_grounding\.": "inner_adaptor.grounding.layers.",
    r"model\.embed_tokens_condition\.": "inner_adaptor.multimodal.embeddings.",
    r"model\.embed_tokens_condition_grounding\.": "inner_adaptor.grounding.embeddings.",
    r"model\.norm_condition\.": "inner_adaptor.multimodal.norm.",
    r"model\.norm_condition_grounding\.": "inner_adaptor.grounding.norm.",
    r"lm_head_condtion\.": "inner_adaptor.multimodal.lm_head.",
    r"lm_head_condtion_grounding\.": "inner_adaptor.grounding.lm_head.",
    r"model\.mm_projector\.": "inner_adaptor.multimodal.connector.",
    r"model\.mm_projector_G\.": "inner_adaptor.grounding.connector.",
}


@pytest.fixture(scope="module")
def golden():
    stored = released_weights("iaa")
    tower = "model.vision_tower.vision_tower.vision_model."
    golden = {name: value for name, value in stored.items() if not name.startswith(tower)}
    golden |= {f"expected.{name}": value for name, value in expected("iaa").items()}
    clip = AutoModel.from_config(AutoConfig.from_pretrained(FIXTURES / "iaa-tiny" / "clip-vision-tiny")).eval()
    weights = {name.removeprefix(tower): value for name, value in stored.items() if name.startswith(tower)}
    clip.load_state_dict({name: weights[name.removeprefix("vision_model.")] for name in clip.state_dict()})
    with torch.no_grad():
        states = clip(golden["expected.pixel_values"], output_hidden_states=True).hidden_states
    return golden | {"expected.patch_features": states[-2][:, 1:]}


@pytest.fixture(scope="module")
def model_and_connector(golden):
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    connector = build_connector("mlp2x_gelu", vision_hidden_size=48, hidden_size=32)
    copied = ("embeddings", "norm", "lm_head", "connector")
    add_inner_adaptors(model, layers=LAYERS, modules_to_copy=copied, connector=connector)
    state = {}
    for key, value in golden.items():
        if not key.startswith("expected."):
            for released, ours in KEYS.items():
                key = re.sub(f"^{released}", ours, key)
            state[key] = value.float()
    model.load_state_dict(state)  # strict: the released tensors and the parameters correspond one to one
    return model, connector


def prompt(golden, model, connector, workflow: str) -> torch.Tensor:
    """Embeddings of the prompt, with image features in place of token -200."""
    if workflow == "text":
        with use_workflow(model, "text"):
            return model.get_input_embeddings()(golden["expected.text_input_ids"])
    rows = []
    with use_workflow(model, workflow):
        images = connector(golden["expected.patch_features"])
        for ids, image in zip(golden["expected.input_ids"], images, strict=True):
            place = int((ids == -200).nonzero())
            embeds = model.get_input_embeddings()(ids.clamp(min=0))
            rows.append(torch.cat([embeds[:place], image, embeds[place + 1 :]]))
    torch.testing.assert_close(images, golden[f"expected.image_features.{WORKFLOWS[workflow]}"], atol=2e-4, rtol=1e-3)
    return torch.stack(rows)


@pytest.mark.parametrize("workflow", WORKFLOWS)
@torch.no_grad()
def test_logits_are_the_released(golden, model_and_connector, workflow):
    model, connector = model_and_connector
    inputs_embeds = prompt(golden, model, connector, workflow)
    with use_workflow(model, workflow):
        logits = model(inputs_embeds=inputs_embeds).logits
    torch.testing.assert_close(logits, golden[f"expected.{WORKFLOWS[workflow]}.logits"], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("workflow", WORKFLOWS)
@torch.no_grad()
def test_greedy_tokens_are_the_released(golden, model_and_connector, workflow, use_cache):
    model, connector = model_and_connector
    inputs_embeds = prompt(golden, model, connector, workflow)
    if use_cache:
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        with use_workflow(model, workflow):
            tokens = model.generate(inputs_embeds=inputs_embeds, **options)
    else:
        tokens = torch.empty(len(inputs_embeds), 0, dtype=torch.long)
        with use_workflow(model, workflow):
            for _ in range(12):
                new = model.get_input_embeddings()(tokens)
                logits = model(inputs_embeds=torch.cat([inputs_embeds, new], 1), use_cache=False).logits
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, golden[f"expected.{WORKFLOWS[workflow]}.greedy"])
