"""What the model returns."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from idavlm._compat import cache_name

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
        identity_map_loss: see :meth:`idavlm.IDFormer.identity_map_loss`, where boxes were given.
        contrastive_loss: see :meth:`idavlm.IDFormer.contrastive_loss`, where boxes were given and its weight is not 0.
        auxiliary_loss: the two last, by their weights; where boxes were given.
        image_hidden_states: ``[I, Q, C]`` image tokens.
        identity_maps: maps of the ID-Former, one ``[I, P, G + 1]`` a layer, where asked for or boxes were given.
    """

    language_loss: Tensor | None = None
    identity_map_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    image_hidden_states: Tensor | None = None
    identity_maps: tuple[Tensor, ...] | None = None
