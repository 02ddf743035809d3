"""LoRA, DoRA and QLoRA of the language model, the vision tower or both, beside new modules that are trained in full."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from idavlm import (
    IDAVLMForConditionalGeneration,
    IDTrainer,
    IDTrainingArguments,
    RecordDataset,
    add_inner_adaptors,
    attach_id_former,
    load_adaptors,
    load_id_former,
)
from idavlm.cli.main import main
from idavlm.models.identity_processor import IdentityProcessor
from idavlm.modules.inner_adaptor import train_workflow, use_workflow
from idavlm.training import (
    LoRAArguments,
    QuantizationArguments,
    add_lora,
    load_lora,
    merge_lora,
    quantization_config,
    save_lora,
)
from tests.interrupted_run import write_data
from tests.small_models import sample, small_model, small_processor
from tests.vlm_families import tiny_model, tiny_processor

LANGUAGE, TOWER = "language_model", "vision_tower"
PARTS = {"language model": (LANGUAGE,), "tower": (TOWER,), "both": (LANGUAGE, TOWER)}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a model with a ViT, an ID-Former and an image index embedding."""
    folder = tmp_path_factory.mktemp("base")
    small_model(small_processor(), tower="vit", max_images=4).save_pretrained(folder)
    return folder


def trainer_of(model, data, folder, **options) -> IDTrainer:
    processor = small_processor()
    defaults = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "save_steps": 1, "seed": 1}
    options = defaults | {"per_device_train_batch_size": 2, "learning_rate": 1e-2} | options
    records = RecordDataset(data / "train.jsonl", data / "images", encode=processor.encode)
    arguments = IDTrainingArguments(str(folder), **options)
    return IDTrainer(model, arguments, train_dataset=records, processing_class=processor)


def batch_of(root) -> dict:
    processor = small_processor()
    batch = processor.collate([processor.encode(sample(root))])
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "labels"}


@torch.no_grad()
def logits(model, batch, **options):
    return model.eval()(**batch, **options).logits


def train(model, batch, steps=3, **options):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"], **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# --- Every kind of adapter on every part -----------------------------------------------------------------------------


def adapted(base, kind: str, parts: tuple[str, ...], seed: int = 0) -> PeftModel:
    options = {}
    if kind == "QLoRA":
        config = IDAVLMForConditionalGeneration.config_class.from_pretrained(base)
        options["quantization_config"] = quantization_config(QuantizationArguments(parts=list(parts)), config)
    model = IDAVLMForConditionalGeneration.from_pretrained(base, **options)
    torch.manual_seed(seed)
    arguments = {
        part: LoRAArguments(r=2 + number, lora_alpha=4 + number, use_dora=kind == "DoRA")
        for number, part in enumerate(parts)
    }
    return add_lora(model, arguments)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "QLoRA"])
def test_training_resumes_and_merges(base, data, root, tmp_path, kind, parts):
    """Resumed equals uninterrupted bit by bit, loaded equals trained, and merged equals unmerged."""
    if kind == "QLoRA":
        pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    parts = PARTS[parts]
    whole = trainer_of(adapted(base, kind, parts), data, tmp_path / "whole")
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    expected_before = logits(whole.model, batch_of(root))
    whole.train()
    moved = {name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {part for part in (LANGUAGE, TOWER) if any(f".{part}." in name for name in moved)} == set(parts)
    for module in ("id_former", "image_index_embedding"):
        assert any(f".{module}.modules_to_save." in name for name in moved), module
    assert all("lora_" in name or "modules_to_save" in name for name in moved)

    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    resumed = trainer_of(adapted(base, kind, parts, seed=5), data, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    after = resumed.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, after[name]), name

    expected = logits(whole.model, batch_of(root))
    assert (expected - expected_before).abs().max() > 0.01
    loaded = load_lora(tmp_path / "whole" / "checkpoint-2")
    torch.testing.assert_close(logits(loaded, batch_of(root)), expected, atol=1e-6, rtol=1e-6)
    merged = merge_lora(loaded)
    assert type(merged) is IDAVLMForConditionalGeneration
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged, batch_of(root)), expected, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    again = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, batch_of(root)), logits(merged, batch_of(root)))


