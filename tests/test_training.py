"""IDTrainer: stages, loss weights, modules, checkpoints, and bit-equal resumption of killed runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from idavlm import add_inner_adaptors
from idavlm.data import RecordDataset
from idavlm.models import IDAVLMProcessor
from idavlm.models.model_parts import PARTS, find_part
from idavlm.training import IDTrainer, IDTrainingArguments, last_complete_checkpoint
from idavlm.training.trainer import MAX_STEPS_WITHOUT_BOXES, language_loss_by_source
from idavlm.utils.parameter_groups import module_of
from tests.interrupted_run import STEPS, build_trainer, write_data
from tests.small_models import record, small_model, small_processor
from tests.vlm_families import FAMILIES, tiny_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(folder: Path) -> dict[int, dict]:
    """Losses by step. A resumed run writes some steps again; the last entry counts."""
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


@pytest.mark.usefixtures("_one_thread")
def test_killed_and_resumed_runs_are_bit_equal_to_an_uninterrupted_one(data, tmp_path):
    build_trainer(data, tmp_path / "whole").train()
    whole = losses(tmp_path / "whole")
    assert set(whole) == set(range(1, STEPS + 1))
    assert {"loss_identity", "loss_general"} <= {name for line in whole.values() for name in line}

    kills = [(6, "step"), (9, "step"), (12, "save")]  # between checkpoints, right after one, while writing one
    processes = []
    for step, where in kills:
        folder = tmp_path / f"{where}-{step}"
        folder.mkdir()
        command = [sys.executable, "-m", "tests.interrupted_run", str(data), str(folder), str(step), where]
        processes.append((folder, subprocess.Popen(command, cwd=Path(__file__).parent.parent)))
    for folder, process in processes:
        assert process.wait(timeout=300) == -signal.SIGKILL
        before = losses(folder)
        assert 0 < len(before) < STEPS
        if folder.name.startswith("save"):
            assert (folder / "checkpoint-12").exists()
            assert last_complete_checkpoint(folder).endswith("checkpoint-8")
        resumed = build_trainer(data, folder)
        resumed.train(resume_from_checkpoint=True)
        assert losses(folder) == whole
        assert resumed.state.global_step == STEPS


def test_runs_killed_at_random_moments_are_bit_equal_to_uninterrupted_ones():
    """One run of one process and one of two. ``make resume`` kills more often and in every moment."""
    command = [sys.executable, "-m", "tests.killed_runs", "--kills", "2", "--towers", "vit"]
    finished = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr.decode()
    assert b"2 kills: losses, weights and optimizer states are bit-equal" in finished.stdout


@pytest.mark.usefixtures("_one_thread")
def test_runs_with_workers_and_accumulation_resume_bit_equal(data, tmp_path):
    check_resumption(data, tmp_path, num_workers=1, gradient_accumulation_steps=2)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("general", [True, False])
def test_packed_runs_grouped_by_length_resume_bit_equal(data, tmp_path, general):
    options = {"train_sampling_strategy": "group_by_length", "packing": True, "max_length": 200}
    check_resumption(data, tmp_path, general=general, **options)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("stage", ["instruction_tuning", "identity_pretraining"])
def test_runs_on_identity_data_alone_resume_bit_equal(data, tmp_path, stage):
    check_resumption(data, tmp_path, general=False, stage=stage)


def check_resumption(data, tmp_path, **options):
    """Resume from a checkpoint within the second epoch and compare with a run that was not interrupted."""
    build_trainer(data, tmp_path / "whole", **options).train()
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    resumed = build_trainer(data, tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "again") == {step: whole[step] for step in range(9, STEPS + 1)}


def arguments(tmp_path, **options) -> IDTrainingArguments:
    defaults = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
    return IDTrainingArguments(**(defaults | options))


def gradients(data, tmp_path, source: str, **options) -> dict[str, torch.Tensor]:
    processor = small_processor()
    trainer = IDTrainer(small_model(processor), arguments(tmp_path, **options), data_collator=processor.collate)
    records = RecordDataset(data / f"{'train' if source == 'identity' else 'general'}.jsonl", encode=processor.encode)
    batch = processor.collate([records[0], records[1]])
    trainer.compute_loss(trainer.model.train(), batch).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("source", ["identity", "general"])
def test_loss_weights_act_on_the_gradients(data, tmp_path, source):
    unweighted = gradients(data, tmp_path, source)
    weighted = gradients(data, tmp_path, source, loss_weights={source: 0.25})
    other = {"identity": "general", "general": "identity"}[source]
    untouched = gradients(data, tmp_path, source, loss_weights={other: 0.25})
    assert any(gradient.abs().max() > 1e-3 for gradient in unweighted.values())
    for name, gradient in unweighted.items():
        torch.testing.assert_close(weighted[name], 0.25 * gradient)
        torch.testing.assert_close(untouched[name], gradient)


def test_mixed_batches_are_weighted_by_sample(data, tmp_path):
    processor = small_processor()
    model = small_model(processor)
    identity = RecordDataset(data / "train.jsonl", encode=processor.encode)
    general = RecordDataset(data / "general.jsonl", encode=processor.encode)
    mixed = processor.collate([identity[0], general[0], identity[1]]) | {"sample_source": torch.tensor([0, 1, 0])}
    trainer = IDTrainer(model, arguments(tmp_path, loss_weights={"identity": 0.5, "general": 3.0}))
    loss, outputs = trainer.compute_loss(model, dict(mixed), return_outputs=True)
    alone = [
        model(**{k: v for k, v in processor.collate(rows).items() if k != "source"})
        for rows in ([identity[0], identity[1]], [general[0]])
    ]
    expected = 0.5 * alone[0].loss + 3 * alone[1].language_loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    means = language_loss_by_source(outputs.logits, mixed["labels"], mixed["sample_source"][:, None])
    torch.testing.assert_close(means["general"], alone[1].language_loss, rtol=1e-4, atol=1e-5)


def test_freezing_and_rates_of_modules(data, tmp_path):
    processor = small_processor()
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    model = small_model(processor)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {"freeze": ["vision_tower"], "module_learning_rates": {"id_former": 0.0}, "learning_rate": 1e-2}
    trainer = IDTrainer(model, arguments(tmp_path, **options), train_dataset=records, data_collator=processor.collate)
    trainer.train()
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == name.startswith("language_model"), name


def test_the_image_index_embedding_is_a_module(data, tmp_path):
    processor = small_processor()
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    for options in ({"freeze": ["image_index_embedding"]}, {"module_learning_rates": {"image_index_embedding": 0.0}}):
        model = small_model(processor, max_images=2)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer = IDTrainer(model, arguments(tmp_path, **options), train_dataset=records, processing_class=processor)
        trainer.train()
        unchanged = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
        assert unchanged == {"image_index_embedding.weight"}


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("vision_tower.encoder.weight", "vision_tower"),
        ("base_model.model.id_former.modules_to_save.default.latents", "id_former"),
        ("language_model.model.layers.0.self_attn.q_proj.weight", "language_model"),
        ("language_model.inner_adaptor.multimodal.layers.0.weight", "inner_adaptor"),
        ("language_model.inner_adaptor.multimodal.connector.0.weight", "inner_adaptor"),
        ("image_index_embedding.weight", "image_index_embedding"),
        ("model.layers.0.mlp.weight", None),
    ],
)
def test_the_module_of_a_parameter(name, module):
    assert module_of(name) == module


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers_have_the_same_module_names(family):
    """Every parameter belongs to the tower, the language model with its head, or to the connector between them."""
    model = tiny_model(family)
    parts = {id(parameter): part for part in PARTS for parameter in find_part(model, part)[1].parameters()}
    parts[id(model.get_output_embeddings().weight)] = "language_model"
    found = {name: module_of(name) for name, _ in model.named_parameters()}
    assert None not in found.values()
    for name, parameter in model.named_parameters():
        # The projection of some towers is inside of them, for example the merger of Qwen-VL.
        assert found[name] in (parts.get(id(parameter), "connector"), "connector"), name
    assert {"vision_tower", "connector", "language_model"} <= set(found.values())


def test_a_connector_that_a_workflow_copies_belongs_to_its_inner_adaptor(data, tmp_path):
    """The documented recipe freezes the connector, and trains the copy of the workflow."""
    processor = small_processor()
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    adaptors = {"layers": [1], "modules_to_copy": ("connector",)}
    model = small_model(processor, connector="resampler", inner_adaptors=adaptors)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {"workflow": "multimodal", "freeze": ["vision_tower", "connector"], "learning_rate": 1e-2}
    trainer = IDTrainer(model, arguments(tmp_path, **options), train_dataset=records, processing_class=processor)
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("language_model.inner_adaptor.multimodal.connector.") for name in changed)
    assert all(name.startswith("language_model.inner_adaptor.multimodal.") for name in changed)


def test_teacher_forcing_ends_after_its_steps(data, tmp_path):
    processor = small_processor()
    model, seen = small_model(processor, identity_embedding="learned", max_identities=2), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("teacher_forcing", False)), with_kwargs=True
    )
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    options = arguments(tmp_path, max_steps=3, teacher_forcing_steps=2)
    IDTrainer(model, options, train_dataset=records, data_collator=processor.collate).train()
    assert seen == [True, True, False]
    with pytest.raises(ValueError, match="teacher_forcing_steps=2 needs an ID-Former with identity_embedding"):
        IDTrainer(small_model(processor), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "pretraining"}, "stage='pretraining' is not known; choose one of 'instruction_tuning'"),
        ({"stage": "identity_pretraining", "teacher_forcing_steps": 3}, "teacher_forcing_steps=3 has no effect"),
        ({"stage": "identity_pretraining", "workflow": "text"}, "workflow='text' has no effect"),
        ({"teacher_forcing_steps": -1}, "teacher_forcing_steps=-1 must be"),
        ({"loss_weights": {"scene": 1.0}}, "loss_weights='scene'"),
        ({"loss_weights": {"general": -1.0}}, r"loss_weights\['general'\]=-1.0"),
        ({"freeze": ["tower"]}, "freeze='tower'"),
        ({"freeze": ["id_former"], "module_learning_rates": {"id_former": 1.0}}, "freeze holds 'id_former'"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_errors_of_the_trainer(tmp_path):
    with pytest.raises(
        ValueError, match=r"freeze names 'connector', which .* does not have; it has 'vision_tower', 'id_"
    ):
        IDTrainer(small_model(small_processor()), arguments(tmp_path, freeze=["connector"]))
    with pytest.raises(ValueError, match="freeze names 'image_index_embedding'"):
        IDTrainer(small_model(small_processor()), arguments(tmp_path, freeze=["image_index_embedding"]))
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        last_complete_checkpoint(tmp_path)
    model, rates = small_model(small_processor()), {"module_learning_rates": {"id_former": 1e-4}}
    with pytest.raises(ValueError, match="module_learning_rates has no effect on an optimizer that is passed"):
        IDTrainer(model, arguments(tmp_path, **rates), optimizers=(torch.optim.AdamW(model.parameters()), None))


# --- Identity pretraining --------------------------------------------------------------------------------------------


def pretraining(tmp_path, **options) -> IDTrainingArguments:
    return arguments(tmp_path, stage="identity_pretraining", **options)


def test_identity_pretraining_trains_tower_and_identity_attention_from_boxes(data, tmp_path):
    processor = small_processor()
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    model = small_model(processor)
    model.language_model.register_forward_pre_hook(lambda *_: pytest.fail("the language model was run"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = IDTrainer(
        model,
        pretraining(tmp_path, logging_steps=1, eval_strategy="steps", eval_steps=1, learning_rate=1e-2),
        train_dataset=records,
        eval_dataset=records,
        processing_class=processor,
    )
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("vision_tower.") for name in changed)
    assert any(name.startswith("id_former.identity_layers.") for name in changed)
    assert all(name.startswith(("vision_tower.", "id_former.")) for name in changed)
    assert all(parameter.requires_grad for parameter in model.parameters()), "the next stage trains the language model"
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx(
        [entry["identity_map_loss"] for entry in logged], abs=1e-4
    )
    assert not any("loss_identity" in entry for entry in logged)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2
    assert evaluated[1] < evaluated[0]


def test_identity_pretraining_needs_an_id_former_and_boxes(data, tmp_path):
    processor = small_processor()
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    with pytest.raises(ValueError, match="stage='identity_pretraining' trains an ID-Former, which IDAVLM"):
        IDTrainer(small_model(processor, connector="resampler"), pretraining(tmp_path))
    with pytest.raises(ValueError, match="general_dataset has no effect with stage='identity_pretraining'"):
        IDTrainer(small_model(processor), pretraining(tmp_path), general_dataset=records)
    trainer = IDTrainer(small_model(processor), pretraining(tmp_path))
    batch = processor.collate([records[0]])
    with pytest.raises(ValueError, match="needs boxes, but the batch has no field 'boxes'"):
        trainer.compute_loss(trainer.model, {name: value for name, value in batch.items() if name != "boxes"})


@pytest.mark.parametrize("records_with_boxes", [0, 1])
def test_identity_pretraining_stops_if_the_data_has_no_boxes(data, tmp_path, records_with_boxes):
    records = [record(number) | {"boxes": []} for number in range(MAX_STEPS_WITHOUT_BOXES + 2)]
    for entry in records[records_with_boxes:]:
        entry["messages"] = entry["messages"][2:]  # these turns have no box
        entry["messages"][0] = {"role": "user", "content": [{"type": "image", "image": "scene.png"}]}
    for entry in records[:records_with_boxes]:
        entry["boxes"] = record()["boxes"]
    path = data / f"boxes-{records_with_boxes}.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    processor = small_processor()
    trainer = IDTrainer(
        small_model(processor),
        pretraining(
            tmp_path, max_steps=len(records), per_device_train_batch_size=1, train_sampling_strategy="sequential"
        ),
        train_dataset=RecordDataset(path, data / "images", encode=processor.encode),
        processing_class=processor,
    )
    if records_with_boxes:
        trainer.train()
    else:
        with pytest.raises(ValueError, match=f"needs boxes, but the first {MAX_STEPS_WITHOUT_BOXES} steps have none"):
            trainer.train()


@pytest.mark.parametrize("options", [{"max_steps": -1, "num_train_epochs": 1}, {"max_steps": 3, "save_steps": 2}])
def test_a_short_data_set_without_boxes_is_an_error(data, tmp_path, options):
    """Fewer steps than those after which it is noticed in a longer run."""
    processor = small_processor()
    samples = []
    for number in range(2):
        sample = RecordDataset(data / "train.jsonl", encode=processor.encode)[number]
        samples.append(sample | {name: sample[name][:0] for name in ("boxes", "box_image", "box_identity")})

    trainer = IDTrainer(
        small_model(processor),
        pretraining(tmp_path, per_device_train_batch_size=1, **options),
        train_dataset=samples,
        processing_class=processor,
    )
    with pytest.raises(ValueError, match="needs boxes, but the 2 steps until now have none"):
        trainer.train()


def test_steps_without_boxes_are_counted_in_the_log(data, tmp_path):
    processor = small_processor()
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    empty = records[1] | {name: records[1][name][:0] for name in ("boxes", "box_image", "box_identity")}
    trainer = IDTrainer(
        small_model(processor),
        pretraining(
            tmp_path,
            max_steps=4,
            logging_steps=2,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            save_steps=2,
        ),
        train_dataset=[records[0], empty, records[2], records[3]],
        processing_class=processor,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("steps_without_boxes") for entry in logged] == [1, None]
    assert json.loads((tmp_path / "checkpoint-2" / "run_state.json").read_text())["supervised_scenes"] == 1


def test_ddp_looks_for_parameters_without_gradient(tmp_path):
    assert arguments(tmp_path).ddp_find_unused_parameters is True
    assert pretraining(tmp_path).ddp_find_unused_parameters is True
    assert pretraining(tmp_path, ddp_find_unused_parameters=False).ddp_find_unused_parameters is False


def test_arguments_are_read_from_the_command_line(tmp_path):
    command = [
        "--output_dir",
        str(tmp_path),
        "--stage",
        "identity_pretraining",
        "--freeze",
        "vision_tower",
        "connector",
    ]
    command += ["--module_learning_rates", '{"id_former": 1e-4}', "--use_cpu", "true"]
    (parsed,) = HfArgumentParser(IDTrainingArguments).parse_args_into_dataclasses(command)
    assert parsed.stage == "identity_pretraining"
    assert parsed.freeze == ["vision_tower", "connector"]
    assert parsed.module_learning_rates == {"id_former": 1e-4}


# --- Other models ----------------------------------------------------------------------------------------------------


def test_a_bare_language_model_is_trained_on_its_own_loss(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    ids = torch.arange(8)
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 4
    options = {"logging_steps": 1, "learning_rate": 1e-2, "max_steps": 20, "loss_weights": {"identity": 0.5}}
    trainer = IDTrainer(model, arguments(tmp_path, **options), train_dataset=samples, eval_dataset=samples)
    expected = model.eval()(input_ids=ids[None], labels=ids[None]).loss.item()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss_identity" in entry]
    assert logged[0]["loss_identity"] == pytest.approx(expected, abs=1e-4)
    assert logged[0]["loss"] == pytest.approx(0.5 * expected, abs=1e-3)
    assert logged[-1]["loss_identity"] < 0.8 * expected
    assert trainer.evaluate()["eval_loss"] < 0.5 * expected
    with pytest.raises(ValueError, match="teacher_forcing_steps=1 needs an ID-Former with identity_embedding"):
        IDTrainer(model, arguments(tmp_path, teacher_forcing_steps=1))
    with pytest.raises(ValueError, match="neither 'language_loss' nor 'loss'; does the batch have 'labels'"):
        trainer.compute_loss(model, {"input_ids": ids[None]})


def test_a_bare_language_model_trains_one_workflow(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = add_inner_adaptors(LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes)), every=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(8)
    samples = [{"input_ids": ids, "labels": ids}] * 4
    workflows = []
    trainer = IDTrainer(
        model,
        arguments(tmp_path, workflow="grounding", max_steps=2, learning_rate=1e-2),
        train_dataset=samples,
        task_evaluation=lambda model: workflows.append(model.inner_adaptor.active) or {"score": 1.0},
    )
    trainer.train()
    trainer.evaluate()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(name.startswith("inner_adaptor.grounding.") for name in changed)
    assert set(workflows) == {"grounding"}
    assert model.inner_adaptor.active == "multimodal"


class OneWeight(nn.Module):
    """A model without a configuration that returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"loss": ((self.weight - x.float()) ** 2).mean()}


