"""Checkpoints of a training run: whether one is complete, whether it belongs to the run, and how weights are loaded."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from idavlm._compat import saved_weights_by_module_name
from idavlm.data import RecordDataset, RecordStream
from idavlm.training.arguments import IDTrainingArguments

TRAINER_STATE = "trainer_state.json"
RUN_STATE = "run_state.json"
"""File in a checkpoint with what a resumed run must share with the run that wrote it."""

_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MAX_NAMES = 20
"""Number of tensor names that an error lists."""


# --- Complete checkpoints --------------------------------------------------------------------------------------------


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """The newest checkpoint in ``output_dir`` from which training can be resumed.

    A run that is killed while it writes a checkpoint leaves an incomplete checkpoint. Checkpoints without optimizer
    state (``save_only_model=True``) are not complete either.

    Raises:
        ValueError: there is no complete checkpoint; the message says what each checkpoint lacks.
    """
    faults = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rsplit("-", 1)[1]
        if step.isdigit():
            faults[int(step)] = (folder, fault_of_checkpoint(folder))
    complete = [step for step, (_, fault) in faults.items() if fault is None]
    if not complete:
        found = "".join(f" {folder.name} {fault}." for _, (folder, fault) in sorted(faults.items()))
        raise ValueError(f"output_dir={str(output_dir)!r} holds no complete checkpoint to resume from.{found}")
    return str(faults[max(complete)][0])


def fault_of_checkpoint(folder: str | Path) -> str | None:
    """Say why training cannot be resumed from a checkpoint; None if it can.

    ``trainer_state.json`` is written last, and removed before a checkpoint is written again. Where it can be read, all
    other files were complete when the checkpoint was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "is not a folder"
    if _read_json(folder / TRAINER_STATE) is None:
        return f"was not written completely ({TRAINER_STATE} is missing or damaged)"
    run = _read_json(folder / RUN_STATE)
    if run is None:
        return f"has no readable {RUN_STATE}; it was not written by this version of IDTrainer"
    if run.get("save_only_model"):
        return "holds the model only, because it was written with save_only_model=True"
    by_deepspeed = (folder / "latest").is_file()  # all states are in one folder that this file names
    missing = []
    if not (by_deepspeed or _has_weights(folder)):
        missing.append("the weights")
    if not (by_deepspeed or _has_any(folder, "optimizer.pt", "optimizer.bin", "optimizer_*")):
        missing.append("the optimizer state (optimizer.pt)")
    if not (by_deepspeed or _has_any(folder, "scheduler.pt")):
        missing.append("the state of the learning rate scheduler (scheduler.pt)")
    if not _has_random_states(folder, run.get("world_size", 1), run.get("save_on_each_node", False)):
        missing.append("the states of the random generators (rng_state*.pth)")
    return f"lacks {', '.join(missing)}" if missing else None


def check_checkpoint(folder: str | Path) -> None:
    """Raise ValueError if training cannot be resumed from ``folder``."""
    fault = fault_of_checkpoint(folder)
    if fault is not None:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} {fault}. Choose another checkpoint, or load its model with "
            "from_pretrained and start a new run in another output_dir."
        )


def _has_weights(folder: Path) -> bool:
    index = _read_json(folder / _WEIGHTS_INDEX)
    if index is not None and all((folder / name).is_file() for name in set(index["weight_map"].values())):
        return True
    return _has_any(folder, _WEIGHTS, _ADAPTER_WEIGHTS, f"*/{_ADAPTER_WEIGHTS}", "pytorch_model_fsdp*")


def _has_random_states(folder: Path, world_size: int, save_on_each_node: bool) -> bool:
    if world_size == 1:
        return (folder / "rng_state.pth").is_file()
    if save_on_each_node:  # this node has the states of its own processes only
        return _has_any(folder, "rng_state_*.pth")
    return all((folder / f"rng_state_{rank}.pth").is_file() for rank in range(world_size))


