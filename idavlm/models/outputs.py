"""What the model returns."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from idavlm.utils import cache_name

CACHE = cache_name()


@dataclass
class IDAVLMOutput(CausalLMOutputWithPast):
    """What :class:`IDAVLMForConditionalGeneration` returns.

    Attributes:
        loss: ``language_loss + auxiliary_loss``, where labels were given.
        logits: ``[B, T, vocabulary]``; none in training mode where labels were given.
        cache: the language model's cache; ``past_key_values`` before transformers 5.24.
        hidden_states: of the language model, where asked for.
        attentions: of the language model, where asked for.
        language_loss: mean next-token cross-entropy over labelled tokens.
        identity_loss: see :meth:`idavlm.IDFormer.identity_loss`, where boxes were given.
        contrast_loss: see :meth:`idavlm.IDFormer.contrast_loss`, where boxes were given and its weight is not 0.
        auxiliary_loss: the two last, by their weights; where boxes were given.
        image_hidden_states: ``[I, Q, C]`` image tokens.
        identity_attentions: maps of the ID-Former, one ``[I, P, G + 1]`` a layer, where asked for or boxes were given.
    """

    language_loss: Tensor | None = None
    identity_loss: Tensor | None = None
    contrast_loss: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    image_hidden_states: Tensor | None = None
    identity_attentions: tuple[Tensor, ...] | None = None
