"""LoRA adapters, of peft and of LLaVA, merged into the weights they were trained on, tensor by tensor."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from idavlm.conversion.errors import ConversionError, listed
from idavlm.conversion.mapping import KeyMap
from idavlm.conversion.source import Source, WeightFile, read_config

INFIX = "base_model.model."
FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA = "non_lora_trainables.bin"
_LORA = re.compile(r"(?P<module>.*)\.lora_(?P<part>A|B)\.(?:default\.)?weight")


@dataclass
class Adapter:
    """Low-rank differences by the name of the weight they are added to, in the source's spelling."""

    deltas: dict[str, tuple[Tensor, Tensor, float]]

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """``weight + scale * B @ A``, added in float32."""
        if name not in self.deltas:
            return tensor
        down, up, scale = self.deltas[name]
        return (tensor.float() + scale * (up.float() @ down.float())).to(tensor.dtype)


def take_in(source: Source, folder: Path) -> None:
    """Let whole tensors of an adapter (projector, biases, modules_to_save) come in the place of the source's.

    Where the folder has a ``config.json``, as LLaVA's have, it is that of the model with the adapter.
    """
    path = _file(folder)
    if (folder / "config.json").is_file():
        source.config = read_config(folder)
    files = [WeightFile(path, infix=INFIX, without=".lora_", overrides=True)]
    if (folder / NON_LORA).is_file():
        files.append(WeightFile(folder / NON_LORA, infix=INFIX, overrides=True))
    source.add(files)


def read_adapter(folder: Path, source: Source, key_map: KeyMap) -> Adapter:
    """The low-rank tensors of the adapter in ``folder``, each with the weight of ``source`` that it belongs to.

    Names need not be spelled alike: two are the same if ``key_map`` sends them to the same place.

    Raises:
        ConversionError: kinds of adapter other than plain LoRA of linear layers, weights that are not there or of
            another shape, halves of pairs.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
        kind = {name: config.get(name) for name in ("peft_type", "use_dora", "fan_in_fan_out")}
        raise ConversionError(f"{folder}: {kind} cannot be merged here; merge it with peft (merge_and_unload) first.")
    path = _file(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    with WeightFile(path, infix=INFIX).open() as tensors:
        low_rank = [name for name in tensors if ".lora_" in name]
        strange = [name for name in low_rank if not _LORA.fullmatch(name) or tensors[name].dim() != 2]
        if strange:
            raise ConversionError(f"{path}: expected lora_A and lora_B of linear layers, found {listed(strange)}.")
        for name in low_rank:
            match = _LORA.fullmatch(name)
            pairs.setdefault(match["module"], {})[match["part"]] = tensors[name].clone()
    places = {_place(key_map, name): name for header in source.headers for name in header}
    deltas = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ConversionError(f"{path}: {module} has lora_{''.join(pair)} alone; the file is not whole.")
        name = places.get(_place(key_map, f"{module}.weight"))
        if name is None:
            raise ConversionError(f"{path}: {module} is no layer of {source.folder}; is this the model it belongs to?")
        shape = (len(pair["B"]), pair["A"].shape[1])
        if tuple(source.tensors[name].shape) != shape:
            raise ConversionError(
                f"{path}: {module} is a difference of shape {shape}, but the weight has shape "
                f"{tuple(source.tensors[name].shape)}; is this the model it belongs to?"
            )
        deltas[name] = (pair["A"], pair["B"], _scale(config, module, len(pair["A"])))
    return Adapter(deltas)


def _place(key_map: KeyMap, name: str) -> tuple[str, ...]:
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
