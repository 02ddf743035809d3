"""How well a language model still reads text."""

import math
import pydoc_data.topics

import torch
from torch import nn

from idavlm.utils import check_positive


@torch.no_grad()
def text_perplexity(language_model: nn.Module, tokenizer, *, num_windows: int = 64, length: int = 256) -> float:
    """Perplexity of a causal language model on text that every machine has: the language reference in ``pydoc_data``.

    The text comes with Python and differs a little between its versions, so compare numbers of one. It is read in
    windows that know nothing of each other, from its beginning.

    Args:
        language_model: a transformers causal language model; in evaluation mode meanwhile.
        tokenizer: its tokenizer.
        num_windows: how many windows.
        length: tokens of a window.

    Raises:
        ValueError: the text is shorter than that.
    """
    check_positive(num_windows=num_windows, length=length)
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 10 * num_windows * length]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], device=language_model.device)
    if len(ids) < num_windows * length:
        raise ValueError(
            f"num_windows={num_windows} of length={length} are more than the {len(ids)} tokens of the text; take fewer."
        )
    was_training = language_model.training
    language_model.eval()
    windows = ids[: num_windows * length].view(num_windows, length)
    losses = [language_model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    language_model.train(was_training)
    return math.exp(sum(losses) / num_windows)
