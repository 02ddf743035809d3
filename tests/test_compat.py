"""The cache by every name the installed transformers takes it by (``cache`` from 5.24 on), and by its place."""

import inspect

import pytest
import torch
from transformers import DynamicCache

from idavlm import _compat as cache_argument
from idavlm._compat import cache_in, cache_name, takes_cache
from tests.inner_adaptor_models import adapted, prompt
from tests.small_models import sample, small_model

NAMES = sorted({cache_name(), "past_key_values"})
GREEDY = {"max_new_tokens": 5, "do_sample": False}
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def given(way: str, cache: DynamicCache) -> tuple[tuple, dict]:
    """Positional and keyword arguments behind ``input_ids``."""
    return ((None, None, cache), {}) if way == "fourth" else ((), {way: cache})


@pytest.mark.parametrize("way", [*NAMES, "fourth"])
@torch.no_grad()
def test_the_model_reads_on_from_a_cache(processor, way):
    model, ids, cache = small_model(processor, inner_adaptors={"layers": [1]}), prompt(2, 8), DynamicCache()
    args, kwargs = given(way, cache)
    first = model(ids[:, :5], *args, **kwargs)
    assert first[cache_name()] is getattr(first, cache_name()) is cache
    read_on = model(ids[:, 5:], *args, **kwargs).logits
    torch.testing.assert_close(torch.cat([first.logits, read_on], 1), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_goes_on_from_its_cache(processor, root, name):
    """Pictures are in the cache and not read again."""
    model, cache, read = small_model(processor), DynamicCache(), []
    model.vision_tower.register_forward_hook(lambda *_: read.append(1))
    encoded = [processor.encode(sample(root, answer=False), add_generation_prompt=True)]
    batch = {key: value for key, value in processor.collate(encoded).items() if key not in ("source", "attention_mask")}
    for _ in range(2):
        answer = model.generate(**batch, **{name: cache}, **GREEDY)
        assert torch.equal(answer, model.generate(**batch, use_cache=False, **GREEDY))
        batch["input_ids"] = torch.cat([answer, prompt(1, 3)], 1)
    assert len(read) == 1 + 2 * GREEDY["max_new_tokens"]


@pytest.mark.parametrize("way", [*NAMES, "fourth"])
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_a_cache_of_another_workflow_is_refused(processor, way, whole):
    model = small_model(processor, inner_adaptors={"layers": [1]}) if whole else adapted()
    args, kwargs = given(way, DynamicCache())
    model(prompt(), *args, **kwargs, workflow="grounding")
    model(prompt(2, 1), *args, **kwargs, workflow="grounding")
    with pytest.raises(ValueError, match=r"cache holds 11 tokens read in workflow 'grounding'.*'multimodal'"):
        model(prompt(2, 1), *args, **kwargs)
    if kwargs:
        with pytest.raises(ValueError, match=r"cache holds 11 tokens read in workflow 'grounding'.*'text'"):
            model.generate(prompt(2, 12), **kwargs, workflow="text", **GREEDY)


def test_the_new_name_comes_first():
    new, old = DynamicCache(), DynamicCache()
    assert cache_in((), {"past_key_values": old, "cache": new}) is new
    assert cache_in((), {"past_key_values": old, "cache": None}) is old
    assert cache_in((torch.ones(1), None, new), {"past_key_values": None}) is new
    assert cache_in((torch.ones(1),), {}) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_methods_take_it_as_transformers_does(monkeypatch, name):
    monkeypatch.setattr(cache_argument, "cache_name", lambda: name)

    @takes_cache
    def forward(ids, cache=None):
        return ids, cache

    assert list(inspect.signature(forward).parameters) == ["ids", name]
    assert forward(1, 2) == forward(1, **{name: 2}) == (1, 2)
    if name == "cache":
        with pytest.warns(FutureWarning, match="Use `cache` instead"):
            assert forward(1, past_key_values=2) == (1, 2)
