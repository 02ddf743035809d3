"""In training logits exist where there is a label: the same loss and gradients, and nowhere else a logit."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from idavlm.models import IDAVLMForConditionalGeneration
from tests.small_models import sample, small_model, small_processor

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LANGUAGE_MODELS = {
    "llama": lambda n: small_model(small_processor()).language_model,
    # Caps its logits after the head.
    "gemma2": lambda n: Gemma2ForCausalLM(Gemma2Config(vocab_size=n, final_logit_softcapping=0.5, **SMALL)),
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
}


@pytest.fixture(params=LANGUAGE_MODELS)
def model(request, processor):
    return IDAVLMForConditionalGeneration.from_parts(
        small_model(processor).vision_tower,
        LANGUAGE_MODELS[request.param](len(processor.tokenizer)),
        image_token_id=processor.image_token_id,
        num_queries=4,
        num_heads=2,
    )


@pytest.fixture
def batch(processor, root):
    rows = [processor.encode(sample(root, people=people)) for people in (("Kate", "Tom"), ("Tom",))]
    return {name: value for name, value in processor.collate(rows).items() if name != "source"}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_same_loss_and_gradients(model, batch):
    model.vision_tower.requires_grad_(False)  # its batch statistics differ between the modes
    found = {}
    for training in (False, True):
        model.zero_grad()
        outputs = model.train(training)(**batch)
        outputs.loss.backward()
        found[training] = outputs, gradients(model)
    (whole, expected), (alone, actual) = found[False], found[True]
    assert whole.logits.shape[:2] == batch["labels"].shape
    assert alone.logits is None
    torch.testing.assert_close(alone.language_loss, whole.language_loss)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_head_reads_labelled_positions_alone(model, batch):
    shapes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, args, output: shapes.append(output.shape[:2]))
    model.train()(**batch)
    model(**{name: value for name, value in batch.items() if name != "labels"})
    hook.remove()
    assert shapes == [(1, (batch["labels"][:, 1:] != -100).sum()), batch["labels"].shape]


def test_the_head_is_left_as_it_was_after_an_error(model, batch):
    head = model.get_output_embeddings()
    with pytest.raises(AttributeError):
        model.train()(**batch | {"attention_mask": "none"})
    assert not head._forward_pre_hooks
