"""Configuration files of a checkpoint: read JSON strictly, and check the fields that conversion uses.

The tables below list the fields with the values that they may have. Other fields are left to transformers.
"""

import json
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from idavlm.conversion.errors import ConversionError, shown

MAX_IMAGE_SIZE = 4096
"""Largest side of an image in pixels; no released tower has more than 1024."""


def is_there(path: Path) -> bool:
    """Whether a file, a folder or a link has this name, even if it cannot be read."""
    return os.path.lexists(path)


def read_json(path: Path) -> dict[str, Any]:
    """Contents of a JSON file that holds an object.

    Raises:
        ConversionError: a file that cannot be read, is not UTF-8, not JSON or not an object, with a key twice or NaN.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path}: not UTF-8 (byte {error.start}: {error.reason}); download it again.") from error
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        contents = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_constant)
        text.encode()
        json.dumps(contents, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConversionError(f"{path}: contains half of a surrogate pair, which is no character.") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: invalid JSON ({error}).") from error
    if not isinstance(contents, dict):
        raise ConversionError(f"{path}: expected an object ({{...}}), found {shown(contents)}.")
    return contents


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    contents = dict(pairs)
    if len(contents) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(repeated)} occurs twice in one object")
    return contents


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value")
    return float(name)


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of ``config.json``."""
    path = folder / "config.json"
    if not is_there(path):
        raise ConversionError(f"{folder}: no config.json; pass the folder of a checkpoint.")
    return read_json(path)


@dataclass(frozen=True)
class Field:
    """Values that a field may have.

    Attributes:
        expected: the values in words, for messages.
        accepts: whether a value is one of them.
    """

    expected: str
    accepts: Callable[[Any], bool]

    def __or__(self, other: "Field") -> "Field":
        return Field(f"{self.expected} or {other.expected}", lambda value: self.accepts(value) or other.accepts(value))


def integer(minimum: int | None = 1, maximum: int | None = None) -> Field:
    """An integer from ``minimum`` to ``maximum``; None: without limit."""
    if minimum is not None and maximum is not None:
        bounds = f"from {minimum} to {maximum}"
    else:
        bounds = f"of at least {minimum}" if maximum is None else f"of at most {maximum}"
    expected = "an integer" if minimum is None and maximum is None else f"an integer {bounds}"

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
            return False
        return (minimum is None or value >= minimum) and (maximum is None or value <= maximum)

    return Field(expected, accepts)


