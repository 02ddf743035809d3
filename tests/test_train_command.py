"""``idavlm train``: what it builds, trains, logs and saves, for every kind of model."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from idavlm import (
    IDAVLMForConditionalGeneration,
    IDAVLMProcessor,
    IdentityProcessor,
    RecordDataset,
    load_id_former,
)
from tests.training_runs import overrides, train, write_llava, write_parts, write_records


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def config(tmp_path, data):
    """A configuration file that the options of each test complete."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"train_data": str(data / "train.jsonl"), "output_dir": str(tmp_path / "out")}))
    return path


def history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def batch_of(dataset, processor) -> dict:
    """The first sample as a batch for the model."""
    batch = processor.collate([dataset[0]])
    return {name: value for name, value in batch.items() if name not in ("source", "sample_source", "sample_ids")}


ID_FORMER = {"num_queries": 4, "num_heads": 2, "null_token": True}


def test_parts_with_two_sources(config, data, parts, tmp_path):
    """The output is a model with its processor. The log has the loss of each source and the throughput."""
    general = {"general_data": data / "general.jsonl", "mixing_ratio": 0.5}
    chat = {"chat_template": "QWEN_CHATML", "processor_options": {"box_format": "unit", "max_length": 600}}
    assert train(config, **parts, **general, **chat, model_options=ID_FORMER, freeze=["vision_tower"]) == 0
    out = tmp_path / "out"
    model = IDAVLMForConditionalGeneration.from_pretrained(out)
    processor = IDAVLMProcessor.from_pretrained(out)
    assert model.id_former.resampler.num_queries == processor.image_seq_length == 4
    assert (processor.box_format, processor.max_length) == ("unit", 600)
    dataset = RecordDataset(data / "train.jsonl", encode=processor.encode)
    assert model(
        **processor.collate([{k: v for k, v in dataset[0].items() if k not in ("id", "source")}])
    ).loss.isfinite()
    logged = history(out)
    assert any("loss_identity" in entry for entry in logged)
    assert any("loss_general" in entry for entry in logged)
    for name in ("samples_per_second", "tokens_per_second", "images_per_second"):
        assert all(entry[name] > 0 for entry in logged if "loss" in entry), name
    tower = {name: tensor for name, tensor in load_file(out / "model.safetensors").items() if "vision_tower" in name}
    before = load_file(parts["vision_tower"] / "model.safetensors")
    assert tower
    assert all(torch.equal(tensor, before[name.removeprefix("vision_tower.")]) for name, tensor in tower.items())


def test_a_run_that_ended_is_resumed(config, parts, tmp_path):
    """``auto`` starts without a checkpoint, and continues from the newest one: the weights are those of one run."""
    options = {**parts, "model_options": ID_FORMER, "chat_template": "QWEN_CHATML", "resume_from_checkpoint": "auto"}
    options |= {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    for steps in (1, 3):
        assert train(config, **options, max_steps=steps) == 0
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    assert train(config, **options, max_steps=3, output_dir=tmp_path / "whole") == 0
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_resampler_becomes_that_of_an_id_former(config, parts, tmp_path):
    options = {"chat_template": "QWEN_CHATML", "learning_rate": 0.0}
    first, second = tmp_path / "first", tmp_path / "second"
    resampler = {"connector": "resampler", "model_options": {"num_queries": 4, "num_heads": 2}}
    assert train(config, **parts, **options, **resampler, output_dir=first) == 0
    with_id_former = {"connector": "id_former", "model_options": {"null_token": True, "identity_map_loss_weight": 0.5}}
    assert train(config, model=first, **with_id_former, learning_rate=0.0, output_dir=second) == 0
    model = IDAVLMForConditionalGeneration.from_pretrained(second)
    assert model.config.identity_map_loss_weight == 0.5
    before = load_file(first / "model.safetensors")
    resampler = model.id_former.resampler.state_dict()
    assert resampler
    assert all(torch.equal(tensor, before[f"connector.{name}"]) for name, tensor in resampler.items())


def test_inner_adaptors_are_added_to_a_checkpoint(config, parts, tmp_path):
    """Each workflow copies the trained connector; the others and the base stay as they are."""
    first, second = tmp_path / "first", tmp_path / "second"
    aligned = {"connector": "mlp2x_gelu", "model_options": {"image_seq_length": 4}, "chat_template": "QWEN_CHATML"}
    assert train(config, **parts, **aligned, freeze=["vision_tower", "language_model"], output_dir=first) == 0
    adaptors = {"layers": [0], "workflows": ["multimodal", "grounding"], "modules_to_copy": ["connector", "norm"]}
    options = {"inner_adaptors": adaptors, "workflow": "multimodal", "freeze": ["vision_tower", "connector"]}
    assert train(config, model=first, **options, learning_rate=1e-2, output_dir=second) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the base stays"
    copied = "language_model.inner_adaptor.{}.connector.0.weight"
    assert torch.equal(after[copied.format("grounding")], before["connector.0.weight"])
    assert not torch.equal(after[copied.format("multimodal")], before["connector.0.weight"])


def test_a_model_of_transformers_as_it_is(config, llava, tmp_path):
    """References are images of the prompt. The output is an ordinary model of transformers with its processor."""
    assert train(config, model=llava, learning_rate=1e-2, freeze=["vision_tower", "language_model"]) == 0
    out = tmp_path / "out"
    after = load_file(out / "model.safetensors")
    moved = {
        name for name, tensor in load_file(llava / "model.safetensors").items() if not torch.equal(after[name], tensor)
    }
    assert moved
    assert all("multi_modal_projector" in name for name in moved)
    assert type(AutoModelForImageTextToText.from_pretrained(out)).__name__ == "LlavaForConditionalGeneration"
    processor = IdentityProcessor.from_pretrained(out)
    assert processor.identity_inputs is False


def test_an_attached_id_former(config, llava, tmp_path, data):
    """The output folder, and every checkpoint, loads by ``from_pretrained`` and ``load_id_former``."""
    attached = {"attach_id_former": {"num_heads": 2, "hidden_size": 16, "dtype": "float32"}, "learning_rate": 1e-2}
    assert train(config, model=llava, **attached, save_strategy="steps", save_steps=2) == 0
    out = tmp_path / "out"
    logits = []
    for folder in (out, out / "checkpoint-2"):
        model = load_id_former(AutoModelForImageTextToText.from_pretrained(folder), folder)
        processor = IdentityProcessor.from_pretrained(folder)
        dataset = RecordDataset(data / "train.jsonl", encode=processor.encode)
        with torch.no_grad():
            logits.append(model(**batch_of(dataset, processor)).logits)
    assert torch.equal(*logits)
    assert any(tensor.any() for name, tensor in model.id_former.state_dict().items() if "out_proj" in name)
    again = tmp_path / "again"
    assert train(config, model=llava, id_former=out, learning_rate=0.0, output_dir=again) == 0
    first, second = (load_file(folder / "id_former.safetensors") for folder in (out, again))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connector": "id_former"}, "connector='id_former' does not apply to model=.*a model of transformers"),
        ({"inner_adaptors": {"every": 1}}, "inner_adaptors=.* does not apply .*convert the model with idavlm convert"),
        ({"processor_options": {"box": 1}}, "processor_options='box' is not known"),
    ],
)
def test_options_that_do_not_fit_the_model(config, llava, capsys, options, message):
    assert train(config, model=llava, **options) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_dry_run_reads_no_weights(config, parts, data, tmp_path, capsys):
    """It prints configuration, parameters, a sample with its labels and memory, and writes nothing."""
    for folder in parts.values():
        (folder / "model.safetensors").rename(folder / "hidden")
    options = {"model_options": ID_FORMER, "chat_template": "QWEN_CHATML", "freeze": ["vision_tower"]}
    options |= {"general_data": data / "general.jsonl", "module_learning_rates": {"id_former": 1e-3}}
    try:
        assert train(config, "--dry-run", **parts, **options) == 0
    finally:
        for folder in parts.values():
            (folder / "hidden").rename(folder / "model.safetensors")
    out = capsys.readouterr().out
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
        for line in out.splitlines()
        if line.startswith("|")
    }
    assert rows["vision_tower"][1:] == ["0", "frozen"]
    assert rows["id_former"][0] == rows["id_former"][1]
    assert rows["id_former"][2] == "0.001"
    assert rows["language_model"][2] == "5e-05"
    assert "<image>*4" in out
    assert "  label | 'Kate is reading.<|im_end|>" in out
    assert "        | '<|im_start|>system" in out
    assert float(rows["total"][0]) >= 0
    assert "## train: 4 records" in out
    assert not (tmp_path / "out").exists()


