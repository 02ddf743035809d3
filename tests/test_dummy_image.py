"""Every forward and backward pass runs the same modules in the same order, whatever the batch holds.

ZeRO-3 gathers the parameters of a module when it runs. The tests pretend that there are two processes.
"""

import contextlib

import pytest
import torch
from torch import nn

from idavlm.models import dummy_image
from idavlm.models.dummy_image import dummy_image_arguments
from idavlm.modules import use_workflow
from tests.distributed import cases
from tests.small_models import small_model, small_processor
from tests.vlm_families import FAMILIES, tiny_model

LETTERS = "IGTNR"
MODELS = [*cases.MODELS, "ID-Former, names", "low-rank adaptors", "attached, DeepStack", "attached, queries"]


@pytest.fixture
def _several_processes(monkeypatch):
    monkeypatch.setattr(dummy_image, "num_processes", lambda: 2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return cases.draw(tmp_path_factory.mktemp("images"))


class Mark(torch.autograd.Function):
    """Notes a module when the backward pass reaches one of its outputs, as DeepSpeed gathers its parameters there."""

    @staticmethod
    def forward(ctx, x, name, log):
        ctx.name, ctx.log = name, log
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.log.append(ctx.name)
        return gradient, None, None


def marked(value, name, log):
    """The output of a module with every tensor marked; in dictionaries, lists and tuples, as DeepSpeed finds them."""
    if isinstance(value, torch.Tensor):
        return Mark.apply(value, name, log) if value.requires_grad else value
    if isinstance(value, dict):
        for key in value:
            value[key] = marked(value[key], name, log)
        return value
    if isinstance(value, (list, tuple)):
        parts = [marked(part, name, log) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


class Order:
    """Notes the modules of forward and backward passes, in order. Its hooks come before those of transformers."""

    def __init__(self, model: nn.Module, workflow: str | None = None) -> None:
        self.model, self.workflow = model, workflow
        self.forward: list[str] = []
        self.backward: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.forward.append(name))
            module.register_forward_hook(lambda _, __, out, name=name: marked(out, name, self.backward))

    def step(self, batch: dict) -> torch.Tensor:
        """The loss of a batch, after its backward pass."""
        self.forward.clear()
        self.backward.clear()
        self.model.zero_grad()
        batch = {name: value for name, value in batch.items() if name not in ("source", "sample_ids")}
        with use_workflow(self.model, self.workflow) if self.workflow else contextlib.nullcontext():
            loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()


def batches(processor, images, letters: str = LETTERS) -> dict[str, dict]:
    return {letter: processor.collate(cases.samples(letter, processor, images)) for letter in letters}


@pytest.mark.usefixtures("_several_processes")
@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_modules_does_not_depend_on_the_batch(name, images):
    model, processor = cases.build(name, torch.float32)
    for module in cases.FREEZE.get(name, ()):
        model.get_submodule(module).requires_grad_(False)
    if name in cases.WORKFLOW:
        model.train_workflow(cases.WORKFLOW[name])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    order, orders = Order(model, cases.WORKFLOW.get(name)), {}
    for letter, batch in batches(processor, images).items():
        order.step(batch)
        has_gradient = [parameter.grad is not None for parameter in trained]
        orders[letter] = order.forward.copy(), order.backward.copy(), has_gradient
    assert "id_former" in orders["I"][0] or "connector" in orders["I"][0]
    for letter, (forward, backward, has_gradient) in orders.items():
        assert forward == orders["I"][0], letter
        assert backward == orders["I"][1], letter
        assert has_gradient == orders["I"][2], letter


@pytest.mark.usefixtures("_several_processes")
@pytest.mark.parametrize("name", cases.MODELS)
def test_prompts_without_images_run_the_same_modules(name, images):
    """In generation the first pass runs all modules, and later passes run the language model alone."""
    model, processor = cases.build(name, torch.float32)
    model.eval()
    order, orders = Order(model), []
    for letter in "ITGR":
        order.forward.clear()
        batch = cases.prompt(letter, processor, images)
        model.generate(**batch, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        orders.append(order.forward.copy())
    assert orders[1:] == orders[:1] * 3
    assert (
        sum(
            path == "vision_tower" or path.endswith((".vision_tower", ".visual", ".vision_model")) for path in orders[0]
        )
        == 1
    )


@pytest.mark.parametrize("name", cases.MODELS)
def test_a_dummy_image_changes_no_loss_and_its_gradients_are_zero(name, images, monkeypatch):
    model, processor = cases.build(name, torch.float32)
    order = Order(model, cases.WORKFLOW.get(name))
    for letter, batch in batches(processor, images, "TG").items():
        losses, gradients = [], []
        for processes in (1, 2):
            monkeypatch.setattr(dummy_image, "num_processes", lambda processes=processes: processes)
            losses.append(order.step(batch))
            gradients.append({path: parameter.grad for path, parameter in model.named_parameters()})
        assert torch.equal(*losses), letter
        for path, gradient in gradients[1].items():
            expected = gradients[0][path]
            if gradient is not None:
                assert torch.equal(gradient, torch.zeros_like(gradient) if expected is None else expected), path
            elif expected is not None:
                assert "attached" in name, path  # in one process a whole model of transformers is left as it is


@pytest.mark.usefixtures("_several_processes")
def test_a_dummy_image_does_not_change_the_statistics_of_batch_norms(images):
    processor = small_processor()
    model = small_model(processor, tower="resnet").train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    Order(model).step(batches(processor, images, "T")["T"])
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.vision_tower.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_dummy_image(family):
    model = tiny_model(family)
    method = model.base_model.get_image_features
    with torch.no_grad():
        output = method(**dummy_image_arguments(model.config, method, torch.device("cpu")), return_dict=True)
    tokens = output.pooler_output
    assert sum(part[..., 0].numel() for part in tokens) > 0
