"""What inner adaptors need of a transformers decoder: its parts, and layers of its cache."""

from dataclasses import dataclass

from torch import nn

from idavlm._compat import empty_cache_layer_like
from idavlm.utils import outside_compile

# The workflow in which no adaptor runs.
TEXT = "text"

_NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f")


@dataclass(frozen=True, eq=False)
class DecoderParts:
    """Parts of a language model."""

    decoder: nn.Module  # runs the layers; the language model itself if it has no head
    layers: nn.ModuleList
    embeddings: nn.Module
    norm: nn.Module | None  # after the last layer; None if it has no usual name
    lm_head: nn.Module | None

    @property
    def name(self) -> str:
        """The class of the decoder, for messages."""
        return type(self.decoder).__name__


def find_decoder_parts(language_model: nn.Module) -> DecoderParts:
    """Find the parts of any transformers decoder by their structure, not by the model's name.

    The decoder layers are the ``nn.ModuleList`` of length ``config.num_hidden_layers`` nearest to the root.

    Raises:
        ValueError: ``language_model`` is not a transformers model, or there is no such list or more than one.
    """
    if not hasattr(language_model, "get_decoder") or not hasattr(language_model, "config"):
        raise ValueError(
            f"language_model={type(language_model).__name__} is not a transformers model (it has no get_decoder or no "
            "config); pass one, for example from AutoModelForCausalLM."
        )
    decoder = language_model.get_decoder()
    decoder = language_model if decoder is None else decoder
    config = language_model.config.get_text_config(decoder=True)
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    lengths = {name: module for name, module in lists.items() if len(module) == config.num_hidden_layers}
    depth = min((name.count(".") for name in lengths), default=0)
    found = [module for name, module in lengths.items() if name.count(".") == depth]
    if len(found) != 1:
        present = ", ".join(f"{name!r} of length {len(module)}" for name, module in lists.items()) or "none"
        raise ValueError(
            f"language_model={type(language_model).__name__}: {len(found) or 'no'} nn.ModuleList of "
            f"num_hidden_layers={config.num_hidden_layers} layers in its decoder {type(decoder).__name__}; its lists: "
            f"{present}. Pass a decoder whose layers are in one list."
        )
    children = dict(decoder.named_children())
    return DecoderParts(
        decoder=decoder,
        layers=found[0],
        embeddings=language_model.get_input_embeddings(),
        norm=next((children[name] for name in _NORMS if name in children), None),
        lm_head=language_model.get_output_embeddings(),
    )


def enter_cache(cache, workflow: str) -> None:
    """Record on the cache, and so on its copies, that ``workflow`` fills it from now on.

    Raises:
        ValueError: the cache holds tokens of another workflow.
    """
    filled_by = getattr(cache, "filled_by_workflow", TEXT)
    if filled_by == workflow:
        return
    length = int(cache.get_seq_length())
    if length:
        raise ValueError(
            f"cache holds {length} tokens of workflow {filled_by!r}, but the active workflow is {workflow!r}, which "
            "computes other keys and values; keep one cache per workflow, or pass the whole conversation without a "
            "cache when the workflow changes."
        )
    cache.filled_by_workflow = workflow


def ensure_cache_layer(cache, base_index: int, cache_index: int, workflow: str) -> None:
    """Add layers up to ``cache_index`` to the cache, of the same kind as its layer ``base_index``."""
    if len(cache.layers) <= cache_index:
        _add_layers(cache, base_index, cache_index, workflow)
    if getattr(cache, "offloading", False):
        cache.layers[cache_index].prefetch()


@outside_compile
def _add_layers(cache, base_index: int, cache_index: int, workflow: str) -> None:
    cache.filled_by_workflow = workflow  # a cache that the decoder created itself did not pass through enter_cache
    while len(cache.layers) <= cache_index:
        cache.layers.append(empty_cache_layer_like(cache.layers[base_index]))
