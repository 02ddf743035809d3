"""IDTrainer trains an attached ID-Former: from boxes alone, and on text and boxes; only the ID-Former moves."""

import functools
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from idavlm import IDTrainer, IDTrainingArguments, RecordDataset, attach_id_former, save_id_former
from idavlm.models.identity_processor import IdentityProcessor
from tests.small_models import record
from tests.vlm_families import tiny_model, tiny_processor

FAMILIES = ("llava", "qwen2_5_vl")


@pytest.fixture(scope="module")
def data(root):
    path = root.parent / f"{root.name}.jsonl"
    path.write_text("\n".join(json.dumps(record(number)) for number in range(8)))
    return path


def build(family, data, root, **options):
    torch.manual_seed(0)
    model, processor = tiny_model(family), IdentityProcessor(tiny_processor(family))
    attach_id_former(model, num_heads=4, hidden_size=32, identity_embedding="name", contrastive_loss_weight=0.5)
    options = {
        "output_dir": str(root.parent / "run"),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    dataset = RecordDataset(data, root, encode=processor.encode)
    trainer = IDTrainer(model, IDTrainingArguments(**options), train_dataset=dataset, processing_class=processor)
    return trainer, model


@pytest.mark.parametrize("stage", ["identity_pretraining", "instruction_tuning"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_attachment_is_trained(family, stage, data, root):
    trainer, model = build(family, data, root, stage=stage)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("id_former.") for name in moved)
    logged = [entry for entry in trainer.state.log_history if "identity_map_loss" in entry]
    assert len(logged) == 12
    assert logged[-1]["identity_map_loss"] < 0.7 * logged[0]["identity_map_loss"]
    if stage == "instruction_tuning":
        assert logged[-1]["loss_identity"] < logged[0]["loss_identity"]


def keep(kept, name, parameter):
    kept[name] = parameter.grad.clone()


def test_teacher_forcing_and_accumulation(data, root):
    """Two batches of two samples have the gradients of one batch of four, also with boxes."""
    gradients = []
    for size, accumulation in ((4, 1), (2, 2)):
        trainer, model = build(
            "llava",
            data,
            root,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            teacher_forcing_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
        )
        trainer.model.id_former.identity_embedding_gate.data.fill_(0.5)
        kept: dict[str, torch.Tensor] = {}
        for name, parameter in model.id_former.named_parameters():
            parameter.register_post_accumulate_grad_hook(functools.partial(keep, kept, name))
        trainer.model.base_model.get_image_features.loss_weights["contrastive_loss"] = 0.0  # compares within a batch
        trainer.train()
        gradients.append(kept)
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-3)


def test_a_checkpoint_holds_the_attachment_and_resumes(data, root, tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    whole, model = build("llava", data, root, max_steps=4, **options)
    whole.train()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resumed, model = build("llava", data, root, max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    save_id_former(model, tmp_path / "id-former")


def general_file(data, root, *, number=4):
    path = root.parent / f"{root.name}-general.jsonl"
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "other.png"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A hat."},
    ]
    records = [{"id": f"general-{index}", "source": "general", "messages": turns} for index in range(number)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_general_data_needs_more_than_the_attachment(family, data, root, tmp_path):
    """With a frozen model it would train nothing: refused with the remedies, which help."""
    general = general_file(data, root)

    def trainer(model, **datasets):
        options = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
        arguments = IDTrainingArguments(output_dir=str(tmp_path), save_strategy="no", disable_tqdm=True, **options)
        return IDTrainer(model, arguments, processing_class=processor, **datasets)

    processor = IdentityProcessor(tiny_processor(family))
    identity, other = (RecordDataset(path, root, encode=processor.encode) for path in (data, general))
    frozen = attach_id_former(tiny_model(family), num_heads=4, hidden_size=32)
    with pytest.raises(
        ValueError, match=r"general_dataset trains nothing: only the attached id_former .* freeze_model"
    ):
        trainer(frozen, train_dataset=identity, general_dataset=other)
    with pytest.raises(ValueError, match=r"a batch trains nothing \(general-.*Remove records without identities, or"):
        trainer(frozen, train_dataset=other).train()
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["id_former"])
    for model in (
        attach_id_former(tiny_model(family), num_heads=4, hidden_size=32, freeze_model=False),
        get_peft_model(attach_id_former(tiny_model(family), num_heads=4, hidden_size=32), lora),
    ):
        run = trainer(model, train_dataset=identity, general_dataset=other)
        run.train()
        assert run.state.global_step == 4
