"""A whole model, with and without inner adaptors, is pickled, copied, saved by torch, printed and sharded."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.small_models import sample, small_model

OPTIONS = {
    "ID-Former": {"identity_embedding": "learned", "max_identities": 2},
    "resampler": {"connector": "resampler"},
    "inner adaptors": {"inner_adaptors": {"every": 1}},
}


@pytest.fixture(params=OPTIONS)
def model(processor, request):
    return small_model(processor, **OPTIONS[request.param])


@pytest.fixture
def batch(processor, root):
    return {name: x for name, x in processor.collate([processor.encode(sample(root))]).items() if name != "source"}


@pytest.fixture
def one_process(tmp_path):
    """A process group of one process on the CPU."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy, through_torch],
    ids=["pickle", "deepcopy", "torch.save"],
)
def test_a_copy_computes_the_same_and_is_independent(model, batch, duplicate):
    expected = model(**batch)
    copied = duplicate(model)
    assert type(copied) is type(model)
    assert torch.equal(copied(**batch).logits, expected.logits)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(0.1)
    assert torch.equal(model(**batch).logits, expected.logits)
    assert not torch.equal(copied(**batch).logits, expected.logits)


def test_print_shows_the_parts(model):
    text = repr(model)
    assert "(vision_tower): ResNetModel" in text
    assert "LlamaDecoderLayer" in text
    assert ("(identity_layers)" in text) == (model.id_former is not None)
    assert ("InnerAdaptor" in text) == (model.config.inner_adaptors is not None)


def decoder_layers(model):
    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


@pytest.mark.usefixtures("one_process")
def test_fully_shard_by_layer_class(model, batch):
    expected = model(**batch)
    num_layers = 6 if model.config.inner_adaptors else 2  # two layers, and an adaptor after each in two workflows
    assert len(decoder_layers(model)) == num_layers
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, expected.loss)
    outputs.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert gradients
    assert all(gradient.full_tensor().isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("one_process")
def test_fsdp1_auto_wrap_by_layer_class(model, batch):
    expected = model(**batch).loss
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    num_layers = len(decoder_layers(model))
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    units = [module for module in sharded.modules() if isinstance(module, FullyShardedDataParallel)]
    assert len(units) == 1 + num_layers
    torch.testing.assert_close(sharded(**batch).loss, expected)