def _has_any(folder: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _read_json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


# --- The same run ----------------------------------------------------------------------------------------------------


def describe_dataset(dataset: Dataset | None) -> str | None:
    """Class, length and, where it is cheap, a hash of the content of a data set.

    The content of a :class:`RecordDataset` is its file of records, that of a ``datasets.Dataset`` its fingerprint. Of
    a :class:`RecordStream`, the content is not known.
    """
    if dataset is None:
        return None
    name = type(dataset).__name__
    text = f"{name} of {len(dataset)} samples" if hasattr(dataset, "__len__") else name
    if isinstance(dataset, (RecordDataset, RecordStream)):
        return f"{text}, {dataset.fingerprint}"
    if isinstance(dataset, Subset):
        indices = hashlib.sha256(repr([int(index) for index in dataset.indices]).encode()).hexdigest()[:16]
        return f"{text}, index hash {indices}, of [{describe_dataset(dataset.dataset)}]"
    if isinstance(dataset, ConcatDataset):
        return f"{text}: [{'], ['.join(map(str, map(describe_dataset, dataset.datasets)))}]"
    fingerprint = getattr(dataset, "_fingerprint", None)
    return f"{text}, fingerprint {fingerprint}" if isinstance(fingerprint, str) else text


def data_settings(
    args: IDTrainingArguments, train_dataset: Dataset | None, general_dataset: Dataset | None
) -> dict[str, Any]:
    """What determines the batches of a run. A resumed run must have the same."""
    settings = {
        "train_dataset": describe_dataset(train_dataset),
        "general_dataset": describe_dataset(general_dataset),
        "stage": args.stage,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "number of processes": args.world_size,
        "train_sampling_strategy": args.train_sampling_strategy,
        "dataloader_drop_last": args.dataloader_drop_last,
    }
    for name in ("split_batches", "even_batches", "use_seedable_sampler"):
        settings[f"accelerator_config.{name}"] = getattr(args.accelerator_config, name)
    if not args.auto_find_batch_size:  # otherwise the Trainer restores the batch size that was found
        settings["per_device_train_batch_size"] = args.per_device_train_batch_size
    if args.image_features is not None:
        settings["image_features"] = True
    if args.packing:
        settings |= {"packing": True, "max_length": args.max_length}
    if general_dataset is not None:
        settings |= {"mixing_mode": args.mixing_mode, "mixing_ratio": args.mixing_ratio}
    return settings


def begin_checkpoint(folder: str | Path, args: IDTrainingArguments, settings: Mapping[str, Any], **state: int) -> None:
    """Write the run state of a checkpoint, before the Trainer writes everything else and ``trainer_state.json`` last.

    Args:
        folder: the checkpoint. An older ``trainer_state.json`` in it is removed, so that the folder is incomplete.
        args: the training arguments.
        settings: :func:`data_settings` of the run.
        state: further values that a resumed run needs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINER_STATE).unlink(missing_ok=True)
    run_state = {
        "settings": dict(settings),
        "world_size": args.world_size,
        "save_only_model": args.save_only_model,
        "save_on_each_node": args.save_on_each_node,
        **state,
    }
    (folder / RUN_STATE).write_text(json.dumps(run_state, indent=1) + "\n")


def read_run_state(folder: str | Path) -> dict[str, Any]:
    """The run state of a complete checkpoint."""
    return json.loads((Path(folder) / RUN_STATE).read_text())


def check_same_run(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Check that a run with ``settings`` reads the data that the run of the checkpoint would have read.

    Raises:
        ValueError: a setting has changed; the message names it with both values.
    """
    before = read_run_state(folder)["settings"]
    now = json.loads(json.dumps(dict(settings)))
    changed = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} belongs to a run with other data: {'; '.join(changed)}. Use the "
            "former values, start a new run in another output_dir, or set ignore_data_skip=True to continue with the "
            "new data from the start of an epoch."
        )