def test_each_part_has_its_own_rank_and_modules(base):
    model = IDAVLMForConditionalGeneration.from_pretrained(base)
    targets = r"layers\.1\..*\.(q_proj|down_proj)"
    tuned = add_lora(
        model,
        {
            LANGUAGE: LoRAArguments(r=4, lora_alpha=4, target_modules=targets),
            TOWER: LoRAArguments(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
        },
    )
    layers = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in tuned.named_modules()
        if hasattr(module, "lora_A")
    }
    language = {name: values for name, values in layers.items() if name.startswith(LANGUAGE)}
    tower = {name: values for name, values in layers.items() if name.startswith(TOWER)}
    assert {name.rpartition("layers.")[2] for name in language} == {"1.self_attn.q_proj", "1.mlp.down_proj"}
    assert set(language.values()) == {(4, 1.0)}
    assert {name.rpartition(".")[2] for name in tower} == {"q_proj", "v_proj"}
    assert len(tower) == 4
    assert set(tower.values()) == {(2, 3.0)}


def test_frozen_modules_stay_frozen(base):
    model = IDAVLMForConditionalGeneration.from_pretrained(base)
    model.id_former.requires_grad_(False)
    tuned = add_lora(model, {LANGUAGE: LoRAArguments()})
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert any("image_index_embedding" in name for name in trained)
    assert not any("id_former" in name or "vision_tower" in name for name in trained)
    model = IDAVLMForConditionalGeneration.from_pretrained(base)
    tuned = add_lora(model, {LANGUAGE: LoRAArguments()}, modules_to_save=["id_former.resampler"])
    full = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert full
    assert all("id_former.resampler.modules_to_save" in name for name in full)


@pytest.mark.parametrize(
    ("lora", "options", "message"),
    [
        ({}, {}, "lora={} adds nothing; name at least one of language_model, vision_tower"),
        ({"connector": {}}, {}, "lora='connector' is not known; choose one of 'language_model', 'vision_tower'"),
        (
            {LANGUAGE: {}, TOWER: {"use_dora": True}},
            {},
            "use_dora=True of vision_tower and False of language_model, but peft has one value per adapter",
        ),
        (
            {LANGUAGE: {"target_modules": ["qproj"]}},
            {},
            r"target_modules=\['qproj'\] of language_model matches no module of LlamaModel; its linear layers are named"
            ".*q_proj",
        ),
        (
            {LANGUAGE: {}},
            {"modules_to_save": ["head"]},
            "modules_to_save holds 'head', which .* does not have",
        ),
        (
            {TOWER: {}},
            {"modules_to_save": ["vision_tower"]},
            "gets LoRA, but modules_to_save trains vision_tower in full",
        ),
        ({LANGUAGE: {"r": 0}}, {}, "r=0 must be an integer of at least 1"),
        ({LANGUAGE: {"lora_dropout": 1.0}}, {}, "lora_dropout=1.0 must be at least 0 and less than 1"),
    ],
)
def test_options_that_cannot_take_effect_are_errors(base, lora, options, message):
    model = IDAVLMForConditionalGeneration.from_pretrained(base)
    with pytest.raises(ValueError, match=message):
        add_lora(model, {part: LoRAArguments(**arguments) for part, arguments in lora.items()}, **options)


def test_a_tower_with_running_statistics_gets_no_adapter():
    """They change in training, and an adapter does not save them."""
    with pytest.raises(ValueError, match="vision_tower has batch normalisation"):
        add_lora(small_model(small_processor()), {TOWER: LoRAArguments(target_modules=r".*convolution")})


# --- Wrapped by peft directly ----------------------------------------------------------------------------------------


def test_a_wrapped_resampler_still_gets_the_grid():
    """Images that are not square: without the grid of the patches, the resampler would take another one."""
    model = small_model(small_processor(), connector="resampler")
    pixel_values = torch.randn(2, 3, 64, 32)
    expected, _, grid = model.encode_images(pixel_values)
    assert grid == (8, 4)
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["connector"])
    tuned = get_peft_model(model, config).eval()
    assert torch.equal(tuned.get_base_model().encode_images(pixel_values)[0], expected)


