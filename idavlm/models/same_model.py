"""Facts that identify a model whatever its precision: what was made for one model is not loaded into another."""

from pathlib import Path
from typing import Any

import torch

from idavlm.utils.sharding import is_partitioned, whole_tensor


def model_probe(model) -> dict[str, Any]:
    """Return the kind of a transformers model, the width of its language model, and some of its embeddings.

    If parameters are partitioned, all processes must call this function.
    """
    embeddings = model.get_input_embeddings().weight
    if is_partitioned(embeddings):
        embeddings = whole_tensor(embeddings)
    rows = torch.linspace(0, len(embeddings) - 1, 8).long()
    return {
        "model_type": model.config.model_type,
        "token_size": model.config.get_text_config().hidden_size,
        "embeddings": embeddings.detach()[rows.to(embeddings.device), :4].float().cpu().flatten().tolist(),
    }


def check_same_model(expected: dict[str, Any], found: dict[str, Any], source: str | Path) -> None:
    """Raise ValueError if two probes are not of the same model. Embeddings may differ by their precision."""
    for name in ("model_type", "token_size"):
        if expected[name] != found[name]:
            raise ValueError(
                f"{source} belongs to a model with {name}={expected[name]!r}, but this model has {found[name]!r}; use "
                "it with the model that it was made with."
            )
    before, now = torch.tensor(expected["embeddings"]), torch.tensor(found["embeddings"])
    if before.shape != now.shape or not torch.allclose(before, now, rtol=0.02, atol=1e-4):
        raise ValueError(
            f"{source} belongs to another {found['model_type']} model: the embeddings differ. Use it with the model "
            "that it was made with."
        )
