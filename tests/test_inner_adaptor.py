"""Inner adaptors: the base model is unchanged; adaptors compute, use caches, train, save and load as documented."""

import copy
import hashlib

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from idavlm import add_inner_adaptors, build_connector, load_adaptors, save_adaptors
from idavlm._compat import cache_name
from idavlm.modules.inner_adaptor import takes_workflow, train_workflow, use_workflow
from tests.inner_adaptor_models import FAMILIES, adapted, disturb, language_model, prompt

GREEDY = {"max_new_tokens": 8, "do_sample": False}
CACHE = cache_name()


def hashed(model: nn.Module) -> dict[str, str]:
    """Hashes of the tensors of the base model, by name."""
    return {
        name: hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
        if not name.startswith("inner_adaptor.")
    }


def train(model: nn.Module, workflow: str, steps: int = 3) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with use_workflow(model, workflow):
            loss = model(input_ids=prompt(), labels=prompt()).loss
        loss.backward()
        optimizer.step()
    model.eval()


def logits(model: nn.Module, workflow: str, **inputs) -> torch.Tensor:
    with torch.no_grad(), use_workflow(model, workflow):
        return model(**({"input_ids": prompt()} | inputs)).logits


def generate(model: nn.Module, workflow: str, *args, **options) -> torch.Tensor:
    with use_workflow(model, workflow):
        return model.generate(*args, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_workflow_is_the_base_bit_for_bit_before_and_after_training(family, dtype):
    base = language_model(family).to(dtype)
    keys, hashes = list(base.state_dict()), hashed(base)
    expected, tokens = logits_of_base(base), base.generate(prompt(), **GREEDY)
    beams = base.generate(prompt(), num_beams=2, **GREEDY)
    model = add_inner_adaptors(copy.deepcopy(base), every=2, modules_to_copy=("embeddings", "norm", "lm_head"))
    for _ in range(2):
        assert torch.equal(logits(model, "text"), expected)
        assert torch.equal(generate(model, "text", prompt(), **GREEDY), tokens)
        assert torch.equal(generate(model, "text", prompt(), num_beams=2, **GREEDY), beams)
        assert [name for name in model.state_dict() if not name.startswith("inner_adaptor.")] == keys
        assert hashed(model) == hashes
        untrained = logits(model, "multimodal")
        train(model, "multimodal")
    assert not torch.equal(logits(model, "multimodal"), untrained)


def logits_of_base(base: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return base(input_ids=prompt()).logits


def test_only_adaptors_are_trained_and_each_workflow_alone():
    model = adapted()
    assert all(p.requires_grad is name.startswith("inner_adaptor.") for name, p in model.named_parameters())
    grounding = logits(model, "grounding")
    train(model, "multimodal")
    assert torch.equal(logits(model, "grounding"), grounding)
    train_workflow(model, "grounding")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.startswith("inner_adaptor.grounding.") for name in trained)


def test_first_workflow_is_the_default_and_a_context_restores_the_previous_one():
    model = adapted()
    multimodal, grounding, text = (logits(model, name) for name in ("multimodal", "grounding", "text"))
    assert not torch.equal(multimodal, grounding)
    assert not torch.equal(multimodal, text)
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompt()).logits, multimodal)
        with model.inner_adaptor.workflow("grounding"):
            assert torch.equal(model(input_ids=prompt()).logits, grounding)
            with use_workflow(model, "text"):
                assert torch.equal(model(input_ids=prompt()).logits, text)
            assert torch.equal(model(input_ids=prompt()).logits, grounding)
        with pytest.raises(RuntimeError, match="stop"), use_workflow(model, "text"):
            raise RuntimeError("stop")
        assert torch.equal(model(input_ids=prompt()).logits, multimodal)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("composition", ["serial", "parallel"])
