"""Checkpoints of IDTrainer: all weights come back, only complete checkpoints of the same run are resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import Subset
from transformers import PreTrainedModel

from idavlm import add_inner_adaptors
from idavlm.data import RecordDataset
from idavlm.experimental.small_models import small_language_model, small_vision_tower
from idavlm.models import IDAVLMForConditionalGeneration
from idavlm.training import IDTrainer, IDTrainingArguments, last_complete_checkpoint
from idavlm.training.checkpoints import describe_dataset
from tests.interrupted_run import write_data
from tests.small_models import small_model, small_processor


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def arguments(folder, **options) -> IDTrainingArguments:
    defaults = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 4, "save_steps": 2}
    return IDTrainingArguments(str(folder), **(defaults | {"per_device_train_batch_size": 2} | options))


def trainer_of(data, folder, model=None, *, train="train", trainer=None, **options) -> IDTrainer:
    processor = small_processor()
    model = small_model(processor) if model is None else model
    records = RecordDataset(data / f"{train}.jsonl", data / "images", encode=processor.encode)
    trainer = {"train_dataset": records, "processing_class": processor, **(trainer or {})}
    return IDTrainer(model, arguments(folder, **options), **trainer)


# --- Weights ---------------------------------------------------------------------------------------------------------

SIZE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 8}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16]}
TOWERS = {
    "ViT": SIZE | IMAGE,
    "DeiT": SIZE | IMAGE,
    "Dinov2": SIZE | IMAGE,
    "Dinov2WithRegisters": SIZE | IMAGE,
    "DINOv3ViT": SIZE | IMAGE,
    "DINOv3ConvNext": {"depths": [1] * 4, "hidden_sizes": [8, 12, 16, 24]},
    "Beit": SIZE | IMAGE,
    "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 32},
    "Swinv2": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 32},
    "CLIPVision": SIZE | IMAGE,
    "SiglipVision": SIZE | IMAGE,
    "Siglip2Vision": SIZE | {"patch_size": 8, "num_patches": 16},
    "ResNet": STAGES | {"embedding_size": 8, "layer_type": "basic"},
    "ConvNext": {"depths": [1] * 4, "hidden_sizes": [8, 12, 16, 24]},
    "ConvNextV2": {"depths": [1] * 4, "hidden_sizes": [8, 12, 16, 24]},
    "EfficientNet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "image_size": 32},
}
TEXT = {**SIZE, "vocab_size": 320, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 320, "n_embd": 24, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
LANGUAGE_MODELS = {
    "Llama": TEXT | {"tie_word_embeddings": True},
    "Mistral": TEXT,
    "Mixtral": TEXT | {"num_local_experts": 3},
    "Qwen2": TEXT,
    "Qwen2Moe": TEXT | {"num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "Qwen3": TEXT | {"head_dim": 12},
    "Qwen3Moe": TEXT | {"head_dim": 12, "num_experts": 3, "moe_intermediate_size": 8},
    "Gemma2": TEXT | {"head_dim": 12},
    "Phi3": TEXT,
    "GPTNeoX": TEXT,
    "OPT": TEXT | {"ffn_dim": 32, "word_embed_proj_dim": 24},
    "GPT2": GPT2,
}


def tower(name: str) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**TOWERS[name])
    return getattr(transformers, f"{name}Model")(config)


def language_model(name: str) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**LANGUAGE_MODELS[name])
    head = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, head)(config)


def random_model(seed: int, vision: str | None = None, text: str | None = None, **options):
    torch.manual_seed(seed)
    vision = small_vision_tower(hidden_size=32) if vision is None else tower(vision)
    text = small_language_model(small_processor().tokenizer, hidden_size=32) if text is None else language_model(text)
    options = {"num_queries": 4, "num_heads": 2, **options}
    model = IDAVLMForConditionalGeneration.from_parts(vision, text, image_token_id=3, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # parameters that start at zero or one must differ, too
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    return model


def check_that_all_tensors_come_back(first, second, folder):
    first.save_pretrained(folder, max_shard_size="40KB" if "shards" in str(folder) else "50GB")
    identities = {name: id(parameter) for name, parameter in second.named_parameters()}
    before, expected = second.state_dict(), first.state_dict()
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, before[name])}
    assert changed >= {name for name, parameter in second.named_parameters() if parameter.numel()}, (
        "the two models differ everywhere"
    )
    IDTrainer(second, arguments(folder / "run"))._load_from_checkpoint(str(folder))
    loaded = second.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert {name: id(p) for name, p in second.named_parameters()} == identities, "an optimizer may hold them"


@pytest.mark.parametrize("name", TOWERS)
def test_the_weights_of_every_tower_come_back(tmp_path, name):
    check_that_all_tensors_come_back(random_model(0, vision=name), random_model(1, vision=name), tmp_path)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_weights_of_every_language_model_come_back(tmp_path, name):
    check_that_all_tensors_come_back(random_model(0, text=name), random_model(1, text=name), tmp_path)


def test_the_weights_of_other_models_come_back(tmp_path):
    """In shards; with inner adaptors and index embedding; loaded with ``from_pretrained``; a bare language model."""
    options = {"vision": "ViT", "text": "Mixtral"}
    check_that_all_tensors_come_back(random_model(0, **options), random_model(1, **options), tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    options = {"vision": "Swin", "max_images": 3, "inner_adaptors": {"layers": [1]}}
    check_that_all_tensors_come_back(random_model(0, **options), random_model(1, **options), tmp_path / "adaptors")
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "shards")
    check_that_all_tensors_come_back(loaded, random_model(1, "ViT", "Mixtral"), tmp_path / "again")
    again = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "again")
    check_that_all_tensors_come_back(random_model(2, "ViT", "Mixtral"), again, tmp_path / "third")
    bare = [add_inner_adaptors(language_model("Mixtral"), every=1) for _ in range(2)]
    for parameter in bare[1].parameters():
        parameter.data.normal_()
    check_that_all_tensors_come_back(*bare, tmp_path / "bare")


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("id_former.latents", saved.popitem()), "Tensors: 1 missing: "),
        (lambda saved: saved.update(other=torch.ones(2)), "Tensors: 1 unknown to the model: other"),
        (lambda saved: [saved.pop(name) for name in list(saved) if "vision_tower" in name], r"\d\d missing: .* more\."),
        (
            lambda saved: saved.update({"language_model.model.norm.weight": torch.ones(5)}),
            r"1 different: language_model.model.norm.weight has shape \[5\] instead of \[32\]",
        ),
    ],
)
def test_missing_and_unexpected_tensors_are_an_error(data, tmp_path, change, message, best):
    trainer = trainer_of(data, tmp_path, max_steps=2)
    trainer.train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    saved = load_file(file)
    change(saved)
    save_file(saved, file, metadata={"format": "pt"})
    trainer.state.best_model_checkpoint = str(file.parent)
    with pytest.raises(ValueError, match=rf"checkpoint-2' do not fit IDAVLMForConditionalGeneration\. .*{message}"):
        trainer._load_best_model() if best else trainer_of(data, tmp_path).train(resume_from_checkpoint=True)


def test_the_best_model_is_loaded_with_its_tower(data, tmp_path):
    """The second evaluation is worse than the first."""
    scores = iter([1.0, 0.0])
    model = random_model(0, vision="ViT", null_token=True)
    processor = small_processor()
    processor.image_processor.size = {"height": 32, "width": 32}
    model.config.image_token_id = processor.image_token_id
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    trainer = IDTrainer(
        model,
        arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
        ),
        train_dataset=records,
        processing_class=processor,
        task_evaluation=lambda _: {"score": next(scores)},
    )
    trainer.train()
    best = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    last = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    tower_weight = next(
        name for name in best if (name.startswith("vision_tower.") and "query" in name) or "q_proj" in name
    )
    assert not torch.equal(best[tower_weight], last[tower_weight])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, best[name]), name


def lora_model(modules_to_save):
    processor = small_processor()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=modules_to_save)
    return get_peft_model(small_model(processor), config)


def test_adapters_come_back_and_missing_ones_are_an_error(data, tmp_path):
    whole = trainer_of(data, tmp_path / "whole", lora_model(["id_former"]))
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = trainer_of(data, tmp_path / "again", lora_model(["id_former"]))
    resumed.train(resume_from_checkpoint=True)
    for (name, parameter), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name

    file = tmp_path / "again" / "checkpoint-4" / "adapter_model.safetensors"
    saved = load_file(file)
    for part in ("id_former", "lora_A"):
        save_file({name: tensor for name, tensor in saved.items() if part not in name}, file)
        trainer = trainer_of(data, tmp_path / "again", lora_model(["id_former"]))
        message = rf"do not fit the adapter 'default' of the model\. Tensors: \d+ missing: .*{part}"
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=True)


def test_trained_parameters_that_an_adapter_does_not_save_are_an_error(data, tmp_path):
    model = lora_model(None)
    for parameter in model.base_model.model.id_former.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"\d+ trained parameters are not part of the adapter.*id_former.*modules_to_save"
    ):
        trainer_of(data, tmp_path, model).train()


# --- Complete checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Folder of a finished run of 4 steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    trainer_of(data, folder).train()
    return folder


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("optimizer.pt", "lacks the optimizer state"),
        ("scheduler.pt", "lacks the state of the learning rate scheduler"),
        ("rng_state.pth", "lacks the states of the random generators"),
        ("model.safetensors", "lacks the weights"),
        ("trainer_state.json", "was not written completely"),
        ("run_state.json", "has no readable run_state.json"),
    ],
)
def test_a_checkpoint_without_one_of_its_files_is_not_complete(data, finished, tmp_path, file, message):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4" / file).unlink()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-2")
    with pytest.raises(ValueError, match=f"checkpoint-4' {message}"):
        trainer_of(data, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=f"holds no complete checkpoint to resume from. checkpoint-4 {message}"):
        trainer_of(data, tmp_path).train(resume_from_checkpoint=True)


def test_checkpoints_of_the_model_alone_are_not_resumed(data, tmp_path):
    trainer_of(data, tmp_path, save_only_model=True, max_steps=2).train()
    for resume in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(ValueError, match=r"checkpoint-2.? holds the model only, .* save_only_model=True"):
            trainer_of(data, tmp_path).train(resume_from_checkpoint=resume)
    with pytest.raises(ValueError, match="checkpoint-9' is not a folder"):
        trainer_of(data, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_a_checkpoint_that_is_written_again_is_incomplete_until_the_end(data, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    trainer = trainer_of(data, tmp_path)
    seen = []
    trainer._save_optimizer_and_scheduler = lambda _: seen.append(last_complete_checkpoint(tmp_path)) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [Path(path).name for path in seen] == ["checkpoint-2"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 0.8}])
def test_resuming_a_finished_run_trains_nothing(data, finished, tmp_path, length):
    """Also if the run is now shorter than it was. An epoch has 5 steps."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    for _ in range(2):
        trainer = trainer_of(data, tmp_path, **length)
        result = trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4
        assert result.global_step == 4
        assert "train_loss" not in trainer.state.log_history[-1]
        assert contents(tmp_path) == before
        expected = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4").state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.model.state_dict().items())
    longer = trainer_of(data, tmp_path, max_steps=5)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 5


