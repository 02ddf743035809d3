"""Perplexity of a language model on plain text, to measure forgetting."""

import math
import pydoc_data.topics

import torch
from torch import nn

from idavlm.evaluation.generation import evaluating
from idavlm.utils import check_positive


def text_perplexity(language_model: nn.Module, tokenizer, *, num_windows: int = 64, length: int = 256) -> float:
    """Perplexity of a causal language model on the Python language reference (``pydoc_data.topics``).

    The text is part of every Python installation, so no download is needed. It differs slightly between Python
    versions; compare values of one version only. The beginning of the text is split into independent windows.

    Args:
        language_model: a causal language model of transformers; set to evaluation mode during the call.
        tokenizer: its tokenizer.
        num_windows: number of windows.
        length: tokens per window.

    Raises:
        ValueError: the text has fewer than ``num_windows * length`` tokens, or a loss is NaN, infinite or so large that
            the perplexity is.
    """
    check_positive(num_windows=num_windows, length=length)
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 10 * num_windows * length]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], device=language_model.device)
    if len(ids) < num_windows * length:
        raise ValueError(
            f"num_windows={num_windows} of length={length} exceed the {len(ids)} tokens of the text; reduce one."
        )
    windows = ids[: num_windows * length].view(num_windows, 1, length)
    with evaluating(language_model):
        losses = [language_model(input_ids=window, labels=window).loss.item() for window in windows]
    mean = sum(losses) / num_windows
    if not mean < 700:
        raise ValueError(f"language_model has a mean loss of {mean} on plain text; check its weights and its dtype.")
    return math.exp(mean)