def test_every_cache_computes_what_no_cache_computes(family, composition):
    """Prompts are longer than sliding windows."""
    model = adapted(family, composition=composition)
    expected = model.generate(prompt(), use_cache=False, **GREEDY)
    assert not torch.equal(logits(model, "multimodal"), logits(model, "text"))
    caches = [DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=32)]
    for cache in caches:
        assert torch.equal(model.generate(prompt(), **{CACHE: cache}, **GREEDY), expected)
        assert len(cache) == 6, "four base layers and two adaptors"
    for name in ("dynamic", "static"):
        options = {"cache_implementation": name, "disable_compile": True}
        assert torch.equal(model.generate(prompt(), **options, **GREEDY), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from CUDA only")
@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_offloaded_caches(name):
    model = adapted().cuda()
    expected = model.generate(prompt().cuda(), use_cache=False, **GREEDY)
    options = {"cache_implementation": name, "disable_compile": True}
    assert torch.equal(model.generate(prompt().cuda(), **options, **GREEDY), expected)


def test_layers_are_fetched_before_they_are_used():
    """What an offloading cache needs, without a GPU: the adaptor's cache layer is fetched before it is updated."""
    model, cache, fetched = adapted(), DynamicCache(), []

    class Layer(cache.layer_class_to_replicate):
        def prefetch(self):
            fetched.append(self)

    cache.layer_class_to_replicate = Layer
    logits(model, "multimodal", **{CACHE: cache})
    assert fetched == []
    cache.offloading, cache.update = True, lambda k, v, index, *_, **__: cache.layers[index].update(k, v)
    logits(model, "multimodal", **{CACHE: cache})
    assert fetched == cache.layers[4:]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_left_padding_and_beams(family):
    model = adapted(family)
    long, short = prompt(1, 10), prompt(1, 6)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)])
    mask = (batch != 0).long()
    tokens = generate(model, "grounding", batch, attention_mask=mask, **GREEDY)
    for row, alone in enumerate((long, short)):
        expected = generate(model, "grounding", alone, **GREEDY)[0, -8:]
        assert torch.equal(tokens[row, -8:], expected)
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, **GREEDY}
    assert torch.equal(model.generate(batch, **options), model.generate(batch, use_cache=False, **options))


def test_a_conversation_changes_its_workflow():
    """With one cache per workflow, each turn computes what a pass over the whole conversation computes."""
    model, caches = adapted(), {}
    conversation = prompt(1, 6)
    for turn, workflow in enumerate(["multimodal", "grounding", "text", "multimodal", "text"]):
        cache = caches.setdefault(workflow, DynamicCache(config=model.config))
        answer = generate(model, workflow, conversation, **{CACHE: cache}, **GREEDY)
        assert torch.equal(answer, generate(model, workflow, conversation, use_cache=False, **GREEDY))
        conversation = torch.cat([answer, prompt(1, 3 + turn)], 1)
    with pytest.raises(ValueError, match=r"holds \d+ tokens of workflow 'multimodal'.*'grounding'"):
        generate(model, "grounding", conversation, **{CACHE: caches["multimodal"]}, **GREEDY)
    with pytest.raises(ValueError, match=r"of workflow 'text', but the active.*'multimodal'.*one cache per workflow"):
        model(prompt(1, 1), **{CACHE: caches["text"]})
    static = StaticCache(model.config, max_cache_len=32)
    for workflow in ("grounding", "text", "multimodal"):
        logits(model, workflow, **{CACHE: static})
        logits(model, workflow, **{CACHE: static}, input_ids=prompt(2, 1))
        static.reset()