# --- The same run ----------------------------------------------------------------------------------------------------


def general(data):
    processor = small_processor()
    return RecordDataset(data / "general.jsonl", encode=processor.encode)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "other"}, "train_dataset was 'RecordDataset of 10 samples, file hash .*' and is 'Rec.* file hash"),
        ({"train": "fewer"}, "train_dataset was 'RecordDataset of 10 samples.*' and is 'RecordDataset of 9 samples"),
        ({"trainer": {"train_dataset": [1]}}, "train_dataset was 'Rec.* and is 'list of 1 samples'"),
        ({"trainer": {"general_dataset": None}, "mixing_ratio": 0.1}, "general_dataset was 'RecordDataset .* is None"),
        ({"mixing_ratio": 0.2}, r"mixing_ratio was 0\.4 and is 0\.2"),
        ({"mixing_mode": "joint"}, "mixing_mode was 'extra' and is 'joint'"),
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"data_seed": 7}, "data_seed was None and is 7"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size was 2 and is 1"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy was 'random' and is 'sequential'"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last was False and is True"),
        ({"accelerator_config": {"split_batches": True}}, r"accelerator_config\.split_batches was False and is True"),
    ],
)
def test_a_run_with_other_data_is_not_resumed(data, tmp_path, change, message):
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "other.jsonl").write_text("".join([*lines[:-1], lines[-1].replace("reading", "waving!")]))
    (data / "fewer.jsonl").write_text("".join(lines[:-1]))
    options = {"max_steps": 2, "mixing_ratio": 0.4}
    sources = {"general_dataset": general(data)}
    trainer_of(data, tmp_path, trainer=sources, **options).train()
    change = {"max_steps": 4} | change
    trainer = sources | change.pop("trainer", {})
    with pytest.raises(ValueError, match=rf"belongs to a run with other data: .*{message}.*ignore_data_skip=True"):
        trainer_of(data, tmp_path, trainer=trainer, **(options | change)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, r"the learning rate of parameter group 0 was 5e-05 and is 0\.001"),
        ({"weight_decay": 0.1}, r"the weight decay of parameter group 0 was 0\.0 and is 0\.1"),
    ],
)
def test_options_that_the_optimizer_state_overwrites_must_not_change(data, finished, tmp_path, change, message):
    trainer = trainer_of(data, tmp_path, max_steps=6, **change)
    with pytest.raises(ValueError, match=f"belongs to a run with another optimizer: {message}"):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-4"))


def test_other_data_are_accepted_on_request_and_a_longer_run_is_the_same_run(data, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for options in ({"seed": 9, "ignore_data_skip": True, "max_steps": 5}, {"max_steps": 6, "logging_steps": 1}):
        trainer = trainer_of(data, tmp_path, save_strategy="no", **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert trainer.state.global_step == options["max_steps"]


def test_descriptions_of_data_sets_depend_on_their_content(data, tmp_path):
    records = RecordDataset(data / "train.jsonl")
    shutil.copy(data / "train.jsonl", tmp_path / "copy.jsonl")
    copy = RecordDataset(tmp_path / "copy.jsonl", data / "images")
    assert describe_dataset(records) == describe_dataset(copy)
    parts = [Subset(records, indices) for indices in ([0, 1], [1, 0], [0, 2])]
    assert len({describe_dataset(part) for part in parts}) == 3
    assert describe_dataset(parts[0] + parts[1]) != describe_dataset(parts[1] + parts[0])
    assert describe_dataset(None) is None
    json.dumps(describe_dataset(parts[0]))
