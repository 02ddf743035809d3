"""Muon for the linear layers of some modules and AdamW for all other parameters, in one optimizer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from idavlm.utils import check_choice
from idavlm.utils.parameter_groups import MODULES, module_of, parameter_groups, require_module

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration (Jordan et al., Muon, 2024)."""


def muon_adamw(
    model: nn.Module,
    *,
    modules: Sequence[str] = ("language_model",),
    learning_rate: float = 6e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    module_learning_rates: Mapping[str, float] | None = None,
    fused: bool = True,
) -> "MuonAdamW":
    """An optimizer that trains the linear layers of ``modules`` with Muon and all other parameters with AdamW.

    Pass it to the Trainer, which makes the learning-rate schedule and saves and loads the optimizer's state::

        IDTrainer(model, args, optimizers=(muon_adamw(model, learning_rate=6e-3), None), ...)

    Parameters that ``IDTrainingArguments.freeze`` freezes get no gradient and are not updated. It works with DDP
    and, in a loop of your own, with FSDP2 (call it after :func:`idavlm.training.fully_shard_model`). It does not work
    with DeepSpeed, whose ZeRO stages join all matrices to one vector; ``IDTrainer`` refuses that. transformers accepts
    no ``optimizers`` together with FSDP.

    Args:
        model: the model.
        modules: modules of :class:`idavlm.IDTrainingArguments`. The weights of their linear layers are trained with
            Muon, except that of an output layer.
        learning_rate: learning rate of Muon and of AdamW.
        weight_decay: weight decay of all parameters except biases and norms, as in ``transformers.Trainer``.
        betas: of AdamW.
        module_learning_rates: learning rates of single modules; ``learning_rate`` for all others.
        fused: whether AdamW uses torch's fused implementation, as ``transformers.Trainer`` does by default.

    Raises:
        ValueError: an unknown module, one that the model does not have, or one without linear layers.
    """
    for argument, names in (("modules", modules), ("module_learning_rates", module_learning_rates or {})):
        for name in names:
            check_choice(argument, name, MODULES)
            require_module(model, argument, name)
    output_layer = getattr(model, "get_output_embeddings", lambda: None)()  # may be tied to the embeddings
    muon: dict[str, set[int]] = {module: set() for module in modules}
    for path, layer in model.named_modules():
        module = module_of(f"{path}.weight")
        if isinstance(layer, nn.Linear) and layer is not output_layer and module in muon:
            muon[module].add(id(layer.weight))
    for module, weights in muon.items():
        if not weights:
            raise ValueError(f"modules names {module!r}, which has no linear layer for Muon; leave it out.")
    matrices = set().union(*muon.values())
    groups = parameter_groups(
        model,
        learning_rate=learning_rate,
        module_learning_rates=module_learning_rates,
        weight_decay=weight_decay,
        # The method does not use the Trainer that it is called on.
        decayed=Trainer.get_decay_parameter_names(None, model),
    )
    parts = []
    for group in groups:
        for is_muon in (True, False):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in matrices) == is_muon]
            if parameters:
                parts.append({**group, "params": parameters, "muon": is_muon})
    return MuonAdamW(parts, lr=learning_rate, betas=betas, fused=fused)


class MuonAdamW(torch.optim.AdamW):
    """AdamW that updates parameter groups with ``muon=True`` by Muon.

    A Muon update is the Nesterov momentum of a weight matrix, replaced by the nearest orthogonal matrix, so that all
    its directions are learned at the same rate (K. Jordan et al., Muon, 2024). It is scaled to a root mean square of
    0.2, which is typical of AdamW's updates, so that both can use the same learning rate (J. Liu et al., Muon is
    Scalable for LLM Training, arXiv 2502.16982). It is computed in float32, which is several times faster on a CPU
    than the bfloat16 of ``torch.optim.Muon``.

    Args:
        params: parameter groups. A ``ValueError`` is raised if a group with ``muon=True`` has a parameter that is not a
            matrix.
        momentum: momentum of the Muon updates.
        kwargs: arguments of ``torch.optim.AdamW``.
    """

    def __init__(self, params, *, momentum: float = 0.95, **kwargs):
        groups = [{"muon": False, "momentum": momentum, **group} for group in params]
        for group in groups:
            shapes = [tuple(p.shape) for p in group["params"] if group["muon"] and p.dim() != 2]
            if shapes:
                raise ValueError(
                    f"a group with muon=True has a parameter of shape {shapes[0]}, but Muon updates matrices only."
                )
        super().__init__(groups, **kwargs)
        # Fused AdamW unscales the gradients of a GradScaler by itself, which would leave out the Muon updates.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._muon_update(parameter, group)
                    parameter.grad = None  # AdamW skips parameters without a gradient
        super().step()
        return loss

    def _muon_update(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # AdamW expects it when a state is loaded
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        update = orthogonal_whole(torch.lerp(parameter.grad, buffer, group["momentum"]).float())
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter), alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])


def orthogonal_whole(matrix: Tensor) -> Tensor:
    """:func:`orthogonal` of a matrix whose rows FSDP2 may have sharded; each process computes it from the whole one."""
    if not isinstance(matrix, DTensor):
        return orthogonal(matrix)
    whole = orthogonal(matrix.full_tensor())
    return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Approximately ``U V^T`` of the singular value decomposition ``U S V^T``: all singular values become about 1."""
    a, b, c = NEWTON_SCHULZ
    is_wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if is_wide else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if is_wide else x.T
