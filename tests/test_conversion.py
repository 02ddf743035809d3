"""Tiny checkpoints in the released formats: after conversion and loading, outputs equal those of the released code."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from idavlm import IDAVLMForConditionalGeneration
from idavlm.cli.main import main
from idavlm.conversion import convert
from idavlm.models import QwenVisionConfig, QwenVisionModel
from tests.released import expected, released

CLOSE = {"atol": 2e-4, "rtol": 1e-3}
SYSTEMS = ("llava-1.5", "yi-vl", "iaa", "ida-vlm")
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=SYSTEMS)
def converted(request, tmp_path_factory):
    """System, source and converted folder."""
    folder = tmp_path_factory.mktemp(request.param)
    source = released(request.param, folder)
    assert main(["convert", str(source), str(folder / "out"), "--quiet"]) == 0
    return request.param, source, folder / "out"


@pytest.fixture(scope="module")
def model(converted):
    return IDAVLMForConditionalGeneration.from_pretrained(converted[2], dtype=torch.float32).eval()


@pytest.fixture
def golden(converted):
    return expected(converted[0])


def with_images(input_ids: torch.Tensor, model) -> torch.Tensor:
    """Replace the release's -200 by image placeholders."""
    config = model.config
    image = torch.full((config.image_seq_length,), config.image_token_id)
    rows = [torch.cat([image if token == -200 else token[None] for token in row]) for row in input_ids]
    return torch.stack(rows)


@pytest.mark.parametrize("converted", ["llava-1.5", "yi-vl"], indirect=True)
@torch.no_grad()
def test_llava_and_yi_vl(model, golden):
    images = {"pixel_values": golden["pixel_values"], "sample_index": torch.arange(2)}
    tokens, _, _ = model.encode_images(**images)
    torch.testing.assert_close(tokens, golden["image_features"], **CLOSE)
    input_ids = with_images(golden["input_ids"], model)
    logits = model(input_ids=input_ids, **images).logits
    torch.testing.assert_close(logits[..., :320], golden["logits"], **CLOSE)
    answer = model.generate(input_ids=input_ids, stop_strings=None, **images, **GREEDY)
    assert torch.equal(answer[:, input_ids.shape[1] :], golden["greedy"])


@pytest.mark.parametrize("converted", ["iaa"], indirect=True)
@pytest.mark.parametrize(("workflow", "mark"), [("multimodal", "MM"), ("grounding", "G"), ("text", "Text")])
@torch.no_grad()
def test_iaa(model, golden, workflow, mark):
    inputs = {"input_ids": golden["text_input_ids"]}
    if workflow != "text":
        images = {"pixel_values": golden["pixel_values"], "sample_index": torch.arange(2)}
        inputs = {"input_ids": with_images(golden["input_ids"], model), **images}
        with model.workflow(workflow):
            torch.testing.assert_close(model.encode_images(**images)[0], golden[f"image_features.{mark}"], **CLOSE)
    logits = model(**inputs, workflow=workflow).logits
    torch.testing.assert_close(logits[..., :320], golden[f"{mark}.logits"], **CLOSE)
    answer = model.generate(**inputs, workflow=workflow, **GREEDY)
    assert torch.equal(answer[:, inputs["input_ids"].shape[1] :], golden[f"{mark}.greedy"])


@pytest.mark.parametrize("converted", ["ida-vlm"], indirect=True)
@pytest.mark.parametrize("case", ["identity", "general", "mixed"])
@torch.no_grad()
def test_ida_vlm(model, golden, case):
    golden = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
    roles = {name: golden[name] for name in ("image_roles", "sample_index")}
    pixels = golden["pixel_values"].float()
    patches, grid_size = model.image_features(pixels)
    torch.testing.assert_close(patches, golden["patch_features"], **CLOSE)
    project, before = model.id_former.resampler.project_tokens, []
    model.id_former.resampler.project_tokens = lambda tokens: before.append(tokens) or project(tokens)
    try:
        tokens = model.id_former(patches, **roles, grid_size=grid_size)
    finally:
        del model.id_former.resampler.project_tokens
    without_identities = golden["image_roles"] != 1
    output = golden["id_former_output"]
    packed = torch.cat([output[without_identities], output[~without_identities]])
    torch.testing.assert_close(before[0], packed, **CLOSE)
    torch.testing.assert_close(tokens, golden["vision_output"], **CLOSE)
    text = {name: golden[name] for name in ("input_ids", "attention_mask")}
    logits = model(pixel_values=pixels, **text, **roles).logits
    kept = golden["attention_mask"] == 1
    torch.testing.assert_close(logits[kept], golden["logits"][kept], **CLOSE)


