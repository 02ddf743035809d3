"""A model of several parts, some of which are quantised to 4 bits by bitsandbytes."""

import copy
import re
from collections.abc import Callable, Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from idavlm._compat import keep_4bit_layout

_SKIPPED = "llm_int8_skip_modules"
"""Field of ``BitsAndBytesConfig`` with the modules that are not quantised, in 4 bits too."""


def is_quantized(module: nn.Module) -> bool:
    """Whether a module or one of its submodules has 4-bit weights of bitsandbytes."""
    return any(type(parameter).__name__ == "Params4bit" for parameter in module.parameters())


def modules_to_keep(model: nn.Module, keep: Callable[[str, nn.Module], bool]) -> list[str]:
    """Patterns for ``llm_int8_skip_modules``: transformers then quantises the linear layers that ``keep`` is False for.

    Args:
        model: the whole model; it may be on the meta device.
        keep: function of the path of a linear layer and the layer.
    """

    def linear(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, layer in module.named_modules(prefix=prefix):
            if isinstance(layer, (nn.Linear, Conv1D)):
                yield name, layer

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            kept = [keep(*layer) for layer in linear(child, path)]
            if kept and all(kept):
                # transformers < 5.24 matches the start of a name; this pattern ends at the end of a module's name
                yield rf"^{re.escape(path)}(?:\.|$)"
            elif any(kept):
                yield from walk(child, path)

    return list(walk(model, ""))


def adopt_quantization(model: PreTrainedModel, parts: dict[str, PreTrainedModel]) -> None:
    """Describe quantised ``parts`` in the configuration of the ``model`` that they are parts of.

    transformers knows one quantisation per model: that of its configuration. With it the model can be saved and loaded
    as one, and peft and the Trainer see that it is quantised.

    Raises:
        ValueError: the parts are quantised in different ways.
    """
    quantizers = {
        name: part.hf_quantizer for name, part in parts.items() if getattr(part, "hf_quantizer", None) is not None
    }
    if not quantizers:
        return
    options = {name: quantizer.quantization_config.to_dict() for name, quantizer in quantizers.items()}
    first = next(iter(options))
    for name, values in options.items():
        for field in values.keys() | options[first].keys():
            if field != _SKIPPED and values.get(field) != options[first].get(field):
                raise ValueError(
                    f"{name} is quantised with {field}={values.get(field)}, but {first} with "
                    f"{options[first].get(field)}; a checkpoint has one quantization_config: load both with the same."
                )
    config = copy.deepcopy(quantizers[first].quantization_config)
    setattr(config, _SKIPPED, modules_to_keep(model, lambda _, layer: not is_quantized(layer)))
    for name in ("vision_config", "text_config"):  # the configuration of the whole model replaces those of its parts
        part_config = copy.deepcopy(getattr(model.config, name))
        part_config.__dict__.pop("quantization_config", None)
        setattr(model.config, name, part_config)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    quantizer.postprocess_model(model)
    keep_4bit_layout(model)
