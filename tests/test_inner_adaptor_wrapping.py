"""A model with inner adaptors pickles, deep-copies, prints its parts, and is wrapped by layer class like its base."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.hooks import RemovableHandle
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM
from transformers.trainer_pt_utils import get_module_class_from_name

from idavlm.modules.inner_adaptor import InnerAdaptor, train_workflow, use_workflow
from tests.inner_adaptor_models import adapted, disturb, language_model, prompt
from tests.small_models import sample, small_model

WORKFLOWS = ("multimodal", "grounding", "text")
# None: without inner adaptors.
OPTIONS = [
    None,
    {},
    {"composition": "parallel"},
    {"rank": 2},
    {"modules_to_copy": ("embeddings", "norm", "lm_head")},
]


def build(options: dict | None) -> nn.Module:
    return language_model() if options is None else adapted(**options)


def logits(model: nn.Module, workflow: str | None = None) -> torch.Tensor:
    with torch.no_grad():
        if workflow is None:
            return model(input_ids=prompt()).logits
        with use_workflow(model, workflow):
            return model(input_ids=prompt()).logits


def all_logits(model: nn.Module) -> list[torch.Tensor]:
    has_adaptors = any(isinstance(module, InnerAdaptor) for module in model.modules())
    return [logits(model, workflow) for workflow in (WORKFLOWS if has_adaptors else [None])]


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("duplicate", [pickled, saved, copy.deepcopy])
def test_a_copy_is_independent_and_computes_the_same(duplicate, options):
    model = build(options)
    expected = all_logits(model)
    copied = duplicate(model)
    assert list(copied.state_dict()) == list(model.state_dict())
    assert sum(map(torch.numel, copied.parameters())) == sum(map(torch.numel, model.parameters()))
    assert all(map(torch.equal, all_logits(copied), expected))
    # All of the copy's parameters change, and none of the original's.
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert all(map(torch.equal, all_logits(model), expected))
    assert not any(map(torch.equal, all_logits(copied), expected))
    if options is not None:
        with use_workflow(copied, "text"):
            assert model.inner_adaptor.active == "multimodal"
        assert all(map(torch.equal, all_logits(pickled(copied)), all_logits(copied)))


def test_a_copy_of_one_layer_contains_no_other_base_layer():
    model = adapted()
    size, layer = len(pickle.dumps(model.inner_adaptor)), model.model.layers[1]
    parameters = sum(parameter.nbytes for parameter in layer.parameters())
    assert len(pickle.dumps(layer)) < size + parameters + 10_000


def test_a_whole_vlm_and_its_connector(processor, root):
    copied_modules = ("embeddings", "norm", "lm_head", "connector")
    model = small_model(
        processor, connector="resampler", inner_adaptors={"every": 1, "modules_to_copy": copied_modules}
    )
    disturb(model.language_model)
    batch = processor.collate([processor.encode(sample(root))])
    batch = {name: value for name, value in batch.items() if name != "source"}
    for copied in (pickled(model), copy.deepcopy(model)):
        for workflow in WORKFLOWS:
            with torch.no_grad():
                outputs = [each(**batch, workflow=workflow).logits for each in (model, copied)]
            assert torch.equal(*outputs)
        disturb(copied.language_model)
        with torch.no_grad():
            outputs = [each(**batch, workflow="grounding").logits for each in (model, copied)]
        assert not torch.equal(*outputs)


def test_hooks_after_loading_in_a_new_process_do_not_replace_those_of_the_adaptors(monkeypatch):
    """torch numbers hooks from 0 in every process."""
    model = adapted(layers=[0, 1, 2, 3])
    data, expected = pickle.dumps(model), logits(model, "multimodal")
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    loaded = pickle.loads(data)
    calls = []
    for _ in range(10):
        for layer in loaded.model.layers:
            layer.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(logits(loaded, "multimodal"), expected)
    assert len(calls) == 40


def test_adaptors_are_printed_and_classes_stay():
    base = language_model()
    classes = {name: type(module) for name, module in base.named_modules()}
    model = adapted(modules_to_copy=("norm", "lm_head"))
    shown = repr(model)
    assert "(inner_adaptor): InnerAdaptor(" in shown
    assert "layers=[1, 2], composition='serial', rank=None, active='multimodal'" in shown
    for part in ("(multimodal): ModuleDict(", "(grounding): ModuleDict(", "(0-1): 2 x LlamaDecoderLayer("):
        assert part in shown
    assert {name: type(model.get_submodule(name)) for name in classes} == classes
    assert type(model) is LlamaForCausalLM
    assert {type(layer) for layer in model.inner_adaptor["multimodal"]["layers"]} == {LlamaDecoderLayer}


def losses_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Two forward passes in two workflows, then one backward pass in a third."""
    losses = []
    for workflow in ("multimodal", "grounding"):
        with use_workflow(model, workflow):
            losses.append(model(input_ids=prompt(), labels=prompt(), use_cache=False).loss)
    with use_workflow(model, "text"):
        sum(losses).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses).detach(), gradients


