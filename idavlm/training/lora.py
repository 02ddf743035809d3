"""LoRA and DoRA of the pretrained parts of a model, beside new modules that are trained in full, and merging."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_peft_available

from idavlm._compat import keep_4bit_layout
from idavlm.models.attach import CONFIG as ID_FORMER_CONFIG
from idavlm.models.attach import detach_id_former, image_features_with_identities, load_id_former, save_id_former
from idavlm.models.model_parts import PARTS, find_part, modules_beside_parts
from idavlm.models.quantized_parts import is_quantized
from idavlm.modules.inner_adaptor import InnerAdaptor, inner_adaptor_of, load_adaptors, save_adaptors
from idavlm.modules.inner_adaptor.adaptor import LowRankLinear
from idavlm.modules.inner_adaptor.saving import FILE_NAME as INNER_ADAPTORS
from idavlm.modules.inner_adaptor.workflow import AdaptorHook, CopyHook
from idavlm.training.quantization import dequantize, model_class
from idavlm.utils import check_choice, check_positive, read_json_object

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
"""Name of the adapter within the peft model; it is not part of the files."""
ADAPTER_CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"
SHARED = ("lora_dropout", "use_dora", "use_rslora", "init_lora_weights")
"""Options that peft has once per adapter, so that all parts must have the same value."""


@dataclass
class LoRAArguments:
    """LoRA of one part of a model. The names are those of ``peft.LoraConfig``.

    Attributes:
        r: rank.
        lora_alpha: the change of a weight is multiplied by ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with
            ``use_rslora``).
        target_modules: which modules of the part: ``"all-linear"``; a regular expression that matches their whole path
            within the part, such as ``r".*\\.(q_proj|v_proj)"``; or a list of names, such as ``["q_proj", "v_proj"]``.
        lora_dropout, use_dora, use_rslora, init_lora_weights: see peft; the same for all parts.

    Raises:
        ValueError: a value out of range.
    """

    r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the change, together with r."})
    target_modules: str | list[str] = field(
        default=ALL_LINEAR, metadata={"help": "all-linear, a regular expression, or names of modules."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: train the norms of the weights as well."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    init_lora_weights: bool | str = field(default=True, metadata={"help": "Initial values, see peft."})

    def __post_init__(self):
        check_positive(r=self.r)
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha={self.lora_alpha} must be greater than 0.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must be at least 0 and less than 1.")
        if not self.target_modules:
            raise ValueError(f"target_modules={self.target_modules!r} is empty; pass 'all-linear' or names of modules.")


def add_lora(
    model: PreTrainedModel, lora: Mapping[str, LoRAArguments], *, modules_to_save: Sequence[str] | None = None
) -> "PeftModel":
    """Add LoRA to pretrained parts of a model. New modules are trained in full and saved with the adapter.

    New are the modules beside the pretrained parts: the connector, the ID-Former (attached or not), the image index
    embedding and the workflows of inner adaptors. Those of them that are frozen when this function is called stay
    frozen. All other parameters are frozen.

    Args:
        model: an :class:`idavlm.IDAVLMForConditionalGeneration`, an image-text model of transformers, with an attached
            ID-Former or without, or a language model. Any of them may have inner adaptors and 4-bit weights.
        lora: options by part, for example ``{"language_model": LoRAArguments(r=32), "vision_tower": LoRAArguments()}``.
            Each part may have its own ``r``, ``lora_alpha`` and ``target_modules``.
        modules_to_save: paths of the modules that are trained in full, in place of the new ones; empty for none.

    Returns:
        A ``peft.PeftModel``. :class:`idavlm.IDTrainer` trains it, :func:`save_lora` saves it, :func:`load_lora` loads
        it, and :func:`merge_lora` merges it.

    Raises:
        ImportError: peft is not installed.
        ValueError: a part that the model does not have or that has no such modules, options that peft cannot combine,
            or modules that cannot be trained in full.
    """
    if not is_peft_available():
        raise ImportError("LoRA needs peft: pip install 'idavlm[peft]'.")
    from peft import LoraConfig, get_peft_model

    if not lora:
        raise ValueError(f"lora={lora!r} adds nothing; name at least one of {', '.join(PARTS)}.")
    for part in lora:
        check_choice("lora", part, PARTS)
    first_part, first = next(iter(lora.items()))
    for part, arguments in lora.items():
        for name in SHARED:
            if getattr(arguments, name) != getattr(first, name):
                raise ValueError(
                    f"lora: {name}={getattr(arguments, name)!r} of {part} and {getattr(first, name)!r} of "
                    f"{first_part}, but peft has one value per adapter; use the same for all parts."
                )
    keep_4bit_layout(model)
    trained = _trained_in_full(model) if modules_to_save is None else _checked_paths(model, modules_to_save)
    patterns = {part: _target_pattern(model, part, arguments, trained) for part, arguments in lora.items()}
    below = {part: rf"{re.escape(find_part(model, part)[0])}\..*" for part in lora}
    config = LoraConfig(
        r=first.r,
        lora_alpha=first.lora_alpha,
        target_modules="|".join(patterns.values()),
        rank_pattern={below[part]: arguments.r for part, arguments in lora.items() if arguments.r != first.r},
        alpha_pattern={
            below[part]: arguments.lora_alpha
            for part, arguments in lora.items()
            if arguments.lora_alpha != first.lora_alpha
        },
        modules_to_save=trained or None,
        **{name: getattr(first, name) for name in SHARED},
    )
    adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    _check_wrapped(adapted, trained)
    _share_base_layers(adapted)
    check_adapter(adapted)
    return adapted


def save_lora(model: "PeftModel", folder: str | Path) -> None:
    """Write the adapter, and what is needed to build the model that it belongs to again.

    Besides ``adapter_config.json`` and ``adapter_model.safetensors`` these are the ``config.json`` of the model, an
    attached ID-Former (:func:`idavlm.save_id_former`), and inner adaptors that the configuration does not describe
    (:func:`idavlm.save_adaptors`). :class:`idavlm.IDTrainer` writes the same files.
    """
    model.save_pretrained(folder)
    save_beside_adapter(model, folder)


def save_beside_adapter(model: "PeftModel", folder: str | Path) -> None:
    """Write what :func:`save_lora` writes besides the two files of peft."""
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        return
    base.config.save_pretrained(folder)
    if image_features_with_identities(base) is not None:
        save_id_former(base, folder)
    if inner_adaptor_of(base) is not None and getattr(base.config, "inner_adaptors", None) is None:
        save_adaptors(base, folder, state_dict=_state_without_peft(base))


def load_lora(
    folder: str | Path,
    model: str | Path | PreTrainedModel | None = None,
    *,
    is_trainable: bool = False,
    **options,
) -> "PeftModel":
    """Load an adapter that :func:`save_lora` or :class:`idavlm.IDTrainer` wrote, with the model that it belongs to.

    A model that had 4-bit weights is quantised again in the same way.

    Args:
        folder: the adapter.
        model: the model without the adapter, or its folder or hub name; by default the name in the adapter's
            configuration.
        is_trainable: whether to train the adapter further.
        options: further arguments of ``from_pretrained``, such as ``dtype``.

    Raises:
        ValueError: the folder holds no adapter, or does not name the model that it belongs to.
    """
    from peft import PeftModel

    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds no adapter ({ADAPTER_CONFIG}); pass a folder that save_lora or IDTrainer wrote."
        )
    if not isinstance(model, PreTrainedModel):
        model = _load_base(folder, model, **options)
    elif options:
        raise ValueError(f"options {', '.join(options)} have no effect on a model that is loaded already.")
    keep_4bit_layout(model)
    if (folder / ID_FORMER_CONFIG).is_file() and image_features_with_identities(model) is None:
        load_id_former(model, folder)
    if (folder / INNER_ADAPTORS).is_file() and inner_adaptor_of(model) is None:
        language_model = getattr(model, "language_model", model)
        load_adaptors(language_model, folder, connector=getattr(model, "connector", None))
    adapted = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    _share_base_layers(adapted)
    return adapted


def merge_lora(model: "PeftModel") -> PreTrainedModel:
    """Merge the adapter into the weights: the model computes the same without peft.

    4-bit weights are replaced by the values that they stand for first, since the sum would be rounded again.

    Args:
        model: a peft model; it must not be used afterwards.

    Returns:
        The model inside ``model``, with merged weights and the modules that were trained in full.

    Raises:
        ValueError: the adapter is not LoRA, or there are several.
    """
    names = list(model.peft_config)
    if len(names) != 1 or model.peft_config[names[0]].peft_type != "LORA":
        kinds = {name: str(config.peft_type) for name, config in model.peft_config.items()}
        raise ValueError(f"merge_lora merges one LoRA adapter, but the model has {kinds}.")
    if is_quantized(model):
        model = _on_dequantized(model, names[0])
    merged = model.merge_and_unload(safe_merge=True)
    inner_adaptor = inner_adaptor_of(merged)
    if inner_adaptor is not None:
        inner_adaptor.share_base_layers(merged)
    return merged


def save_merged(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model that :func:`merge_lora` returned.

    What transformers' own class does not have goes into files of its own: an attached ID-Former
    (:func:`idavlm.load_id_former`) and inner adaptors (:func:`idavlm.load_adaptors`). The model loses its attached
    ID-Former.
    """
    if image_features_with_identities(model) is not None:
        save_id_former(model, folder)
        detach_id_former(model)
    inner_adaptor = inner_adaptor_of(model)
    if inner_adaptor is None or getattr(model.config, "inner_adaptors", None) is not None:
        model.save_pretrained(folder)
        return
    save_adaptors(model, folder)
    path = next(path for path, module in model.named_modules() if module is inner_adaptor)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{path}.")}
    model.save_pretrained(folder, state_dict=state)