def test_lora_on_inner_adaptors_trains_what_is_saved(data, tmp_path):
    """Of the workflow that is trained, the LoRA weights move; its base weights do not, because peft saves none."""
    model = small_model(small_processor(), inner_adaptors={"every": 1})
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=r".*inner_adaptor\..*\.(q|v)_proj"))
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    trainer_of(tuned, data, tmp_path, workflow="grounding").train()
    moved = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("inner_adaptor.grounding" in name and "lora_" in name for name in moved)
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in moved} <= saved.keys()


def test_a_workflow_without_adapter_is_an_error(data, tmp_path):
    """Its weights would be trained and not saved."""
    model = small_model(small_processor(), inner_adaptors={"every": 1})
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=r".*inner_adaptor\.grounding.*q_proj"))
    with pytest.raises(ValueError, match=r"trained parameters are not part of the adapter.*inner_adaptor\.multimodal"):
        trainer_of(tuned, data, tmp_path, workflow="multimodal").train()


# --- Inner adaptors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"every": 1, "modules_to_copy": ("connector", "norm")}, (LANGUAGE, TOWER)),
        ({"layers": [1], "composition": "parallel"}, (LANGUAGE,)),
        ({"every": 1, "rank": 2}, (TOWER,)),
        ({"every": 2, "rank": 2, "composition": "parallel", "workflows": ("grounding",)}, (TOWER,)),
    ],
)
def test_inner_adaptors_are_trained_in_full_beside_lora(data, root, tmp_path, options, parts):
    connector = {"connector": "resampler"} if "modules_to_copy" in options else {}
    small_model(small_processor(), tower="vit", **connector).save_pretrained(tmp_path / "base")

    def build():
        path = tmp_path / "base"
        return IDAVLMForConditionalGeneration.from_pretrained(path, inner_adaptors=options)

    model = add_lora(build(), {part: LoRAArguments(r=2) for part in parts})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer_of(model, data, tmp_path / "run", workflow="grounding").train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    adaptors = {name for name in moved if "inner_adaptor" in name}
    assert adaptors
    assert all(".grounding." in name and ".modules_to_save." in name for name in adaptors)
    for part in parts:
        assert any(f".{part}." in name and "lora_" in name for name in moved)

    workflows = (*options.get("workflows", ("multimodal", "grounding")), "text")
    expected = {name: logits(model, batch_of(root), workflow=name) for name in workflows}
    loaded = load_lora(tmp_path / "run" / "checkpoint-2", tmp_path / "base")
    merged = merge_lora(loaded)
    merged.save_pretrained(tmp_path / "merged")
    again = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    for name in workflows:
        torch.testing.assert_close(logits(merged, batch_of(root), workflow=name), expected[name], **CLOSE)
        assert torch.equal(logits(again, batch_of(root), workflow=name), logits(merged, batch_of(root), workflow=name))


def test_adapters_that_would_not_merge_are_refused(data, tmp_path):
    """Low-rank adaptors share the linear layers; a copy of a module with hooks would run copies of the adaptors."""
    model = small_model(small_processor(), inner_adaptors={"every": 1, "rank": 2})
    with pytest.raises(ValueError, match="shares a linear layer of the base model that has an adapter"):
        add_lora(model, {LANGUAGE: LoRAArguments()})
    options = {"connector": "resampler", "inner_adaptors": {"every": 1, "modules_to_copy": ("connector",)}}
    with pytest.raises(ValueError, match="modules_to_save holds 'connector', in whose place inner adaptors run"):
        add_lora(small_model(small_processor(), **options), {LANGUAGE: LoRAArguments()}, modules_to_save=["connector"])
    config = LoraConfig(target_modules=r".*decoder.*q_proj|.*model\.layers.*q_proj", modules_to_save=["connector"])
    tuned = get_peft_model(small_model(small_processor(), **options), config)
    train_workflow(tuned, "text")
    with pytest.raises(ValueError, match="in whose place inner adaptors run; leave it out"):
        trainer_of(tuned, data, tmp_path).train()