def test_a_module_without_configuration_is_trained(tmp_path):
    trainer = IDTrainer(OneWeight(), arguments(tmp_path, learning_rate=0.1), train_dataset=[{"x": 1.0}] * 4)
    trainer.train()
    assert trainer.model.weight > 0.05
    with pytest.raises(ValueError, match="teacher_forcing_steps=1 needs an ID-Former"):
        IDTrainer(OneWeight(), arguments(tmp_path, teacher_forcing_steps=1))


# --- Checkpoints and evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["processing_class", "data_collator"])
def test_checkpoints_hold_the_processor(data, tmp_path, argument):
    processor = small_processor()
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    passed = {"processing_class": processor, "data_collator": processor.collate}[argument]
    trainer = IDTrainer(small_model(processor), arguments(tmp_path), train_dataset=records, **{argument: passed})
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        loaded = IDAVLMProcessor.from_pretrained(folder)
        assert loaded.to_dict() == processor.to_dict()
        encoded = RecordDataset(data / "train.jsonl", encode=loaded.encode)[0]
        assert all(torch.equal(encoded[name], value) for name, value in records[0].items() if torch.is_tensor(value))


def test_evaluation_during_training(data, tmp_path):
    processor = small_processor()
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    trainer = IDTrainer(
        small_model(processor),
        arguments(tmp_path, eval_strategy="steps", eval_steps=1, logging_steps=1, per_device_train_batch_size=2),
        train_dataset=records,
        eval_dataset=records,
        data_collator=processor.collate,
        task_evaluation=lambda model: {"matching": float(model.training)},
    )
    trainer.train()
    seen = [entry for entry in trainer.state.log_history if "eval_matching" in entry]
    assert [entry["eval_matching"] for entry in seen] == [0.0, 0.0]
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