def parameter_rows(out: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


def test_a_dry_run_of_adapters_and_of_an_attached_id_former(config, llava, capsys):
    """LoRA with r=2 adds 2 x (32 + 32) parameters to each of the q_proj, in three layers of the tower."""
    lora = {"vision_tower": {"r": 2, "target_modules": ["q_proj"]}}
    assert train(config, "--dry-run", model=llava, lora=lora, module_learning_rates={"connector": 1e-3}) == 0
    rows = parameter_rows(capsys.readouterr().out)
    assert rows["vision_tower"][1:] == [str(3 * 2 * 64), "5e-05"]
    assert rows["language_model"][1:] == ["0", "frozen"]
    assert rows["connector"][2] == "0.001"
    assert train(config, "--dry-run", model=llava, attach_id_former={"num_heads": 2, "hidden_size": 16}) == 0
    rows = parameter_rows(capsys.readouterr().out)
    assert rows["id_former"][0] == rows["id_former"][1]
    assert rows["connector"][1:] == ["0", "frozen"]


def test_answers_are_evaluated_and_logged_with_images(config, parts, data, tmp_path):
    """TensorBoard has scores and images of the answers; the best checkpoint is chosen by a score."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"model_options": ID_FORMER, "chat_template": "QWEN_CHATML", "task_data": data / "test.jsonl"}
    options |= {"eval_data": data / "train.jsonl", "max_new_tokens": 3, "num_logged_samples": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"metric_for_best_model": "eval_location", "load_best_model_at_end": True, "report_to": "tensorboard"}
    assert train(config, **parts, **options) == 0
    out = tmp_path / "out"
    assert [entry["eval_location"] for entry in history(out) if "eval_location" in entry]
    assert [entry["eval_loss_identity"] for entry in history(out) if "eval_loss_identity" in entry]
    assert json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"]
    (folder,) = (out / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"] == ["samples/0_location"]
    images = events.Images("samples/0_location")
    assert [image.step for image in images] == [1, 2]
    assert images[0].width > 100
    assert {"eval/location", "train/tokens_per_second", "train/loss_identity"} <= set(events.Tags()["scalars"])


def test_the_configuration_is_saved(config, parts, tmp_path):
    """The resolved configuration is next to the model, and repeats the run."""
    options = {**parts, "model_options": ID_FORMER, "chat_template": "QWEN_CHATML"}
    assert train(config, **options) == 0
    again = tmp_path / "again"
    from idavlm.cli.main import main

    assert main(["train", str(tmp_path / "out" / "train_config.yaml"), *overrides(output_dir=again)]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", again))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