def test_a_language_model_with_inner_adaptors(tmp_path):
    """The adapter holds the inner adaptors, and the merged model and its adaptors are two files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "base")
    model = add_inner_adaptors(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), layers=[1])
    train_workflow(model, "grounding")
    tuned = add_lora(model, {LANGUAGE: LoRAArguments(r=2)})
    batch = {"input_ids": torch.arange(16).view(2, 8)}
    with use_workflow(tuned, "grounding"):
        train(tuned, batch)
    save_lora(tuned, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    load_adaptors(merged, tmp_path / "merged")
    for workflow in ("grounding", "text"):
        with use_workflow(tuned, workflow), use_workflow(merged, workflow):
            torch.testing.assert_close(logits(merged, batch), logits(tuned, batch), **CLOSE)


# --- Models of transformers, and the command -------------------------------------------------------------------------


def inputs_of(processor, root, **options):
    content = [{"type": "image", "image": str(root / "scene.png")}, {"type": "text", "text": "What is Kate doing?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Kate is reading."}]
    if options.pop("identities", False):
        content.insert(0, {"type": "identity", "name": "Kate", "images": [str(root / "kate.png")]})
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2_5_vl"])
def test_the_merged_model_loads_without_idavlm(family, root, tmp_path):
    """LoRA of both parts of a model of transformers; what merge writes has equal logits, and its processor."""
    tiny_model(family).save_pretrained(tmp_path / "base")
    processor = IdentityProcessor(tiny_processor(family))
    processor.save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    tuned = add_lora(model, {LANGUAGE: LoRAArguments(r=4), TOWER: LoRAArguments(r=2)})
    inputs = processor.processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": str(root / "scene.png")}, {"type": "text", "text": "?"}],
            }
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    train(tuned, inputs)
    moved = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, before[name])}
    connector = {"llava": "multi_modal_projector", "smolvlm": "connector", "qwen2_5_vl": None}[family]
    assert any("modules_to_save" in name for name in moved) == (connector is not None)
    assert all(f".{connector}.modules_to_save." in name for name in moved if "lora_" not in name)
    expected = logits(tuned, inputs)
    save_lora(tuned, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(model)
    torch.testing.assert_close(logits(merged, inputs), expected, **CLOSE)
    saved = {path.name for path in (tmp_path / "base").iterdir()}
    assert saved <= {path.name for path in (tmp_path / "merged").iterdir()}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_attached_id_former_is_trained_in_full_and_written_beside(family, root, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    attach_id_former(model, num_heads=4, hidden_size=32, identity_embedding="name")
    tuned = add_lora(model, {LANGUAGE: LoRAArguments(r=2)})
    inputs = dict(inputs_of(IdentityProcessor(tiny_processor(family)), root, identities=True))
    train(tuned, inputs)
    full = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert full
    assert all(".id_former.modules_to_save." in name for name in full), "the model was frozen when it was attached"
    expected = logits(tuned, inputs)
    save_lora(tuned, tmp_path / "adapter")
    loaded = load_lora(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, inputs), expected, atol=1e-6, rtol=1e-6)
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    merged = load_id_former(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"), tmp_path / "merged")
    torch.testing.assert_close(logits(merged, inputs), expected, **CLOSE)


def test_merge_says_what_it_needs(base, tmp_path, capsys):
    tuned = adapted(base, "LoRA", (LANGUAGE,))
    save_lora(tuned, tmp_path / "adapter")
    for arguments, message in (
        ([str(tmp_path / "adapter"), "--out", str(tmp_path)], "exists; pass a folder that does not"),
        ([str(base), "--out", str(tmp_path / "out")], "holds no adapter (adapter_config.json)"),
    ):
        assert main(["merge", *arguments]) == 2
        assert message in capsys.readouterr().err
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 2
    assert "names no base_model_name_or_path" in capsys.readouterr().err
    other = small_model(small_processor(), tower="siglip", max_images=4)
    other.save_pretrained(tmp_path / "other")
    arguments = [str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--model", str(tmp_path / "other")]
    assert main(["merge", *arguments]) == 2
    assert "is not the model of the adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_adapters_are_not_merged(base):
    tuned = adapted(base, "LoRA", (LANGUAGE,))
    tuned.add_adapter("second", LoraConfig(target_modules=r".*q_proj"))
    with pytest.raises(ValueError, match="merges one LoRA adapter, but the model has"):
        merge_lora(tuned)
    assert isinstance(tuned.get_base_model().language_model, nn.Module)
