"""One adaptor layer: a copy of the decoder layer it follows, whole, gated, or as a difference of low rank."""

import torch
from torch import Tensor, nn

from idavlm.modules.inner_adaptor.routing import unrouted


class LowRankLinear(nn.Module):
    """``base(x) + up(down(x))``: another module's linear layer, shared and untouched, and a trained difference.

    ``up`` starts at zero (LoRA, arXiv 2106.09685). ``base`` is no submodule: its weights stay where they are, and are
    neither saved nor trained here.
    """

    def __init__(self, base: nn.Linear, rank: int, dtype: torch.dtype):
        super().__init__()
        options = {"bias": False, "dtype": dtype, "device": base.weight.device}
        self.down = nn.Linear(base.in_features, rank, **options)
        self.up = nn.Linear(rank, base.out_features, **options)
        nn.init.zeros_(self.up.weight)
        self.__dict__["base"] = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x.to(self.down.weight.dtype)))


class GatedLayer(nn.Module):
    """``output + gate * (layer(x) - x)``: an adaptor beside its layer; the gate starts at zero."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.layer = layer
        self.gate = nn.Parameter(torch.zeros(1, dtype=dtype, device=next(layer.parameters()).device))

    def forward(self, output: Tensor, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        parallel = self.layer(hidden_states, *args, **kwargs)
        parallel = parallel[0] if isinstance(parallel, tuple) else parallel
        return output + self.gate * (parallel - hidden_states)


def adaptor_layer(
    layer: nn.Module, *, cache_index: int, composition: str, rank: int | None, dtype: torch.dtype
) -> nn.Module:
    """A trainable copy of a decoder layer with a place of its own in the cache.

    Args:
        layer: the layer it will follow.
        cache_index: index of its keys and values in the cache.
        composition: ``"serial"`` or ``"parallel"``.
        rank: of the difference to the layer's linear weights; whole copies where None.
        dtype: of new parameters.
    """
    shared = [module for module in layer.modules() if rank is not None and isinstance(module, nn.Linear)]
    adaptor = unrouted(layer, {id(linear): LowRankLinear(linear, rank, dtype) for linear in shared})
    places = [module for module in adaptor.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    if not places:
        raise ValueError(
            f"language_model: layers of class {type(layer).__name__} have no layer_idx, so an adaptor cannot be told "
            "where its keys and values go in the cache; use a decoder of transformers >= 5."
        )
    for module in places:
        module.layer_idx = cache_index
    packed = [name for name, parameter in adaptor.named_parameters() if not parameter.is_floating_point()]
    if packed:
        raise ValueError(
            f"rank=None copies the layer, but {packed[0]!r} of {type(layer).__name__} is quantised and cannot be "
            "trained; give rank=16, say, which shares the quantised weights."
        )
    adaptor.requires_grad_(True)
    return GatedLayer(adaptor, dtype) if composition == "parallel" else adaptor


def own_copy(module: nn.Module) -> nn.Module:
    """A trainable copy of embeddings, norm, head or connector."""
    return unrouted(module, {}).requires_grad_(True)