def test_a_converted_model_saves_and_loads_as_any_other(converted, model, tmp_path):
    model.save_pretrained(tmp_path)
    again = IDAVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    state = model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


@torch.no_grad()
def test_qwen_vl_without_id_former(tmp_path):
    """The connector is a resampler; outputs equal those of samples without references."""
    source = released("ida-vlm", tmp_path)
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    kept = {name: tensor for name, tensor in weights.items() if ".attn1." not in name}
    assert len(kept) < len(weights)
    torch.save(kept, source / "pytorch_model.bin")
    model = IDAVLMForConditionalGeneration.from_pretrained(
        convert(source, tmp_path / "out", progress=False), dtype=torch.float32
    ).eval()
    assert (model.config.connector, model.id_former) == ("resampler", None)
    golden = {key.removeprefix("general."): value for key, value in expected("ida-vlm").items() if "general." in key}
    inputs = {name: golden[name] for name in ("input_ids", "attention_mask", "sample_index")}
    out = model(pixel_values=golden["pixel_values"].float(), **inputs)
    torch.testing.assert_close(out.image_hidden_states, golden["vision_output"], **CLOSE)
    mask = golden["attention_mask"] == 1
    torch.testing.assert_close(out.logits[mask], golden["logits"][mask], **CLOSE)


def test_a_tower_in_the_folder_of_a_complete_clip(tmp_path):
    """As in ``openai/clip-vit-large-patch14-336``, which has a text tower too."""
    source = released("llava-1.5", tmp_path)
    alone = source / "clip-vision-tiny"
    convert(source, tmp_path / "alone", progress=False)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text, vision_config=CLIPVisionConfig.from_pretrained(alone).to_dict())
    whole = CLIPModel(config)
    weights = {
        f"vision_model.{name.removeprefix('vision_model.')}": v
        for name, v in load_file(alone / "model.safetensors").items()
    }
    assert not whole.load_state_dict(weights, strict=False).unexpected_keys
    whole.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text((alone / "preprocessor_config.json").read_text())
    convert(source, tmp_path / "whole", vision_tower=tmp_path / "clip", progress=False)
    states = [
        IDAVLMForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("alone", "whole")
    ]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@torch.no_grad()
def test_qwen_vision_tower():
    """Positions are resized for other grids; eager attention and hidden states are supported; odd sizes are refused."""
    config = QwenVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_positions=9, patch_size=4
    )
    tower = QwenVisionModel(config).eval()
    pixels = torch.randn(2, 3, 8, 20)
    out = tower(pixels, output_hidden_states=True)
    assert out.last_hidden_state.shape == (2, 10, 16)
    assert len(out.hidden_states) == 3
    tower.set_attn_implementation("eager")
    torch.testing.assert_close(tower(pixels).last_hidden_state, out.last_hidden_state)
    assert torch.equal(tower(pixels, return_dict=False)[0], tower(pixels).last_hidden_state)
    gradients = []
    weights = dict(tower.train().named_parameters())
    for checkpointing in (False, True):
        if checkpointing:
            tower.gradient_checkpointing_enable()
        with torch.enable_grad():
            gradients.append(torch.autograd.grad(tower(pixels).last_hidden_state.square().sum(), weights.values()))
    torch.testing.assert_close(*gradients)
    assert weights["position_embedding"].std() > 0.01, "drawn, not left empty"
    with pytest.raises(
        ValueError, match=r"shape \(2, 3, 8, 20\); expected \[I, 3, H, W\] with multiples of patch_size=3"
    ):
        QwenVisionModel(QwenVisionConfig(**{**config.to_dict(), "patch_size": 3}))(pixels)
    with pytest.raises(ValueError, match="num_positions=10 is not a square"):
        QwenVisionConfig(num_positions=10)
