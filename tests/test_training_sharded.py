"""Sharded parameters: units of FSDP, files of sharded parts, and set-ups that are refused before training."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule

from idavlm import attach_id_former, load_adaptors, load_id_former, save_adaptors, save_id_former
from idavlm.data import RecordDataset
from idavlm.experimental.muon import muon_adamw
from idavlm.training import IDTrainer, IDTrainingArguments, fsdp_wrap_classes, fully_shard_model
from idavlm.training.distributed import check_engine, check_optimizer, set_wrap_classes
from tests.interrupted_run import write_data
from tests.small_models import small_model
from tests.vlm_families import tiny_model

LLAMA = "LlamaDecoderLayer"


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tower": "vit"}, ["LlamaDecoderLayer", "ViTLayer"]),
        ({"tower": "siglip", "connector": "resampler"}, ["LlamaDecoderLayer", "SiglipEncoderLayer"]),
        ({"connector": "linear", "image_seq_length": 64}, ["LlamaDecoderLayer", "ResNetStage"]),
        (
            {"connector": "resampler", "inner_adaptors": {"every": 1, "composition": "parallel"}},
            ["GatedLayer", "LlamaDecoderLayer", "ResNetStage"],
        ),
    ],
)
def test_units_are_the_layers_of_the_model_that_is_there(processor, options, expected):
    assert fsdp_wrap_classes(small_model(processor, **options)) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llava", ["CLIPEncoderLayer", "LlamaDecoderLayer"]),
        ("qwen3_vl", ["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock", "Qwen3VLVisionPatchMerger"]),
    ],
)
def test_an_attached_id_former_is_no_unit(family, expected):
    model = attach_id_former(tiny_model(family), num_heads=4, hidden_size=32)
    assert fsdp_wrap_classes(model) == expected


def test_a_model_without_layers_has_no_units():
    with pytest.raises(ValueError, match=r"Linear has no list of layers.*transformer_layer_cls_to_wrap"):
        fsdp_wrap_classes(nn.Linear(2, 2))


def test_accelerate_gets_the_units_unless_they_are_set(processor):
    model = small_model(processor, tower="vit", connector="linear", image_seq_length=16)
    for given, expected in ((None, ["LlamaDecoderLayer", "ViTLayer"]), (["ViTLayer"], ["ViTLayer"])):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=given
        )
        set_wrap_classes(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)
        assert plugin.transformer_cls_names_to_wrap == expected
        plugin.set_auto_wrap_policy(model)  # would stop at a class that the model does not have


@pytest.mark.parametrize("name", ["deepspeed", "fsdp"])
def test_ddp_in_place_of_what_was_asked_for_is_refused(name):
    args = SimpleNamespace(**{"deepspeed": None, "fsdp": None, "use_cpu": True, name: "zero3.json"})
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(ValueError, match=rf"{name}=zero3.json has no effect.*MULTI_CPU in its place \(use_cpu=True\)"):
        check_engine(args, accelerator)
    accelerator.distributed_type = DistributedType(name.upper())
    check_engine(args, accelerator)


def test_ddp_in_place_of_what_accelerate_launch_asked_for_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    args = SimpleNamespace(deepspeed=None, fsdp=None, use_cpu=True)
    with pytest.raises(ValueError, match=r"deepspeed=true \(accelerate launch\) has no effect"):
        check_engine(args, SimpleNamespace(distributed_type=DistributedType.MULTI_CPU))


def test_muon_is_refused_where_matrices_are_joined_to_a_vector(processor):
    optimizer = muon_adamw(small_model(processor))
    check_optimizer(optimizer, SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))
    with pytest.raises(ValueError, match=r"optimizers=MuonAdamW updates whole matrices, but DeepSpeed.*DDP or FSDP"):
        check_optimizer(optimizer, SimpleNamespace(distributed_type=DistributedType.DEEPSPEED))


def test_muon_updates_sharded_matrices_as_whole_ones(processor, one_process):
    models = [small_model(processor, tower="vit") for _ in range(2)]
    fully_shard_model(models[1], mesh=one_process)
    for model in models:
        optimizer = muon_adamw(model, modules=["language_model"], learning_rate=1e-2)
        for _ in range(2):
            inputs = torch.arange(100, 112).view(2, 6)
            model(input_ids=inputs, labels=inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    whole, sharded = (model.state_dict() for model in models)
    for name, tensor in whole.items():
        torch.testing.assert_close(getattr(sharded[name], "full_tensor", lambda t=sharded[name]: t)(), tensor)


def test_adaptors_of_a_sharded_model_are_gathered_and_saved(processor, one_process, tmp_path):
    model = small_model(processor, connector="linear", image_seq_length=64, inner_adaptors={"every": 1, "rank": 2})
    nn.init.normal_(model.language_model.inner_adaptor["grounding"]["layers"][0].mlp.up_proj.up.weight)
    expected = {name: tensor.clone() for name, tensor in model.language_model.inner_adaptor.state_dict().items()}
    fully_shard_model(model, mesh=one_process)
    assert isinstance(model, FSDPModule)
    save_adaptors(model, tmp_path)
    other = small_model(processor, connector="linear", image_seq_length=64, inner_adaptors={"every": 1, "rank": 2})
    load_adaptors(other.language_model, tmp_path)
    loaded = other.language_model.inner_adaptor.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    with pytest.raises(ValueError, match=r"parameters of language_model are partitioned.*before"):
        load_adaptors(model.language_model, tmp_path)


def test_an_attached_id_former_of_a_sharded_model_is_gathered_and_saved(one_process, tmp_path):
    model = attach_id_former(tiny_model("llava"), num_heads=4, hidden_size=32)
    expected = {name: tensor.clone() for name, tensor in model.id_former.state_dict().items()}
    fully_shard_model(model, mesh=one_process)
    save_id_former(model, tmp_path)
    loaded = load_id_former(tiny_model("llava"), tmp_path).id_former.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_boxes_keep_their_precision_where_deepspeed_reduces_that_of_inputs(processor, tmp_path, monkeypatch):
    write_data(tmp_path)
    dataset = RecordDataset(tmp_path / "train.jsonl", encode=processor.encode)
    arguments = IDTrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = IDTrainer(small_model(processor), arguments, train_dataset=dataset, processing_class=processor)
    batch = processor.collate([dataset[0]])
    batch["boxes"] += 1000.25
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    prepared = trainer._prepare_inputs(batch)
    assert prepared["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(prepared["boxes"], batch["boxes"])