def number(minimum: float, maximum: float) -> Field:
    """A number greater than ``minimum`` and at most ``maximum``."""

    def accepts(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and minimum < value <= maximum

    return Field(f"a number greater than {minimum:g} and at most {maximum:g}", accepts)


def choice(*values: str) -> Field:
    """One of some strings."""
    return Field(" or ".join(map(repr, values)), lambda value: isinstance(value, str) and value in values)


def list_of(field: Field) -> Field:
    """A list whose entries are all accepted by ``field``."""
    return Field(
        f"a list, each entry {field.expected}",
        lambda value: isinstance(value, list) and all(field.accepts(entry) for entry in value),
    )


def _object_of(field: Field) -> Field:
    return Field(
        f"an object, each value {field.expected}",
        lambda value: isinstance(value, dict) and all(field.accepts(entry) for entry in value.values()),
    )


NULL = Field("null", lambda value: value is None)
FLAG = Field("true or false", lambda value: isinstance(value, bool))
TEXT = Field("a text", lambda value: isinstance(value, str))
OBJECT = Field("an object", lambda value: isinstance(value, dict))
SHARE = Field("a number from 0 to 1", lambda value: number(-1, 1).accepts(value) and value >= 0)
EPSILON = number(0, 0.1)
FACTOR = number(0, 1e9)
TOKEN = integer(0)
SIDE = integer(1, MAX_IMAGE_SIZE)
DTYPE = Field(
    "a type of torch", lambda value: isinstance(value, str) and isinstance(getattr(torch, value, 0), torch.dtype)
)
ACTIVATION = Field("an activation of transformers", lambda value: isinstance(value, str) and value in ACT2FN)

COMMON = {
    "architectures": list_of(TEXT) | NULL,
    "dtype": DTYPE | NULL,
    "torch_dtype": DTYPE | NULL,
    "id2label": OBJECT | NULL,
    "label2id": OBJECT | NULL,
}
ROPE = {
    "rope_type": choice("default", "linear", "dynamic", "yarn", "llama3", "longrope"),
    "type": choice("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su"),
    "rope_theta": number(1, 1e12),
    "factor": FACTOR | NULL,
    "original_max_position_embeddings": integer(1),
    "low_freq_factor": FACTOR,
    "high_freq_factor": FACTOR,
    "beta_fast": FACTOR | NULL,
    "beta_slow": FACTOR | NULL,
    "attention_factor": FACTOR | NULL,
    "mscale": FACTOR | NULL,
    "mscale_all_dim": FACTOR | NULL,
    "short_factor": list_of(FACTOR),
    "long_factor": list_of(FACTOR),
    "partial_rotary_factor": number(0, 1),
}
LANGUAGE_MODEL = {
    "vocab_size": integer(1),
    "hidden_size": integer(1),
    "intermediate_size": integer(1) | list_of(integer(1)),
    "num_hidden_layers": integer(1),
    "num_attention_heads": integer(1),
    "num_key_value_heads": integer(1) | NULL,
    "head_dim": integer(1) | NULL,
    "hidden_act": ACTIVATION,
    "max_position_embeddings": integer(1),
    "rms_norm_eps": EPSILON,
    "rope_theta": number(1, 1e12),
    "rope_scaling": OBJECT | NULL,
    "rope_parameters": OBJECT | NULL,
    "initializer_range": SHARE,
    "attention_dropout": SHARE,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "tie_word_embeddings": FLAG,
    **COMMON,
}
LLAVA = {
    "mm_vision_tower": TEXT,
    "mm_projector_type": TEXT | NULL,
    "mm_vision_select_layer": integer(None, -1),
    "mm_vision_select_feature": choice("patch", "cls_patch"),
    "mm_use_im_start_end": FLAG,
    "image_aspect_ratio": choice("pad", "square") | NULL,
}
TRANSFORMERS_LLAVA = {
    "text_config": OBJECT,
    "vision_config": OBJECT,
    "image_token_index": TOKEN,
    "image_token_id": TOKEN,
    "vision_feature_layer": integer(None, -1) | list_of(integer(None)),
    "vision_feature_select_strategy": choice("default", "full"),
    "projector_hidden_act": TEXT,
    "multimodal_projector_bias": FLAG,
    "tie_word_embeddings": FLAG,
}
VISION_TOWER = {
    "model_type": TEXT,
    "hidden_size": integer(1),
    "intermediate_size": integer(1),
    "num_hidden_layers": integer(1),
    "num_attention_heads": integer(1),
    "num_channels": integer(1),
    "image_size": SIDE,
    "patch_size": SIDE,
    "hidden_act": ACTIVATION,
    "layer_norm_eps": EPSILON,
    "attention_dropout": SHARE,
    **COMMON,
}
QWEN = {
    "vocab_size": integer(1),
    "hidden_size": integer(1),
    "intermediate_size": integer(2),
    "num_hidden_layers": integer(1),
    "num_attention_heads": integer(1),
    "layer_norm_epsilon": EPSILON,
    "kv_channels": integer(1),
    "seq_length": integer(1),
    "rotary_emb_base": number(1, 1e12),
    "rotary_pct": number(0, 1),
    "no_bias": FLAG,
    "tie_word_embeddings": FLAG,
    "initializer_range": SHARE,
    "visual": OBJECT,
    **COMMON,
}
QWEN_VISUAL = {
    "image_size": SIDE,
    "patch_size": SIDE,
    "width": integer(1),
    "layers": integer(1),
    "heads": integer(1),
    "mlp_ratio": number(0, 1e3),
    "output_dim": integer(1),
    "n_queries": integer(1),
    "image_start_id": TOKEN,
}
IMAGE_PROCESSOR = {
    **{name: SIDE | _object_of(SIDE | NULL) | NULL for name in ("size", "crop_size", "pad_size")},
    **{name: number(-1e6, 1e6) | list_of(number(-1e6, 1e6)) | NULL for name in ("image_mean", "image_std")},
    **{f"do_{name}": FLAG | NULL for name in ("resize", "center_crop", "rescale", "normalize", "convert_rgb", "pad")},
    "rescale_factor": number(0, 1) | NULL,
    "resample": integer(0, 5) | NULL,
}
GENERATION = {"eos_token_id": TOKEN | list_of(TOKEN) | NULL}
ADAPTER = {
    "peft_type": TEXT,
    "r": integer(1),
    "lora_alpha": FACTOR,
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "fan_in_fan_out": FLAG,
    "alpha_pattern": _object_of(FACTOR) | NULL,
    "rank_pattern": _object_of(integer(1)) | NULL,
}


def check_fields(
    path: Path,
    config: dict[str, Any],
    fields: dict[str, Field],
    *,
    section: str = "",
    required: Collection[str] = (),
) -> None:
    """Check the fields of ``config`` that ``fields`` lists.

    Args:
        path: file of ``config``, for messages.
        config: contents of the file, or of its ``section``.
        fields: name -> values that it may have.
        section: name of the part of the file that ``config`` is.
        required: names that ``config`` must have.

    Raises:
        ConversionError: names file, field, value and what was expected.
    """
    prefix = f"{section}." if section else ""
    for name, field in fields.items():
        if name not in config:
            if name in required:
                raise ConversionError(f"{path} has no '{prefix}{name}'; expected {field.expected}.")
        elif not field.accepts(config[name]):
            raise ConversionError(f"{path}: {prefix}{name}={shown(config[name])}; expected {field.expected}.")


def check_rope(path: Path, config: dict[str, Any], *, section: str = "") -> None:
    """Check the rotary position embeddings of a language model, which some models have per type of layer."""
    prefix = f"{section}." if section else ""
    for name in ("rope_scaling", "rope_parameters"):
        parameters = config.get(name) or {}
        check_fields(path, parameters, ROPE, section=prefix + name)
        for kind, inner in parameters.items():
            if isinstance(inner, dict):
                check_fields(path, inner, ROPE, section=f"{prefix}{name}.{kind}")
