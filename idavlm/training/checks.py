"""Checks of what IDTrainer is given: options of transformers that it does not follow, the model, and the data."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from idavlm.models import IDAVLMForConditionalGeneration
from idavlm.models.attach import image_features_with_identities
from idavlm.models.packed_attention import check_packable
from idavlm.training.arguments import IDTrainingArguments

TRAIN_MORE = (
    "train more of the model (attach_id_former(..., freeze_model=False), or LoRA of peft on the language model), or "
    "train on identity data alone"
)


def check_loader(loader: DataLoader) -> None:
    """Refuse a loader that splits batches after they were collated, as accelerate does with an IterableDataset."""
    if any(kind.__name__ == "DataLoaderDispatcher" for kind in type(loader).__mro__):
        raise ValueError(
            "the data set is an IterableDataset, whose batches accelerate splits between a sample and its images; set "
            'accelerator_config={"dispatch_batches": False}.'
        )


def check_pretraining_batch(batch: Mapping[str, Any], sample_ids: list[str]) -> None:
    """Check that a batch has boxes and no general samples."""
    if batch.get("boxes") is None:
        raise ValueError("stage='identity_pretraining' needs boxes, but the batch has no field 'boxes'.")
    sources = batch.get("source", "identity")
    sources = {sources} if isinstance(sources, str) else set(sources)
    if sources != {"identity"}:
        raise ValueError(
            "stage='identity_pretraining' trains on boxes of identities, but the batch has general records"
            f"{' among ' + ', '.join(map(str, sample_ids)) if sample_ids else ''}; remove the records whose source is "
            "'general'."
        )


def check_inherited(model: nn.Module | None, args: IDTrainingArguments, options: dict[str, Any]) -> None:
    """Refuse arguments of ``Trainer`` that the hooks of this class do not follow."""
    if model is None or options.get("model_init") is not None:
        raise ValueError(
            "model_init is not supported, because a new model would lose what freeze and workflow set; pass model, and "
            "build a new trainer for every run."
        )
    if options.get("compute_loss_func") is not None:
        raise ValueError(
            f"compute_loss_func={options['compute_loss_func']!r} has no effect: the model computes the losses per "
            "source; return the loss from the model, or override IDTrainer.compute_loss."
        )
    if args.stage == "identity_pretraining":
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name}={options[name]!r} has no effect with stage='identity_pretraining', which has no logits; "
                    "use task_evaluation."
                )


def check_mixing(args: IDTrainingArguments, train_dataset: Dataset | None, general_dataset: Dataset | None) -> None:
    """Refuse options of mixing without a second data set."""
    if train_dataset is None or general_dataset is not None:
        return
    for name in ("mixing_ratio", "mixing_mode"):
        value, default = getattr(args, name), IDTrainingArguments.__dataclass_fields__[name].default
        if value != default:
            raise ValueError(f"{name}={value!r} has no effect without general_dataset; pass one, or leave it out.")


def check_packing(model: nn.Module, args: IDTrainingArguments, processing_class: Any) -> None:
    """Check that the model and the processor can be trained on packed rows."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise ValueError(
            f"packing=True needs the padding token of a tokenizer, but processing_class={type(processing_class)} has "
            "none; pass the processor as processing_class, with a tokenizer whose pad_token is set."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"packing=True needs a model of idavlm or transformers, but model is {type(model).__name__}; use "
            "packing=False."
        )
    check_packable(model, max_length=args.max_length)


def check_general_data(model: nn.Module, general_dataset: Dataset | None) -> None:
    """Refuse general data if only an attached ID-Former is trained, which images without references do not use."""
    is_attached = any(image_features_with_identities(module) is not None for module in model.modules())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if general_dataset is not None and is_attached and all("id_former" in name.split(".") for name in trained):
        raise ValueError(
            f"general_dataset trains nothing: only the attached id_former of {type(model).__name__} is trained, and "
            f"general data does not use it; {TRAIN_MORE} (leave general_dataset out)."
        )


def has_contrastive_loss(model: nn.Module) -> bool:
    """Whether a model computes the contrastive loss of an ID-Former."""
    for module in model.modules():
        attached = image_features_with_identities(module)
        if attached is not None:
            return bool(attached.loss_weights["contrastive_loss"])
        if isinstance(module, IDAVLMForConditionalGeneration):
            return module.id_former is not None and bool(module.config.contrastive_loss_weight)
    return False


def check_trains(loss: Tensor, sample_ids: list[str]) -> None:
    """Check that a training loss depends on a trained parameter."""
    if torch.is_grad_enabled() and not loss.requires_grad:
        ids = ", ".join(map(str, sample_ids)) or "without ids"
        raise ValueError(
            f"a batch trains nothing ({ids}). Its loss depends on no parameter that is trained; an "
            "attached id_former trains on samples with references only. Remove "
            f"records without identities, or {TRAIN_MORE}."
        )


def check_stage(model: nn.Module, args: IDTrainingArguments, general_dataset: Dataset | None) -> None:
    """Check that model and data have what the stage needs."""
    named = model.named_modules()
    id_former = next((module for path, module in named if path.rpartition(".")[-1] == "id_former"), None)
    if args.stage == "identity_pretraining":
        if id_former is None:
            raise ValueError(
                f"stage='identity_pretraining' trains an ID-Former, which {type(model).__name__} does not have."
            )
        if general_dataset is not None:
            raise ValueError(
                "general_dataset has no effect with stage='identity_pretraining', which trains on boxes of identities; "
                "leave it out."
            )
    if args.teacher_forcing_steps and getattr(id_former, "identity_embedding_type", None) is None:
        raise ValueError(
            f"teacher_forcing_steps={args.teacher_forcing_steps} needs an ID-Former with identity_embedding, which "
            f"{type(model).__name__} does not have; set it to 0."
        )
