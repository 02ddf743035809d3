"""Find the parts of a transformers decoder by what they are, not by whose they are."""

from dataclasses import dataclass

from torch import nn

_NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f")


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """What inner adaptors need of a language model.

    Attributes:
        name: class of the decoder, for messages.
        layers: its decoder layers.
        embeddings: token embeddings.
        norm: the norm behind the last layer, None where it has no usual name.
        lm_head: None where the model has no head.
    """

    name: str
    layers: nn.ModuleList
    embeddings: nn.Module
    norm: nn.Module | None
    lm_head: nn.Module | None


def find_decoder_parts(language_model: nn.Module) -> DecoderParts:
    """The parts of any transformers decoder.

    The layers are the one ``nn.ModuleList`` as long as the configuration's ``num_hidden_layers`` that lies nearest to
    the top.

    Raises:
        ValueError: no such list or several; the message says which lists there are.
    """
    if not hasattr(language_model, "get_decoder") or not hasattr(language_model, "config"):
        raise ValueError(
            f"language_model={type(language_model).__name__} is no transformers model (no get_decoder, no config); "
            "give one, such as AutoModelForCausalLM makes."
        )
    decoder = language_model.get_decoder()
    decoder = language_model if decoder is None else decoder
    config = language_model.config.get_text_config(decoder=True)
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    lengths = {name: module for name, module in lists.items() if len(module) == config.num_hidden_layers}
    depth = min((name.count(".") for name in lengths), default=0)
    found = [module for name, module in lengths.items() if name.count(".") == depth]
    if len(found) != 1:
        there = ", ".join(f"{name!r} of {len(module)}" for name, module in lists.items()) or "none"
        raise ValueError(
            f"language_model={type(language_model).__name__}: {len(found) or 'no'} nn.ModuleList of "
            f"num_hidden_layers={config.num_hidden_layers} layers in its decoder {type(decoder).__name__}; lists "
            f"there: {there}. Give a decoder whose layers are one list."
        )
    children = dict(decoder.named_children())
    return DecoderParts(
        name=type(decoder).__name__,
        layers=found[0],
        embeddings=language_model.get_input_embeddings(),
        norm=next((children[name] for name in _NORMS if name in children), None),
        lm_head=language_model.get_output_embeddings(),
    )
