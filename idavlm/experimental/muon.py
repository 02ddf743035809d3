"""Muon for weight matrices, AdamW for all other parameters, as one optimiser."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, from Muon's publication."""


class MuonAdamW(torch.optim.AdamW):
    """AdamW that takes an orthogonal step in groups with ``muon=True``.

    There the step is the momentum (Nesterov), brought near the orthogonal matrix closest to it, so that all its
    directions are learnt at one rate; scaled to a root mean square of 0.2, that of AdamW's steps, which makes their
    learning rates comparable (K. Jordan et al., Muon, 2024; Moonshot AI, arXiv 2502.16982). In float32, which on a CPU
    is many times as fast as ``torch.optim.Muon``'s bfloat16.

    Args:
        params: groups; parameters of those with ``muon=True`` must be matrices.
        momentum: of the orthogonal steps.
        kwargs: of ``torch.optim.AdamW``.

    Raises:
        ValueError: a parameter that is no matrix in a group with ``muon=True``.
    """

    def __init__(self, params, *, momentum: float = 0.95, **kwargs):
        groups = [{"muon": False, "momentum": momentum, **group} for group in params]
        for group in groups:
            shapes = [tuple(p.shape) for p in group["params"] if group["muon"] and p.dim() != 2]
            if shapes:
                raise ValueError(f"a group with muon=True has a parameter of shape {shapes[0]}; it takes matrices.")
        super().__init__(groups, **kwargs)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._orthogonal_step(parameter, group)
                    parameter.grad = None  # AdamW leaves parameters without a gradient alone
        super().step()
        return loss

    def _orthogonal_step(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # AdamW looks for it when a state is loaded
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        step = orthogonal(torch.lerp(parameter.grad, buffer, group["momentum"]).float())
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step.to(parameter), alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])


def linear_weights(model: nn.Module, modules: Sequence[nn.Module]) -> set[int]:
    """``id`` of the weights of all linear layers of ``modules``, but for an output layer tied to embeddings or not."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = (layer for module in modules for layer in module.modules())
    return {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear) and layer is not head}


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Near ``U V^T`` where ``U S V^T`` is the singular value decomposition: singular values come to lie about 1."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
