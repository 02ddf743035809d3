"""Merge LoRA adapters of peft and of LLaVA into the weights of their base model, tensor by tensor."""

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from idavlm.conversion.checkpoint_files import SourceCheckpoint, WeightFile
from idavlm.conversion.config_files import ADAPTER, check_fields, is_there, read_config, read_json
from idavlm.conversion.errors import ConversionError, listed, shown
from idavlm.conversion.key_mapping import KeyMap

PREFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA = "non_lora_trainables.bin"
_LORA = re.compile(r"(?P<module>.*)\.lora_(?P<part>A|B)\.(?:default\.)?weight")


Deltas = dict[str, tuple[Tensor, Tensor, float]]
"""Name of a weight of the base model -> (A, B, scale) of its low-rank update."""


def merge_delta(deltas: Deltas, name: str, tensor: Tensor) -> Tensor:
    """``tensor + scale * B @ A``, computed in float32; tensors without a delta are returned unchanged."""
    if name not in deltas:
        return tensor
    down, up, scale = deltas[name]
    return (tensor.float() + scale * (up.float() @ down.float())).to(tensor.dtype)


def add_adapter_files(source: SourceCheckpoint, folder: Path) -> None:
    """Add the full tensors of an adapter (projector, biases, modules_to_save), which replace those of ``source``.

    If the folder has a ``config.json``, as in LLaVA, it replaces that of the base model.
    """
    path = _file(folder)
    if is_there(folder / "config.json"):
        source.config, source.config_path = read_config(folder), folder / "config.json"
    config = read_json(folder / "adapter_config.json")
    unties = not config.get("ensure_weight_tying")  # peft trains a copy of the embeddings beside the head
    files = [WeightFile(path, remove_prefix=PREFIX, exclude=".lora_", overrides=True, unties=unties)]
    if is_there(folder / NON_LORA):
        files.append(WeightFile(folder / NON_LORA, remove_prefix=PREFIX, overrides=True))
    source.add(files)


def read_adapter(folder: Path, source: SourceCheckpoint, key_map: KeyMap) -> Deltas:
    """Read the low-rank tensors of the adapter in ``folder`` and assign them to weights of ``source``.

    Names in adapter and source may differ: they refer to the same weight if ``key_map`` maps them to the same target.

    Raises:
        ConversionError: an adapter other than LoRA of linear layers, a weight that ``source`` lacks or that has another
            shape, or an incomplete pair.
    """
    config_path = folder / "adapter_config.json"
    config = read_json(config_path)
    check_fields(config_path, config, ADAPTER)
    unsupported = {
        name: config[name] for name in ("use_dora", "fan_in_fan_out", "layer_replication") if config.get(name)
    }
    if config.get("peft_type", "LORA") != "LORA":
        unsupported["peft_type"] = config["peft_type"]
    if unsupported:
        raise ConversionError(
            f"{config_path}: {shown(unsupported)} is not supported; merge the adapter with peft first "
            "(merge_and_unload)."
        )
    path = _file(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    with WeightFile(path, remove_prefix=PREFIX).open() as tensors:
        low_rank = [name for name in tensors if ".lora_" in name]
        header = {name: tensors[name]() for name in low_rank}
        unexpected = [
            name
            for name, tensor in header.items()
            if not _LORA.fullmatch(name) or tensor.dim() != 2 or not tensor.is_floating_point()
        ]
        if unexpected:
            raise ConversionError(f"{path}: expected lora_A and lora_B of linear layers, found {listed(unexpected)}.")
        for name in low_rank:
            match = _LORA.fullmatch(name)
            pairs.setdefault(match["module"], {})[match["part"]] = header[name].clone()
    names = {_target(key_map, name): name for header in source.headers for name in header}
    deltas: Deltas = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ConversionError(f"{path}: {module} has lora_{''.join(pair)} only; the file is incomplete.")
        name = names.get(_target(key_map, f"{module}.weight"))
        if name is None:
            raise ConversionError(
                f"{path}: {module} is not a layer of {source.folder}; pass the base model of the adapter. (A head that "
                "is tied to the embeddings is no layer of its own: untie it first, or merge the adapter with peft.)"
            )
        shape = (len(pair["B"]), pair["A"].shape[1])
        if tuple(source.tensors[name].shape) != shape:
            raise ConversionError(
                f"{path}: {module} has a low-rank update of shape {shape}, but the weight has shape "
                f"{tuple(source.tensors[name].shape)}; pass the base model of the adapter."
            )
        rank = _of_module(config_path, config, "rank_pattern", module, config.get("r", len(pair["A"])))
        if not len(pair["A"]) == pair["B"].shape[1] == rank:
            raise ConversionError(
                f"{config_path}: {module} has rank {rank}, but in {path} lora_A has shape {tuple(pair['A'].shape)} and "
                f"lora_B {tuple(pair['B'].shape)}; the files belong to different adapters."
            )
        alpha = _of_module(config_path, config, "alpha_pattern", module, config.get("lora_alpha", 8))
        deltas[name] = (pair["A"], pair["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return deltas


def _target(key_map: KeyMap, name: str) -> tuple[str, ...]:
    return tuple(key_map(name) or (name,))


def _of_module(path: Path, config: dict[str, Any], name: str, module: str, default: float) -> float:
    """Value of a module from ``rank_pattern`` or ``alpha_pattern``: that of the first pattern that matches."""
    for pattern, value in (config.get(name) or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise ConversionError(f"{path}: {name} has {shown(pattern)}, which is no regular expression.") from error
    return default


def _file(folder: Path) -> Path:
    if is_there(folder / "adapter_config.json"):
        for name in FILES:
            if is_there(folder / name):
                return folder / name
    raise ConversionError(f"adapter={str(folder)!r}: expected adapter_config.json and one of {', '.join(FILES)}.")
