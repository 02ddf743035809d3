"""Tiny random language models of several families, with and without inner adaptors."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from idavlm import add_inner_adaptors

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {"sliding_window": None},
    "smollm3": {"no_rope_layer_interval": 2},
}


def language_model(family: str = "llama", **options) -> PreTrainedModel:
    """A model of four layers of width 32, with weights large enough that each layer changes the output."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(
        family, **{**sizes, **tokens, "initializer_range": 0.2, **FAMILIES[family], **options}
    )
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(family: str = "llama", *, options: dict | None = None, **adaptors) -> PreTrainedModel:
    """The same model with adaptors after layers 1 and 2 that differ from the layers they were copied from."""
    choice = {} if "every" in adaptors else {"layers": [1, 2]}
    model = add_inner_adaptors(language_model(family, **(options or {})), **{**choice, **adaptors})
    disturb(model)
    return model


@torch.no_grad()
def disturb(model: PreTrainedModel) -> None:
    """Add noise to all parameters of the adaptors."""
    torch.manual_seed(1)
    for parameter in model.inner_adaptor.parameters():
        parameter += 0.1 * torch.randn_like(parameter)


def prompt(rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(2))
