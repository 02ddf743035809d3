"""Workarounds for versions of transformers.

The cache is accepted by every name of the installed version (``cache`` from 5.24 on) and by position.
"""

import inspect

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache, StaticCache

from idavlm import _compat
from idavlm._compat import auto_image_processor, cache_in, cache_name, empty_cache_layer_like, takes_cache
from idavlm.modules.inner_adaptor import use_workflow
from tests.inner_adaptor_models import adapted, prompt
from tests.small_models import sample, small_model

NAMES = sorted({cache_name(), "past_key_values"})
GREEDY = {"max_new_tokens": 5, "do_sample": False}
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def arguments(place: str, cache: DynamicCache) -> tuple[tuple, dict]:
    """Positional and keyword arguments after ``input_ids``."""
    return ((None, None, cache), {}) if place == "fourth" else ((), {place: cache})


@pytest.mark.parametrize("place", [*NAMES, "fourth"])
@torch.no_grad()
def test_the_model_continues_from_a_cache(processor, place):
    model, ids, cache = small_model(processor, inner_adaptors={"layers": [1]}), prompt(2, 8), DynamicCache()
    args, kwargs = arguments(place, cache)
    first = model(ids[:, :5], *args, **kwargs)
    assert first[cache_name()] is getattr(first, cache_name()) is cache
    continued = model(ids[:, 5:], *args, **kwargs).logits
    torch.testing.assert_close(torch.cat([first.logits, continued], 1), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_continues_from_its_cache(processor, root, name):
    """Images are in the cache and are not encoded again."""
    model, cache, calls = small_model(processor), DynamicCache(), []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    encoded = [processor.encode(sample(root, answer=False), add_generation_prompt=True)]
    batch = {key: value for key, value in processor.collate(encoded).items() if key not in ("source", "attention_mask")}
    for _ in range(2):
        answer = model.generate(**batch, **{name: cache}, **GREEDY)
        assert torch.equal(answer, model.generate(**batch, use_cache=False, **GREEDY))
        batch["input_ids"] = torch.cat([answer, prompt(1, 3)], 1)
        added = batch["input_ids"].shape[1] - batch["token_identity_index"].shape[1]
        batch["token_identity_index"] = pad(batch["token_identity_index"], (0, added), value=-1)
        batch["name_mask"] = pad(batch["name_mask"], (0, added))
    assert len(calls) == 1 + 2 * GREEDY["max_new_tokens"]


@pytest.mark.parametrize("place", [*NAMES, "fourth"])
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_a_cache_of_another_workflow_is_refused(processor, place, whole):
    model = small_model(processor, inner_adaptors={"layers": [1]}) if whole else adapted()
    args, kwargs = arguments(place, DynamicCache())
    with use_workflow(model, "grounding"):
        model(prompt(), *args, **kwargs)
        model(prompt(2, 1), *args, **kwargs)
    with pytest.raises(ValueError, match=r"cache holds 11 tokens of workflow 'grounding'.*'multimodal'"):
        model(prompt(2, 1), *args, **kwargs)
    if kwargs:
        message = r"cache holds 11 tokens of workflow 'grounding'.*'text'"
        with use_workflow(model, "text"), pytest.raises(ValueError, match=message):
            model.generate(prompt(2, 12), **kwargs, **GREEDY)


def test_the_new_name_counts_if_both_are_passed():
    new, old = DynamicCache(), DynamicCache()
    assert cache_in((), {"past_key_values": old, "cache": new}) is new
    assert cache_in((), {"past_key_values": old, "cache": None}) is old
    assert cache_in((torch.ones(1), None, new), {"past_key_values": None}) is new
    assert cache_in((torch.ones(1),), {}) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_methods_accept_the_names_that_transformers_accepts(monkeypatch, name):
    monkeypatch.setattr(_compat, "cache_name", lambda: name)

    @takes_cache
    def forward(ids, cache=None):
        return ids, cache

    assert list(inspect.signature(forward).parameters) == ["ids", name]
    assert forward(1, 2) == forward(1, **{name: 2}) == (1, 2)
    if name == "cache":
        with pytest.warns(FutureWarning, match="Use `cache` instead"):
            assert forward(1, past_key_values=2) == (1, 2)


def test_image_processors_load_without_torchvision(processor, tmp_path):
    processor.image_processor.save_pretrained(tmp_path)
    loaded = auto_image_processor().from_pretrained(tmp_path)
    assert loaded.size == processor.image_processor.size


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_an_empty_cache_layer_has_the_sizes_of_another(processor, kind):
    config = small_model(processor).language_model.config
    cache = kind(config=config) if kind is DynamicCache else kind(config=config, max_cache_len=7)
    layer = cache.layers[0]
    layer.update(*torch.ones(2, 1, config.num_key_value_heads, 3, 16).unbind())
    empty = empty_cache_layer_like(layer)
    assert type(empty) is type(layer)
    assert empty.get_seq_length() == 0 < layer.get_seq_length()
    assert getattr(empty, "max_cache_len", None) == getattr(layer, "max_cache_len", None)


def test_a_cache_layer_with_an_unknown_argument_is_refused():
    class Layer:
        def __init__(self, size):
            pass

    with pytest.raises(ValueError, match=r"class Layer, whose argument 'size' cannot be read"):
        empty_cache_layer_like(Layer(3))
