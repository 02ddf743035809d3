"""Load a model and its processor from one checkpoint, completely and with finite weights, or not at all."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

from idavlm.models import (
    IDAVLMConfig,
    IDAVLMForConditionalGeneration,
    IDAVLMProcessor,
    IdentityProcessor,
    import_id_former,
    load_id_former,
)
from idavlm.models.pretrained import resolve_pretrained
from idavlm.utils import first_line, read_json_object

_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def load_checkpoint(
    path: str | Path,
    *,
    id_former: str | Path | None = None,
    id_former_class: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
) -> tuple[PreTrainedModel, IDAVLMProcessor | IdentityProcessor]:
    """Load a model and its processor; the processor first, as its files are small.

    Unlike ``from_pretrained``, which gives missing weights random values, this is for models that are used as they are.

    Args:
        path: folder or hub name of a checkpoint, or the name of a model of the package (``"idavlm-tiny"``). It is a
            model of idavlm, or an image-text model of transformers; the latter has no ID-Former unless ``id_former`` is
            passed: references are then images of the prompt.
        id_former: folder of :func:`idavlm.save_id_former`. ``path`` is then an image-text model of transformers, to
            which the ID-Former is attached.
        id_former_class: import path of the ID-Former class that the checkpoint was trained with, if it is one of your
            own (``"my_package.MyIDFormer"``). It is imported; the checkpoint must name the same class.
        device: device of the model.
        dtype: type of the weights; by default that of the checkpoint.

    Raises:
        ValueError: ``path`` has no processor or no model that can be loaded; weights are missing, of other shapes, not
            part of the model, or not finite (they are listed); ``device`` cannot be used; ``id_former_class`` cannot be
            imported or is not the class of the checkpoint.
        OSError: ``path`` has no model.
    """
    device, path = _usable(device), resolve_pretrained(path)
    for name in _JSON_FILES:
        if (Path(path) / name).is_file():
            read_json_object(Path(path) / name)  # the errors of transformers do not name the file
    if id_former_class is not None:
        import_id_former(id_former_class)
    is_own = id_former is None and _is_own(path)
    try:
        if not is_own:
            processor = _identity_processor(path, identity_inputs=id_former is not None)
        elif Path(path).is_dir() and not (Path(path) / "processor_config.json").is_file():
            raise FileNotFoundError("it has no processor_config.json")
        else:
            processor = IDAVLMProcessor.from_pretrained(path)
    except Exception as error:  # transformers raises many types, depending on which file is missing
        raise ValueError(
            f"{path}: no processor can be loaded ({first_line(error)}). A checkpoint holds model and processor; save "
            f"the processor that the model was trained with by processor.save_pretrained({str(path)!r})."
        ) from error
    _check_weight_files(Path(path))
    options = {} if dtype is None else {"dtype": dtype}
    model_class = IDAVLMForConditionalGeneration if is_own else AutoModelForImageTextToText
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are an error below, not a table on the terminal
    try:
        model, info = model_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except OSError:
        raise
    except Exception as error:  # a wrong configuration causes errors of any type
        raise ValueError(
            f"{path}: the model cannot be loaded ({type(error).__name__}: {first_line(error)}); check config.json and "
            "the weights of the checkpoint."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    _check_complete(path, info)
    named = getattr(model.config, "id_former_class", None)
    if id_former_class is not None and named != id_former_class:
        raise ValueError(
            f"id_former_class={id_former_class!r} is not the class of {path}, which was trained with "
            f"{named or 'idavlm.IDFormer'!r}; pass that class, or leave the argument out for a class of idavlm."
        )
    try:
        model = model.to(device)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"device={str(device)!r} has too little memory for {path} ({first_line(error)}); pass another device or a "
            "smaller dtype."
        ) from error
    if id_former is not None:
        load_id_former(model, id_former)
    _check_finite(path, model)
    return model, processor


def _is_own(path: str | Path) -> bool:
    """Whether the checkpoint is a model of idavlm, whose loader also reports what has no readable configuration."""
    try:
        return AutoConfig.from_pretrained(path).model_type == IDAVLMConfig.model_type
    except Exception:  # transformers raises many types
        return True


def _identity_processor(path: str | Path, *, identity_inputs: bool) -> IdentityProcessor:
    processor = IdentityProcessor.from_pretrained(path, identity_inputs=identity_inputs)
    if processor.tokenizer.pad_token is None:  # padding is masked, so that any token will do
        processor.tokenizer.pad_token = processor.tokenizer.unk_token or processor.tokenizer.eos_token
    return processor


def _usable(device: str | torch.device) -> torch.device:
    """The device, after a tensor was created on it."""
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable)
    except Exception as error:  # each backend raises a type of its own
        raise ValueError(
            f"device={str(device)!r} cannot be used ({first_line(error)}); pass cpu, or the name of a present device "
            "such as cuda or cuda:0."
        ) from error
    if usable.type == "meta":
        raise ValueError("device='meta' holds no values; pass cpu, or the name of a present device such as cuda.")
    return usable


def _check_weight_files(folder: Path) -> None:
    """Check the weights of a local checkpoint, because the errors of safetensors do not name the file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        files = read_json_object(index).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise ValueError(f"{index} has no 'weight_map' of weights to files; copy the file again.")
        missing = sorted({name for name in files.values() if not (folder / name).is_file()})
        if missing:
            raise ValueError(f"{index} names {_listed(missing)}, which {folder} lacks; copy the checkpoint again.")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except Exception as error:  # SafetensorError is no subclass of ValueError
            raise ValueError(
                f"{file} is damaged or incomplete ({first_line(error)}); copy the checkpoint again."
            ) from error


def _check_complete(path: str | Path, info: dict) -> None:
    mismatched = [f"{name} (file: {list(file)}, model: {list(model)})" for name, file, model in info["mismatched_keys"]]
    problems = [
        f"{len(names)} weights {problem}: {_listed(sorted(names))}"
        for problem, names in (
            ("are missing", info["missing_keys"]),
            ("have other shapes than the model", mismatched),
            ("do not belong to the model", info["unexpected_keys"]),
        )
        if names
    ]
    problems += [str(message) for message in info.get("error_msgs") or []]
    if problems:
        raise ValueError(
            f"{path} is not a complete checkpoint. {'. '.join(problems)}. Check that config.json belongs to the "
            "weights, and copy or save the checkpoint again."
        )


def _check_finite(path: str | Path, model: nn.Module) -> None:
    broken = [name for name, parameter in model.named_parameters() if not _all_finite(parameter)]
    # A buffer may hold -inf as a mask.
    broken += [name for name, buffer in model.named_buffers() if buffer.is_floating_point() and buffer.isnan().any()]
    if broken:
        raise ValueError(
            f"{path}: {len(broken)} weights hold NaN or infinite values: {_listed(broken)}. The training diverged; use "
            "an earlier checkpoint."
        )


def _all_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    tensor = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # isfinite does not support 8-bit types
    return bool(tensor.isfinite().all())


def _listed(names: Iterable[str], limit: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
