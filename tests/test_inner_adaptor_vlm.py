"""Inner adaptors in an identity-aware VLM: configuration, images, generation, saving, training by stages."""

import pytest
import torch

from idavlm import IDAVLMConfig, IDAVLMForConditionalGeneration, add_inner_adaptors
from idavlm.training import IDTrainer, IDTrainingArguments
from tests.small_models import IMAGES, draw_images, sample, small_model, small_processor

ADAPTORS = {"layers": [0, 1]}
COPYING = {"layers": [1], "modules_to_copy": ("embeddings", "norm", "lm_head", "connector")}
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def processor():
    return small_processor()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"), IMAGES)


@pytest.fixture(scope="module")
def batch(processor, root):
    return {k: v for k, v in processor.collate([processor.encode(sample(root))]).items() if k != "source"}


def disturb(model):
    with torch.no_grad():
        for parameter in model.language_model.inner_adaptor.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits(model, batch, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


@pytest.mark.parametrize(
    "options",
    [
        {"inner_adaptors": ADAPTORS},
        {"inner_adaptors": COPYING, "connector": "resampler"},
        {"inner_adaptors": {"every": 2, "rank": 2, "composition": "parallel"}, "connector": "resampler"},
    ],
)
def test_workflows_saving_and_loading(processor, batch, tmp_path, options):
    base = small_model(processor, connector=options.get("connector", "id_former"))
    model = disturb(small_model(processor, **options))
    outputs = {workflow: logits(model, batch, workflow=workflow) for workflow in ("multimodal", "grounding", "text")}
    assert torch.equal(outputs["text"], logits(base, batch))
    assert torch.equal(outputs["multimodal"], logits(model, batch))
    assert len({tuple(output.flatten()[:9].tolist()) for output in outputs.values()}) == 3
    model.save_pretrained(tmp_path)
    loaded, info = IDAVLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for workflow, output in outputs.items():
        assert torch.equal(logits(loaded.eval(), batch, workflow=workflow), output)
        with loaded.workflow(workflow):
            assert torch.equal(logits(loaded, batch), output)
    assert all(not p.requires_grad for n, p in loaded.language_model.named_parameters() if "inner_adaptor" not in n)


@pytest.mark.parametrize(
    "options", [{"inner_adaptors": ADAPTORS}, {"inner_adaptors": COPYING, "connector": "resampler"}]
)
def test_a_checkpoint_without_adaptors_gets_new_ones(processor, batch, tmp_path, options):
    """Copies of the weights of the checkpoint, not of initial weights."""
    base = small_model(processor, connector=options.get("connector", "id_former"))
    base.save_pretrained(tmp_path)
    config = IDAVLMConfig.from_pretrained(tmp_path, inner_adaptors=options["inner_adaptors"])
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path, config=config).eval()
    added = small_model(processor, **options)
    for workflow in ("multimodal", "grounding", "text"):
        assert torch.equal(logits(loaded, batch, workflow=workflow), logits(added, batch, workflow=workflow))


def test_generation_with_images(processor, root):
    model = disturb(small_model(processor, inner_adaptors=ADAPTORS))
    encoded = [processor.encode(sample(root, answer=False), add_generation_prompt=True)]
    prompts = {k: v for k, v in processor.collate(encoded, padding_side="left").items() if k != "source"}
    answers = {}
    for workflow in ("multimodal", "grounding", "text"):
        answers[workflow] = model.generate(**prompts, workflow=workflow, **GREEDY)
        assert torch.equal(answers[workflow], model.generate(**prompts, workflow=workflow, use_cache=False, **GREEDY))
    assert torch.equal(answers["text"], small_model(processor).generate(**prompts, **GREEDY))
    assert model.generate(**prompts, workflow="grounding", num_beams=2, **GREEDY).shape[0] == 1


def test_adaptors_of_a_given_language_model_are_kept(processor, batch, tmp_path):
    donor = small_model(processor)
    add_inner_adaptors(donor.language_model, **ADAPTORS)
    model = IDAVLMForConditionalGeneration.from_parts(
        donor.vision_tower,
        donor.language_model,
        image_token_id=processor.image_token_id,
        num_queries=4,
        num_heads=2,
    )
    assert model.config.inner_adaptors["layers"] == [0, 1]
    disturb(model).save_pretrained(tmp_path)
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch, workflow="grounding"), logits(model.eval(), batch, workflow="grounding"))


def test_errors(processor, batch):
    with pytest.raises(ValueError, match=r"workflow='text', but IDAVLM.* has no inner adaptors; call add_inner"):
        small_model(processor)(**batch, workflow="text")
    with pytest.raises(ValueError, match=r"workflow='ground' is not known; choose one of 'multimodal'"):
        small_model(processor, inner_adaptors=ADAPTORS)(**batch, workflow="ground")
    with pytest.raises(ValueError, match="modules_to_copy holds 'connector', but all workflows share"):
        small_model(processor, inner_adaptors=COPYING)
    with pytest.raises(ValueError, match=r"layers=\[7\]: 7 does not exist; .* 2 layers of LlamaModel, 0 to 1"):
        small_model(processor, inner_adaptors={"layers": [7]})


def arguments(tmp_path, **options) -> IDTrainingArguments:
    common = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
    return IDTrainingArguments(str(tmp_path), save_strategy="no", logging_steps=1, **common, **options)


def changed(before: dict, model) -> set[str]:
    """Parts in which a tensor has changed."""
    parts = set()
    for name, tensor in model.state_dict().items():
        if not torch.equal(before[name], tensor):
            parts.add(name.split("layers")[0] if "inner_adaptor" in name else name.split(".")[0])
    return parts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"workflow": "text", "freeze": ["vision_tower"]}, {"id_former"}),
        (
            {"workflow": "multimodal", "freeze": ["vision_tower", "id_former", "language_model"]},
            {"language_model.inner_adaptor.multimodal."},
        ),
        (
            {"workflow": "grounding", "freeze": ["vision_tower"], "module_learning_rates": {"inner_adaptor": 1e-3}},
            {"id_former", "language_model.inner_adaptor.grounding."},
        ),
    ],
)
def test_stages_of_training(processor, root, tmp_path, options, expected):
    model = small_model(processor, inner_adaptors=ADAPTORS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    workflows = []
    data = [processor.encode(sample(root, number=number)) for number in range(4)]
    trainer = IDTrainer(
        model,
        arguments(tmp_path, **options),
        train_dataset=data,
        data_collator=processor.collate,
        task_evaluation=lambda model: {
            "active": float(workflows.append(model.language_model.inner_adaptor.active) or 0)
        },
    )
    trainer.train()
    assert changed(before, model) == expected
    trainer.evaluate()
    assert workflows == [options["workflow"]]
    if "module_learning_rates" in options:
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-2, 1e-3}


def test_training_a_workflow_needs_adaptors(processor, tmp_path):
    with pytest.raises(ValueError, match=r"workflow='grounding', but IDAVLM.* has no inner adaptors"):
        IDTrainer(small_model(processor), arguments(tmp_path, workflow="grounding"))
    with pytest.raises(ValueError, match="workflow='sight' is not known; choose one of 'multimodal'"):
        IDTrainer(small_model(processor, inner_adaptors=ADAPTORS), arguments(tmp_path, workflow="sight"))
