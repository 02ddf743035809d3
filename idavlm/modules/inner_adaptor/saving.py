"""Save and load inner adaptors in a file of their own, without the base model."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from idavlm.modules.inner_adaptor.adaptor import InnerAdaptor, add_inner_adaptors, inner_adaptor_of
from idavlm.modules.inner_adaptor.decoder import find_decoder_parts
from idavlm.utils.sharding import is_partitioned, whole_state_dict, whole_tensor, writing_once

FILE_NAME = "inner_adaptors.safetensors"
_METADATA = "inner_adaptors"


def save_adaptors(model: nn.Module, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None) -> Path:
    """Write the inner adaptors of a model, without the base model, to ``<folder>/inner_adaptors.safetensors``.

    The metadata of the file holds the options of the adaptors, the sizes of the base model and a few values of each of
    its layers, which :func:`load_adaptors` compares.

    Args:
        model: a language model with inner adaptors, or a model that contains one.
        folder: output folder; it is created.
        state_dict: the state dict of ``model``, if it is at hand, for example ``accelerator.get_state_dict(model)``.
            Its tensors must be whole. By default the tensors of the model are gathered.

    Parameters that are partitioned (ZeRO-3, FSDP2) are gathered. All processes then call this function, and the first
    one writes.

    Returns:
        The path of the file.

    Raises:
        ValueError: the model has no adaptors, the adaptors were changed after they were added (for example by peft), or
            the tensors in ``state_dict`` are partitioned.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, InnerAdaptor)]
    if not found:
        raise ValueError(f"model={type(model).__name__} has no inner adaptors; call add_inner_adaptors first.")
    path, inner_adaptor = found[0]
    base_path = path.rpartition(".")[0]
    if state_dict is None:
        state_dict, tensors = {}, whole_state_dict(inner_adaptor)
    else:
        state_dict = _below(base_path, state_dict)
        tensors = _below(path.rpartition(".")[2], state_dict)
    if set(tensors) != inner_adaptor.tensor_names:
        wrong = sorted(set(tensors) ^ inner_adaptor.tensor_names)[0]
        raise ValueError(
            f"the adaptors of model={type(model).__name__} have other tensors than when they were added, for example "
            f"{wrong!r}; merge peft adapters (merge_and_unload()), or pass state_dict= of the model without wrappers."
        )
    if any(tensor.numel() == 0 or is_partitioned(tensor) for tensor in tensors.values()):
        raise ValueError("the tensors in state_dict are partitioned; leave it out, and they are gathered.")
    description = {"options": inner_adaptor.options, "base": _describe(model.get_submodule(base_path), state_dict)}
    file = Path(folder) / FILE_NAME
    with writing_once(inner_adaptor) as writes:
        if writes:
            file.parent.mkdir(parents=True, exist_ok=True)
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(whole, file, metadata={_METADATA: json.dumps(description)})
    return file


def load_adaptors(language_model: nn.Module, folder: str | Path, *, connector: nn.Module | None = None) -> nn.Module:
    """Load inner adaptors that :func:`save_adaptors` wrote. A model without adaptors gets them first.

    Args:
        language_model: the base model, or a model with adaptors of the same options. It is changed in place.
        folder: the folder that contains ``inner_adaptors.safetensors``.
        connector: as in :func:`add_inner_adaptors`; required if the saved ``modules_to_copy`` has ``"connector"`` and
            ``language_model`` has no adaptors yet.

    Returns:
        ``language_model``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the adaptors were trained on another base model, or have other options.
    """
    file = Path(folder) / FILE_NAME
    if not file.exists():
        raise FileNotFoundError(f"folder={str(folder)!r} has no {FILE_NAME}; pass a folder that save_adaptors wrote.")
    with safe_open(file, framework="pt") as opened:
        description = json.loads(opened.metadata()[_METADATA])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    inner_adaptor = inner_adaptor_of(language_model)
    if any(is_partitioned(parameter) for parameter in language_model.parameters()):
        raise ValueError(
            f"folder={str(folder)!r}: the parameters of language_model are partitioned, so adaptors cannot be loaded; "
            "load them before the model is passed to the trainer or to fully_shard."
        )
    options = description["options"]
    _check_base(file, description["base"], _describe(language_model, {}))
    if inner_adaptor is None:
        inner_adaptor = add_inner_adaptors(language_model, **options, connector=connector).inner_adaptor
    for name, value in options.items():
        if inner_adaptor.options[name] != value:
            raise ValueError(
                f"{file}: saved with {name}={value}, but language_model has {name}={inner_adaptor.options[name]}; "
                "load the adaptors into a model without adaptors, or with the same options."
            )
    inner_adaptor.load_state_dict(tensors)
    return language_model


def _below(path: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the module at ``path``, by their names within it."""
    prefix = f"{path}." if path else ""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def _describe(language_model: nn.Module, tensors: dict[str, Tensor]) -> dict:
    """Sizes of a base model and a few values of each layer weight, read from ``tensors`` where it has them."""
    layers = find_decoder_parts(language_model).layers
    path = next(name for name, module in language_model.named_modules() if module is layers)
    config = language_model.config.get_text_config(decoder=True)
    values = {}
    for name, parameter in layers.named_parameters():
        tensor = tensors.get(f"{path}.{name}", parameter)
        tensor = whole_tensor(tensor) if is_partitioned(tensor) else tensor.detach()
        if tensor.is_floating_point() and tensor.numel():
            # Four values are enough to distinguish checkpoints of one architecture.
            indices = torch.linspace(0, tensor.numel() - 1, 4, device=tensor.device).long()
            values[name.replace(".base_layer", "")] = tensor.flatten()[indices].float().tolist()
    sizes = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
    return {"sizes": {name: getattr(config, name, None) for name in sizes}, "values": values}


def _check_base(file: Path, saved: dict, present: dict) -> None:
    remedy = "load the adaptors into the base model that they were trained with."
    # A resized vocabulary does not change the layers.
    if saved["sizes"] | {"vocab_size": present["sizes"]["vocab_size"]} != present["sizes"]:
        raise ValueError(f"{file}: trained on {saved['sizes']}, but language_model is {present['sizes']}; {remedy}")
    for name, values in saved["values"].items():
        # The tolerance covers rounding to another dtype. Quantised weights have no values to compare.
        other = present["values"].get(name, values)
        if not torch.allclose(torch.tensor(values), torch.tensor(other), rtol=1e-2, atol=1e-6):
            raise ValueError(
                f"{file}: trained on another language model of the same sizes; its layer weight {name!r} starts with "
                f"{values[0]:.5g}, that of language_model with {other[0]:.5g}; {remedy}"
            )