def test_batches_grouped_by_length_come_from_both_sources(data, tmp_path):
    """The lengths of records are known without reading images, and both loaders follow them in every epoch."""
    options = {"train_sampling_strategy": "group_by_length"}
    trainer, shuffled = (build_trainer(data, tmp_path, **given) for given in (options, {}))
    counts = {
        dataset[index]["id"]: length
        for dataset in (trainer.train_dataset, trainer.general_dataset)
        for index, length in enumerate(dataset.token_counts())
    }
    assert len(set(counts.values())) > 4
    for one in (trainer, shuffled):
        one.train_dataset = ConcatDataset([one.train_dataset] * 4)
    seen = {"identity": [], "general": []}
    loader = trainer.get_train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            lengths = batch["attention_mask"].sum(1).tolist()
            assert lengths == [counts[name] for name in batch["sample_ids"]]
            seen[batch["source"]].append(lengths)
    unordered = [
        batch["attention_mask"].sum(1).tolist()
        for batch in shuffled.get_train_dataloader()
        if batch["source"] == "identity"
    ]
    grouped = seen["identity"][: len(unordered)]
    assert sum(max(pair) - min(pair) for pair in grouped) < sum(max(pair) - min(pair) for pair in unordered) / 2
    assert seen["general"]


def test_group_by_length_without_lengths_is_an_error(data, tmp_path):
    trainer = build_trainer(data, tmp_path, train_sampling_strategy="group_by_length")
    trainer.train_dataset = RecordDataset(data / "train.jsonl", encode=lambda sample: {})
    with pytest.raises(ValueError, match="is not the method of a processor that counts tokens"):
        trainer.train()


def test_a_run_with_other_rows_is_not_resumed(data, tmp_path):
    build_trainer(data, tmp_path, packing=True, max_length=200).train()
    with pytest.raises(ValueError, match="max_length was 200 and is 300"):
        build_trainer(data, tmp_path, packing=True, max_length=300).train(resume_from_checkpoint=True)