@pytest.mark.parametrize("options", OPTIONS[1:])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("by", ["transformers", "torch"])
def test_checkpointing_recomputes_in_the_workflow_of_the_forward_pass(by, use_reentrant, options):
    """torch's wrapper, as transformers before 5.23, recomputes a layer together with its hooks."""
    model = build(options).train()
    checkpointed = copy.deepcopy(model)
    if by == "transformers":
        checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    else:
        implementation = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
        apply_activation_checkpointing(
            checkpointed,
            checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=implementation),
            check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
        )
    checkpointed.enable_input_require_grads()
    expected_losses, expected = losses_and_gradients(model)
    losses, gradients = losses_and_gradients(checkpointed)
    assert torch.equal(losses, expected_losses)
    gradients = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients.items()}
    assert gradients.keys() == expected.keys()
    for name, grad in gradients.items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_recomputation_in_an_undefined_workflow_is_an_error():
    model = adapted().train()
    embeds = model.get_input_embeddings()(prompt()).detach().requires_grad_(True)
    output = torch.utils.checkpoint.checkpoint(
        lambda x: model(inputs_embeds=x, use_cache=False).logits, embeds, use_reentrant=True
    )
    with pytest.raises(RuntimeError, match=r"its workflow is undefined; checkpoint the decoder layers"):
        output.sum().backward()


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train_step(model: nn.Module, workflow: str | None) -> torch.Tensor:
    """One step; the logits after it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    if workflow is None:
        loss = model(input_ids=prompt(), labels=prompt()).loss
    else:
        with use_workflow(model, workflow):
            loss = model(input_ids=prompt(), labels=prompt()).loss
    loss.backward()
    optimizer.step()
    return logits(model, workflow)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_fully_shard_by_layer_class(options, checkpointing):
    model = build(options).train()
    if options is not None:
        train_workflow(model, "grounding")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    workflow = None if options is None else "grounding"
    expected = train_step(copy.deepcopy(model), workflow)
    layer_class = get_module_class_from_name(model, "LlamaDecoderLayer")
    layers = [module for module in model.modules() if isinstance(module, layer_class)]
    assert len(layers) == (4 if options is None else 4 + 2 * 2)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == len(layers) + 1
    torch.testing.assert_close(train_step(model, workflow), expected)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("options", OPTIONS)
def test_fsdp1_auto_wrap_by_layer_class(options):
    model = build(options).train()
    if options is not None:
        train_workflow(model, "grounding")
    workflow = None if options is None else "grounding"
    expected = train_step(copy.deepcopy(model), workflow)
    layer_class = get_module_class_from_name(model, "LlamaDecoderLayer")
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={layer_class})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    names = [name for name, module in wrapped.named_modules() if isinstance(module, FullyShardedDataParallel)]
    assert len(names) == 1 + (4 if options is None else 4 + 2 * 2)
    assert sum("inner_adaptor" in name for name in names) == (0 if options is None else 2 * 2)
    torch.testing.assert_close(train_step(wrapped, workflow), expected)