@pytest.mark.parametrize("composition", ["serial", "parallel"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(composition, use_reentrant):
    """Also when another workflow is active in the backward pass."""
    model = adapted(composition=composition).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    losses = []
    for each in (model, checkpointed):
        with use_workflow(each, "grounding"):
            losses.append(each(input_ids=prompt(), labels=prompt()).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    pairs = zip(model.named_parameters(), checkpointed.named_parameters(), strict=True)
    for (name, expected), (_, parameter) in pairs:
        assert (parameter.grad is not None) is name.startswith("inner_adaptor.grounding."), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


def test_parallel_adaptors_start_as_the_base_and_are_added_by_their_gate():
    base = language_model()
    model = add_inner_adaptors(copy.deepcopy(base), layers=[0, 3], composition="parallel")
    assert torch.equal(logits(model, "multimodal"), logits_of_base(base))
    with torch.no_grad():
        for layer in model.inner_adaptor["multimodal"]["layers"]:
            layer.gate.fill_(0.5)
    for index in (0, 3):  # adaptors are still copies: output + (output - input) / 2
        base.model.layers[index].register_forward_hook(lambda _, args, output: 1.5 * output - 0.5 * args[0])
    torch.testing.assert_close(logits(model, "multimodal"), logits_of_base(base))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_low_rank_adaptors_are_a_difference_of_weights(family):
    model = adapted(family, rank=2)
    whole = add_inner_adaptors(language_model(family), layers=[1, 2])
    assert model.inner_adaptor.tensor_names.isdisjoint({"multimodal.layers.0.mlp.down_proj.weight"})
    assert sum(map(torch.numel, model.inner_adaptor.parameters())) < 0.4 * sum(
        map(torch.numel, whole.inner_adaptor.parameters())
    )
    state = model.inner_adaptor.state_dict()
    with torch.no_grad():
        for name, parameter in whole.inner_adaptor.named_parameters():
            low = name.removesuffix(".weight")
            if f"{low}.up.weight" in state:
                parameter += state[f"{low}.up.weight"] @ state[f"{low}.down.weight"]
            else:
                parameter.copy_(state[name])
    torch.testing.assert_close(logits(model, "grounding"), logits(whole, "grounding"), atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(prompt(), **GREEDY), model.generate(prompt(), use_cache=False, **GREEDY))


def test_copied_modules_compute_in_their_workflow_only():
    connector = build_connector("linear", vision_hidden_size=12, hidden_size=32)
    copied = ("embeddings", "norm", "lm_head", "connector")
    model = adapted("gemma3_text", modules_to_copy=copied, connector=connector)
    features = torch.randn(2, 3, 12)
    outputs = {}
    for workflow in ("multimodal", "grounding", "text"):
        with use_workflow(model, workflow), torch.no_grad():
            outputs[workflow] = (model.get_input_embeddings()(prompt()), connector(features))
    for pair in (("multimodal", "grounding"), ("grounding", "text")):
        assert not any(torch.equal(a, b) for a, b in zip(*(outputs[workflow] for workflow in pair), strict=True))
    shapes = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    logits(model, "grounding")
    hook.remove()
    assert shapes == [(2, 10, 32)], "hooks of the base head get the inputs of the workflow's copy"
    assert torch.equal(outputs["text"][1], nn.functional.linear(features, connector.weight, connector.bias))


def test_peft_on_top():
    from peft import LoraConfig, get_peft_model

    model = adapted()
    expected = logits(model, "grounding")
    tuned = get_peft_model(model, LoraConfig(target_modules=r".*inner_adaptor\.grounding.*\.(q|v)_proj"))
    torch.testing.assert_close(logits(tuned, "grounding"), expected)
    train(tuned, "grounding")
    assert not torch.equal(logits(tuned, "grounding"), expected)
    assert torch.equal(logits(tuned, "text"), logits_of_base(language_model()))
    expected = logits(tuned, "grounding")
    assert generate(tuned, "grounding", input_ids=prompt(), **GREEDY).shape == (2, 18)
    with pytest.raises(ValueError, match=r"have other tensors than when they were added.*merge"):
        save_adaptors(tuned, "nowhere")
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits(merged, "grounding"), expected, atol=1e-4, rtol=1e-4)


def test_peft_on_the_base_leaves_the_adaptors_alone():
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(adapted(), LoraConfig(target_modules=r"model\.layers\..*\.(q|v)_proj"))
    train(tuned, "multimodal")
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert not any("inner_adaptor" in name for name in trained)


def test_compiled_in_every_workflow():
    model = adapted(layers=[0], modules_to_copy=("norm",), options={"num_hidden_layers": 2})
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for workflow in ("multimodal", "text", "multimodal"):
        whole = {"use_cache": False}
        torch.testing.assert_close(logits(compiled, workflow, **whole), logits(model, workflow, **whole))
    caches = [StaticCache(model.config, max_cache_len=16) for _ in range(2)]
    for cache in caches:  # the prompt is not compiled, single tokens are, as in transformers
        logits(model, "grounding", **{CACHE: cache})
    for _ in range(2):
        token = {"input_ids": prompt(2, 1)}
        step = logits(compiled, "grounding", **{CACHE: caches[0]}, **token)
        torch.testing.assert_close(step, logits(model, "grounding", **{CACHE: caches[1]}, **token))


def test_selecting_a_workflow_compiles_nothing_again():
    class Doubled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.language_model = adapted()

        @takes_workflow
        def forward(self, x):
            return 2 * x

    torch._dynamo.reset()
    compiled = torch.compile(Doubled(), backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for workflow in (None, "multimodal", "grounding", "text"):
            for length in (2, 3, 4):
                torch.testing.assert_close(compiled(torch.ones(length), workflow=workflow), torch.full((length,), 2.0))


@pytest.mark.parametrize("captured_before", [False, True])
def test_hidden_states_are_those_that_the_next_layer_reads(captured_before):
    """transformers captures them in hooks, which it registers when they are first requested."""
    base = language_model()
    if captured_before:
        base(input_ids=prompt(), output_hidden_states=True)
    model, states = add_inner_adaptors(base, layers=[1, 2]), {}
    disturb(model)
    for workflow in ("multimodal", "text"):
        with torch.no_grad(), use_workflow(model, workflow):
            states[workflow] = model(input_ids=prompt(), output_hidden_states=True).hidden_states
    assert len(states["multimodal"]) == len(states["text"]) == 1 + 4
    pairs = zip(states["multimodal"], states["text"], strict=True)
    assert [torch.equal(*pair) for pair in pairs] == [True] * 2 + [False] * 3


@pytest.mark.parametrize(
    "options", [{}, {"rank": 2, "composition": "parallel"}, {"modules_to_copy": ("norm", "lm_head")}]
)
def test_saved_and_loaded_onto_the_base(tmp_path, options):
    model = adapted(**options)
    file = save_adaptors(model, tmp_path)
    assert file.stat().st_size < sum(tensor.nbytes for tensor in model.inner_adaptor.state_dict().values()) + 12_000
    loaded = load_adaptors(language_model(), tmp_path)
    for workflow in ("multimodal", "grounding", "text"):
        assert torch.equal(logits(loaded, workflow), logits(model, workflow))
    disturb(loaded)
    assert torch.equal(logits(load_adaptors(loaded, tmp_path), "grounding"), logits(model, "grounding"))
    half = load_adaptors(language_model().to(torch.bfloat16), tmp_path)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    save_adaptors(model, tmp_path / "given", state_dict=model.state_dict())
    assert (tmp_path / "given" / file.name).read_bytes() == file.read_bytes()


def test_saved_with_a_connector(tmp_path):
    connectors = [build_connector("linear", vision_hidden_size=12, hidden_size=32) for _ in range(2)]
    model = adapted(modules_to_copy=("connector",), connector=connectors[0])
    save_adaptors(model, tmp_path)
    load_adaptors(language_model(), tmp_path, connector=connectors[1])
    features = torch.randn(1, 2, 12)
    assert torch.equal(*(connector(features) for connector in connectors))


def test_deep_copies_are_independent():
    model = adapted(modules_to_copy=("norm",))
    duplicate = copy.deepcopy(model)
    disturb(duplicate)
    with use_workflow(duplicate, "text"):
        assert not torch.equal(logits(model, "grounding"), logits(duplicate, "grounding"))
        assert model.inner_adaptor.active == "multimodal"
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(model, type(language_model()))