def _on_dequantized(model: "PeftModel", name: str) -> "PeftModel":
    """The same adapter on the dequantised base."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = model.peft_config[name]
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()}
    adapted = get_peft_model(dequantize(model.unload()), config, adapter_name=name)
    set_peft_model_state_dict(adapted, state, adapter_name=name)
    return adapted


# --- Modules that are trained ----------------------------------------------------------------------------------------


def _trained_in_full(model: PreTrainedModel) -> list[str]:
    """Paths of the new modules that are not frozen. peft cannot wrap a ``ModuleDict``, so inner adaptors are listed."""
    inner_adaptor = inner_adaptor_of(model)
    paths = []
    for path, module in modules_beside_parts(model):
        if isinstance(module, InnerAdaptor):
            for workflow, parts in module.items():
                inside = {f"layers.{index}": layer for index, layer in enumerate(parts["layers"])}
                inside |= {name: part for name, part in parts.items() if name != "layers"}
                paths += [f"{path}.{workflow}.{name}" for name, part in inside.items() if _is_trained(part)]
        elif (
            path == "connector"
            and inner_adaptor is not None
            and "connector" in inner_adaptor.options["modules_to_copy"]
        ):
            continue  # every workflow trains a copy of its own
        elif _is_trained(module):
            paths.append(path)
    return _checked_paths(model, paths)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _checked_paths(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """``paths``, if peft can wrap a copy of each module."""
    modules = dict(model.named_modules())
    for path in paths:
        module = modules.get(path)
        if module is None:
            raise ValueError(f"modules_to_save holds {path!r}, which {type(model).__name__} does not have.")
        if any(not parameter.is_floating_point() for parameter in module.parameters()):
            raise ValueError(
                f"{path} has 4-bit weights and cannot be trained in full; load the model with "
                "idavlm.training.quantization_config, which quantises the pretrained parts only, or freeze it."
            )
        _check_no_hooks(path, module)
    return list(paths)


def _target_pattern(model: PreTrainedModel, part: str, arguments: LoRAArguments, trained: Sequence[str]) -> str:
    """A regular expression for the paths of the modules of ``part`` that get an adapter."""
    part_path, module = find_part(model, part)
    modules = {name: layer for name, layer in module.named_modules() if name}
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in modules.values()):
        raise ValueError(
            f"lora: {part} has batch normalisation, whose running statistics change in training but are not part of an "
            "adapter; leave this part out."
        )
    target = arguments.target_modules
    if target == ALL_LINEAR:
        target = "|".join(_linear_patterns(modules))
    elif not isinstance(target, str):
        target = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, target))})"
    found = [name for name in modules if re.fullmatch(target, name)]
    if not found:
        names = sorted({name.rpartition(".")[2] for name, layer in modules.items() if isinstance(layer, nn.Linear)})
        raise ValueError(
            f"lora: target_modules={arguments.target_modules!r} of {part} matches no module of "
            f"{type(module).__name__}; its linear layers are named {', '.join(names) or 'nothing: it has none'}."
        )
    pattern = rf"{re.escape(part_path)}\.(?:{target})"
    for path in trained:
        inside = [name for name in found if f"{part_path}.{name}.".startswith(f"{path}.")]
        if inside:
            raise ValueError(
                f"{part_path}.{inside[0]} gets LoRA, but modules_to_save trains {path} in full; choose one."
            )
    return pattern


def _linear_patterns(modules: Mapping[str, nn.Module]) -> list[str]:
    """Regular expressions for the names of all linear layers; one for layers whose names differ in numbers only."""
    linear = [name for name, layer in modules.items() if isinstance(layer, (nn.Linear, Conv1D))]
    others = [name for name in modules if name not in set(linear)]
    patterns = {}
    for name in linear:
        pattern = re.sub(r"(?<=\\.)\d+(?=\\.|$)", r"\\d+", re.escape(name))
        is_exact = any(re.fullmatch(pattern, other) for other in others)
        patterns[re.escape(name) if is_exact else pattern] = None
    return list(patterns)


def check_adapter(model: "PeftModel") -> None:
    """Check a model that was wrapped by peft directly, without :func:`add_lora`, for what would be wrong silently.

    Raises:
        ValueError: a copy of a module runs a copy of the inner adaptors, or an adapter changes weights that inner
            adaptors of low rank share.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    adapted = {id(layer.get_base_layer()) for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            _check_no_hooks(path, module.original_module)
        elif isinstance(module, LowRankLinear) and id(module.base[0]) in adapted:
            raise ValueError(
                f"{path} shares a linear layer of the base model that has an adapter, which merging would change; "
                "restrict target_modules to other layers, or use inner adaptors without rank."
            )


def _check_no_hooks(path: str, module: nn.Module) -> None:
    """The hooks of inner adaptors refer to the adaptors, so a copy of a module with hooks would run copies of them."""
    hooks = [hook for part in module.modules() for hook in part._forward_hooks.values()]
    if any(isinstance(hook, (AdaptorHook, CopyHook)) for hook in hooks):
        raise ValueError(
            f"modules_to_save holds {path!r}, in whose place inner adaptors run; leave it out. The copies that the "
            "workflows train are saved."
        )


def _check_wrapped(model: "PeftModel", expected: Sequence[str]) -> None:
    """Check which modules peft trains in full, because it matches the ends of names."""
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    wrapped = {path for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    if wrapped != set(expected):
        difference = ", ".join(sorted(wrapped ^ set(expected)))
        raise ValueError(
            f"modules_to_save={list(expected)} also names others for peft: {difference}; pass whole paths."
        )


def _share_base_layers(model: "PeftModel") -> None:
    """Let the copies that peft made of inner adaptors of low rank share the linear layers of the base model."""
    from peft.utils import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copied in wrapper.modules_to_save.values():
                for before, layer in zip(wrapper.original_module.modules(), copied.modules(), strict=True):
                    if isinstance(layer, LowRankLinear):
                        layer.base = before.base


def _state_without_peft(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model inside peft under the names without peft: trained copies, and weights before LoRA."""
    state = {}
    for name, tensor in model.state_dict().items():
        if ".original_module." in name or ".lora_" in name:
            continue
        state[name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(".base_layer.", ".")] = tensor
    return state


# --- The model that an adapter belongs to ----------------------------------------------------------------------------


def _load_base(folder: Path, model: str | Path | None, **options) -> PreTrainedModel:
    adapter = read_json_object(folder / ADAPTER_CONFIG)
    source = model or adapter.get("base_model_name_or_path")
    if not source:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path, since the model was built and never saved; "
            "save it before LoRA is added, and pass its folder as model."
        )
    base_config = AutoConfig.from_pretrained(source)
    config = AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else base_config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and getattr(base_config, "quantization_config", None) is None:
        # transformers takes a configuration with a quantization_config for that of weights that are in 4 bits already.
        from transformers import BitsAndBytesConfig

        del config.quantization_config
        options["quantization_config"] = BitsAndBytesConfig.from_dict(dict(quantization))
    loaded, info = model_class(config).from_pretrained(source, config=config, output_loading_info=True, **options)
    trained = [f"{path}." for path in adapter.get("modules_to_save") or ()]
    missing = [name for name in info["missing_keys"] if not name.startswith(tuple(trained))]
    if missing or info["mismatched_keys"]:
        raise ValueError(
            f"{source} is not the model of the adapter {folder}: it lacks {len(missing)} tensors"
            f"{f', such as {sorted(missing)[0]}' if missing else ''}, and {len(info['mismatched_keys'])} have other "
            "shapes; pass the model that the adapter was trained on."
        )
    return loaded