def group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Learning rate before scheduling, and weight decay, of each parameter group."""
    names = {"initial_lr": "learning rate", "weight_decay": "weight decay"}
    return [{text: group[name] for name, text in names.items() if name in group} for group in optimizer.param_groups]


def check_same_options(
    folder: str | Path, saved: Sequence[Mapping[str, float]], options: Sequence[Mapping[str, float]]
) -> None:
    """Check that the options of an optimizer are those of the checkpoint, which overwrites them.

    Raises:
        ValueError: an option of a parameter group has changed; the message names it with both values.
    """
    changed = [
        f"the {name} of parameter group {number} was {old} and is {new[name]}"
        for number, (group, new) in enumerate(zip(saved, options, strict=True))
        for name, old in group.items()
        if name in new and old != new[name]
    ]
    if changed:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} belongs to a run with another optimizer: {'; '.join(changed)}. "
            "The checkpoint would overwrite the new values. Use the former ones, or load its model with "
            "from_pretrained and start a new run."
        )


# --- Weights ---------------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of a checkpoint into ``model``, in place. All tensors of the model must be in the checkpoint.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; the message lists them.
    """
    saved = _read_weights(Path(folder))
    loaded, unexpected, misfits = saved_weights_by_module_name(model, saved)
    aliases = defaultdict(list)  # names of each tensor; of tied tensors, one name is saved
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases[id(tensor)].append(name)
    for names in aliases.values():
        known = next((loaded[name] for name in names if name in loaded), None)
        if known is not None:
            loaded |= dict.fromkeys(names, known)
    not_saved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    missing = sorted(model.state_dict().keys() - loaded.keys() - not_saved)
    _raise_faults(
        f"The weights in {str(folder)!r} do not fit {type(model).__name__}",
        missing=missing,
        unexpected=unexpected,
        different=misfits,
    )
    model.load_state_dict(loaded, strict=not not_saved)


def check_saved_by_adapter(model: nn.Module) -> None:
    """Check that the checkpoints of a PEFT model, which hold its adapters only, have all that is trained.

    Raises:
        ValueError: other parameters are trained; the message lists them.
    """
    from peft import get_peft_model_state_dict

    saved = set()
    for name in model.peft_config:
        saved |= {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, adapter_name=name).values()}
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.numel() and parameter.data_ptr() not in saved
    ]
    if lost:
        raise ValueError(
            f"{len(lost)} trained parameters are not part of the adapter, and PEFT would not save them: "
            f"{_shortened(lost)}. Name their modules in modules_to_save of the adapter's configuration, or freeze them."
        )


def check_adapter_weights(model: nn.Module, folder: str | Path, *, loaded: bool) -> None:
    """Check that a checkpoint has exactly the adapter weights of a PEFT model.

    Args:
        model: a PEFT model.
        folder: the checkpoint.
        loaded: whether PEFT has loaded the checkpoint, so that the values must be equal, too.

    Raises:
        ValueError: tensors are missing, unexpected or of other values; the message lists them.
    """
    from peft import get_peft_model_state_dict

    for name in model.active_adapters:
        files = [path / _ADAPTER_WEIGHTS for path in (Path(folder) / name, Path(folder))]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise ValueError(f"{str(folder)!r} has no weights of the adapter {name!r}; choose another checkpoint.")
        saved, present = load_file(file), get_peft_model_state_dict(model, adapter_name=name)
        shared = sorted(saved.keys() & present.keys())
        _raise_faults(
            f"The weights in {str(file)!r} do not fit the adapter {name!r} of the model",
            missing=sorted(present.keys() - saved.keys()),
            unexpected=sorted(saved.keys() - present.keys()),
            different=[key for key in shared if loaded and not torch.equal(saved[key].to(present[key]), present[key])],
        )


def _raise_faults(what: str, *, missing: list[str], unexpected: list[str], different: list[str]) -> None:
    faults = {"missing": missing, "unknown to the model": unexpected, "different": different}
    listed = [f"{len(names)} {fault}: {_shortened(names)}" for fault, names in faults.items() if names]
    if listed:
        raise ValueError(f"{what}. Tensors: {'; '.join(listed)}. Build the model as it was built for that run.")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / _WEIGHTS).is_file():
        return load_file(folder / _WEIGHTS)
    index = _read_json(folder / _WEIGHTS_INDEX)
    if index is None and (folder / _ADAPTER_WEIGHTS).is_file():
        raise ValueError(
            f"{str(folder)!r} holds the weights of an adapter only; wrap the model with peft.get_peft_model before "
            "it is passed to IDTrainer."
        )
    if index is None:
        raise ValueError(f"{str(folder)!r} has neither {_WEIGHTS} nor {_WEIGHTS_INDEX}; choose another checkpoint.")
    saved = {}
    for name in sorted(set(index["weight_map"].values())):
        saved |= load_file(folder / name)
    return saved


def _shortened(names: list[str]) -> str:
    more = f", and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
