"""4-bit weights of bitsandbytes for the pretrained parts of a model that is trained by LoRA (QLoRA)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import is_bitsandbytes_available

from idavlm._compat import keep_4bit_layout
from idavlm.models.model_parts import PARTS, find_part, modules_beside_parts
from idavlm.models.quantized_parts import is_quantized, modules_to_keep
from idavlm.modules.inner_adaptor import InnerAdaptor
from idavlm.utils import check_choice

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

QUANT_TYPES = ("nf4", "fp4")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class QuantizationArguments:
    """Which parts of a model get 4-bit weights, and how. bitsandbytes (extra ``qlora``) makes them while loading.

    Attributes:
        parts: parts whose linear layers are quantised: ``"language_model"``, ``"vision_tower"`` or both. The output
            head and everything that is new (connector, ID-Former, image index embedding, inner adaptors) keep their
            type.
        quant_type: ``"nf4"`` for weights that are normally distributed (QLoRA), or ``"fp4"``.
        double_quant: quantise the scales of the blocks as well; it saves 0.4 bits per weight.
        compute_dtype: type in which the quantised layers compute. Use ``"bfloat16"`` with ``bf16=True``.

    Raises:
        ValueError: an unknown value.
    """

    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts with 4-bit weights: language_model, vision_tower."},
    )
    quant_type: str = field(default="nf4", metadata={"help": "4-bit type.", "choices": list(QUANT_TYPES)})
    double_quant: bool = field(default=True, metadata={"help": "Quantise the scales of the blocks as well."})
    compute_dtype: str = field(
        default="float32", metadata={"help": "Type in which quantised layers compute.", "choices": list(DTYPES)}
    )

    def __post_init__(self):
        if not self.parts:
            raise ValueError("parts=[] quantises nothing; leave the quantisation out.")
        for part in self.parts:
            check_choice("parts", part, PARTS)
        check_choice("quant_type", self.quant_type, QUANT_TYPES)
        check_choice("compute_dtype", self.compute_dtype, DTYPES)


def quantization_config(
    arguments: QuantizationArguments, config: PretrainedConfig | None = None
) -> "BitsAndBytesConfig":
    """The ``quantization_config`` for ``from_pretrained``.

    Args:
        arguments: what is quantised.
        config: configuration of the whole model that is loaded: :class:`idavlm.IDAVLMConfig`, or that of an image-text
            model or a causal language model of transformers. None for a vision tower or a language model that is loaded
            alone, to be passed to :meth:`idavlm.IDAVLMForConditionalGeneration.from_parts`; ``arguments.parts`` has no
            effect then.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the model has no part of that name, or the part has no linear layers.
    """
    if not is_bitsandbytes_available():
        raise ImportError("4-bit weights need bitsandbytes: pip install 'idavlm[qlora]'.")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=arguments.quant_type,
        bnb_4bit_use_double_quant=arguments.double_quant,
        bnb_4bit_compute_dtype=arguments.compute_dtype,
        llm_int8_skip_modules=None if config is None else _modules_to_keep(arguments, config),
    )


def _modules_to_keep(arguments: QuantizationArguments, config: PretrainedConfig) -> list[str]:
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    paths = {part: find_part(model, part)[0] for part in arguments.parts}
    new = [path for path, _ in modules_beside_parts(model)]

    def keep(path: str, layer: nn.Module) -> bool:
        is_new = any(_is_below(path, other) for other in new)
        return is_new or not any(_is_below(path, part) for part in paths.values())

    for part, path in paths.items():
        layers = model.get_submodule(path).named_modules(prefix=path)
        if not any(type(layer) is nn.Linear and not keep(name, layer) for name, layer in layers):
            raise ValueError(
                f"parts has {part!r}, but its {type(model.get_submodule(path)).__name__} has no linear layers."
            )
    return modules_to_keep(model, keep)


def model_class(config: PretrainedConfig) -> type:
    """The Auto class that builds and loads the model of a configuration."""
    is_image_text = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM


def _is_below(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the 4-bit weights of a model by the values that they stand for, in place.

    The outputs stay the same up to rounding in the type of the other weights. A merged adapter needs this first: to
    quantise the sum again would change the model.

    Args:
        model: a model that was loaded with a :func:`quantization_config`, without peft adapters.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is not quantised.
    """
    if not is_quantized(model):
        raise ValueError(f"{type(model).__name__} has no 4-bit weights; use it as it is.")
    from transformers.integrations import dequantize_and_replace

    keep_4bit_layout(model)
    quantizers = [part for part in model.modules() if getattr(part, "hf_quantizer", None) is not None]
    # Without a dtype, every layer gets the type that its weights had before.
    dequantize_and_replace(model, quantization_config=quantizers[0].hf_quantizer.quantization_config)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            if "hf_quantizer" in module.__dict__:
                module.hf_quantizer.remove_quantization_config(module)
            module.__dict__.pop("is_loaded_in_4bit", None)
            module.config.__dict__.pop("_is_quantized", None)
            module.config.__dict__.pop("quantization_config", None)
        elif isinstance(module, InnerAdaptor):
            module.share_base_layers(model)
    return model
