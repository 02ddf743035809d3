"""Merge LoRA adapters of peft and of LLaVA into the weights of their base model, tensor by tensor."""

import json
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from idavlm.conversion.checkpoint_files import ConversionError, SourceCheckpoint, WeightFile, listed, read_config
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
    if (folder / "config.json").is_file():
        source.config = read_config(folder)
    files = [WeightFile(path, remove_prefix=PREFIX, exclude=".lora_", overrides=True)]
    if (folder / NON_LORA).is_file():
        files.append(WeightFile(folder / NON_LORA, remove_prefix=PREFIX, overrides=True))
    source.add(files)


def read_adapter(folder: Path, source: SourceCheckpoint, key_map: KeyMap) -> Deltas:
    """Read the low-rank tensors of the adapter in ``folder`` and assign them to weights of ``source``.

    Names in adapter and source may differ: they refer to the same weight if ``key_map`` maps them to the same target.

    Raises:
        ConversionError: an adapter other than LoRA of linear layers, a weight that ``source`` lacks or that has another
            shape, or an incomplete pair.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
        kind = {name: config.get(name) for name in ("peft_type", "use_dora", "fan_in_fan_out")}
        raise ConversionError(
            f"{folder}: {kind} is not supported; merge the adapter with peft (merge_and_unload) first."
        )
    path = _file(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    with WeightFile(path, remove_prefix=PREFIX).open() as tensors:
        low_rank = [name for name in tensors if ".lora_" in name]
        unexpected = [name for name in low_rank if not _LORA.fullmatch(name) or tensors[name]().dim() != 2]
        if unexpected:
            raise ConversionError(f"{path}: expected lora_A and lora_B of linear layers, found {listed(unexpected)}.")
        for name in low_rank:
            match = _LORA.fullmatch(name)
            pairs.setdefault(match["module"], {})[match["part"]] = tensors[name]().clone()
    names = {_target(key_map, name): name for header in source.headers for name in header}
    deltas: Deltas = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ConversionError(f"{path}: {module} has lora_{''.join(pair)} only; the file is incomplete.")
        name = names.get(_target(key_map, f"{module}.weight"))
        if name is None:
            raise ConversionError(
                f"{path}: {module} is not a layer of {source.folder}; pass the base model of the adapter."
            )
        shape = (len(pair["B"]), pair["A"].shape[1])
        if tuple(source.tensors[name].shape) != shape:
            raise ConversionError(
                f"{path}: {module} has a low-rank update of shape {shape}, but the weight has shape "
                f"{tuple(source.tensors[name].shape)}; pass the base model of the adapter."
            )
        deltas[name] = (pair["A"], pair["B"], _scale(config, module, len(pair["A"])))
    return deltas


def _target(key_map: KeyMap, name: str) -> tuple[str, ...]:
    return tuple(key_map(name) or (name,))


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _file(folder: Path) -> Path:
    if (folder / "adapter_config.json").is_file():
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
    raise ConversionError(f"adapter={str(folder)!r}: expected adapter_config.json and one of {', '.join(FILES)}.")
