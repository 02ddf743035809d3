"""One run of a case: training, saving, resuming, evaluation and generation, and what is kept of it to compare."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from idavlm.models import detach_id_former, load_id_former, save_id_former
from idavlm.modules import load_adaptors, save_adaptors, use_workflow
from idavlm.training import IDTrainer, IDTrainingArguments, fully_shard_model
from idavlm.training.checks import has_contrastive_loss
from idavlm.training.losses import count_losses, sum_counts
from idavlm.utils.sharding import num_processes, whole_state_dict
from tests.distributed import cases

SAVE_AT, STEPS = 2, 4

STRATEGIES = ("one process", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "FSDP2 by hand")

DTYPES = {"ZeRO-2": torch.float32, "ZeRO-3": torch.float32}
"""DeepSpeed has no float64; all others run in it."""


def deepspeed_config(stage: int) -> dict[str, Any]:
    """Small buckets, and no parameter that is not partitioned: as with a large model."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 5000,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 5000,
        },
    }


class Recorded(IDTrainer):
    """Keeps the exact loss of every micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorded: list[torch.Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if model.training:
            self.recorded.append(loss.detach().double())
        return result

    def losses(self) -> torch.Tensor:
        """The loss of the global batch of every step."""
        losses = torch.stack(self.recorded).view(-1, self.args.gradient_accumulation_steps).sum(1)
        return mean_over_processes(losses)


def mean_over_processes(losses: torch.Tensor) -> torch.Tensor:
    if num_processes() > 1:
        dist.all_reduce(losses)
    return losses / num_processes()


class FSDPOnCPU(Accelerator):
    """accelerate with its FSDP plugin on a CPU, where it would use DDP."""

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.state.fsdp_plugin = fsdp_plugin
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


@contextlib.contextmanager
def strategy_environment(strategy: str) -> Iterator[None]:
    """Forget the accelerator of the run before, and within the block make accelerate use ``strategy``."""
    group = dist.is_initialized()
    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    with pytest_monkeypatch() as patch:
        patch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
        patch.delenv("ACCELERATE_USE_FSDP", raising=False)
        if strategy == "FSDP2":
            patch.setattr("transformers.trainer.Accelerator", FSDPOnCPU)
        if strategy.startswith("ZeRO"):  # without GPUs, accelerate would take each process for the only one
            patch.setattr(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_CPU))
        yield
    assert dist.is_initialized() or not group


@contextlib.contextmanager
def pytest_monkeypatch():
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        yield patch


def arguments(folder: Path, strategy: str, name: str, *, accumulation: int = 1, **options) -> IDTrainingArguments:
    batch_size = cases.SAMPLES_PER_BATCH
    if strategy == "one process" and accumulation == 1:
        batch_size *= 2
    if strategy.startswith("ZeRO"):
        options["deepspeed"] = deepspeed_config(int(strategy[-1]))
    elif strategy == "FSDP2":
        options["fsdp"] = True
    return IDTrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        save_steps=SAVE_AT,
        logging_steps=1,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # otherwise the first steps depend on the signs of gradients of 1e-10
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=1.0,
        freeze=cases.FREEZE.get(name, []),
        workflow=cases.WORKFLOW.get(name),
        loss_weights={"identity": 0.5, "general": 2.0},
        use_cpu=not strategy.startswith("ZeRO"),
        disable_tqdm=True,
        report_to=[],
        **options,
    )


def trainer_of(folder: Path, strategy: str, name: str, kind: str, images: Path, **options) -> Recorded:
    model, processor = cases.build(name, DTYPES.get(strategy, options.pop("dtype", torch.float64)))
    letters = "".join(cases.KINDS[kind])
    dataset = cases.samples(letters, processor, images)
    return Recorded(
        model,
        arguments(folder, strategy, name, **options),
        train_dataset=dataset,
        eval_dataset=dataset[: 4 * cases.SAMPLES_PER_BATCH],
        processing_class=processor,
    )


def run(folder: Path, strategy: str, name: str, kind: str, images: Path, **options) -> dict[str, Any]:
    """Train, resume, evaluate and generate; returns what has to be equal, and checks what can be checked here."""
    if strategy == "FSDP2 by hand":
        with strategy_environment("DDP"):
            return run_by_hand(folder, name, kind, images, **options)
    with strategy_environment(strategy):
        trainer = trainer_of(folder, strategy, name, kind, images, **options)
        trainer.train()
        check_engine_class(trainer, strategy)
        found = {"losses": trainer.losses(), "weights": whole_state_dict(trainer.model)}
        found["eval"] = {key: value for key, value in trainer.evaluate().items() if "loss" in key}
        if has_contrastive_loss(trainer.model):  # in an evaluation it compares the identities of a batch
            del found["eval"]["eval_loss"]
        if strategy != "one process":
            generate(trainer.model, trainer.processing_class, images, name)
            save_parts(trainer.model, folder, found["weights"], name)
    if strategy == "one process":
        state = trainer.optimizer.state
        found["unused"] = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p not in state]
        return found
    with strategy_environment(strategy):
        resumed = trainer_of(folder, strategy, name, kind, images, **options)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVE_AT}"))
        found["resumed"] = torch.equal(resumed.losses(), found["losses"][SAVE_AT:]) and equal_weights(
            whole_state_dict(resumed.model), found["weights"]
        )
    return found


def run_by_hand(folder: Path, name: str, kind: str, images: Path, **options) -> dict[str, Any]:
    """FSDP2 without accelerate: ``fully_shard_model`` and a loop."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    def sharded():
        trainer = trainer_of(folder, "FSDP2 by hand", name, kind, images, **options)
        fully_shard_model(trainer.model)
        return trainer, trainer.create_optimizer()

    def train(trainer, optimizer, steps):
        batches = list(trainer.get_train_dataloader())
        for step in steps:
            batch = trainer._prepare_inputs(batches[step])
            (batch["loss_counts"],) = counts = count_losses([batch])
            total = sum_counts(counts, trainer.accelerator)
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=total).backward()
            nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    trainer, optimizer = sharded()
    train(trainer, optimizer, range(SAVE_AT))
    state = get_state_dict(trainer.model, optimizer)
    state = [{key: clone(value) for key, value in part.items()} for part in state]
    train(trainer, optimizer, range(SAVE_AT, STEPS))
    found = {"losses": trainer.losses(), "weights": whole_state_dict(trainer.model)}
    generate(trainer.model, trainer.processing_class, images, name)
    save_parts(trainer.model, folder, found["weights"], name)
    resumed, optimizer = sharded()
    # Not strict: the pooler of the tower gets no gradient, so the optimizer has no state of it.
    set_state_dict(
        resumed.model,
        optimizer,
        model_state_dict=state[0],
        optim_state_dict=state[1],
        options=StateDictOptions(strict=False),
    )
    train(resumed, optimizer, range(SAVE_AT, STEPS))
    found["resumed"] = torch.equal(resumed.losses(), found["losses"][SAVE_AT:]) and equal_weights(
        whole_state_dict(resumed.model), found["weights"]
    )
    return found


def clone(value):
    if isinstance(value, dict):
        return {key: clone(part) for key, part in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def check_engine_class(trainer: IDTrainer, strategy: str) -> None:
    """accelerate runs DDP where it cannot run what was asked for."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    kind = type(trainer.model_wrapped).__name__
    if strategy == "DDP":
        assert isinstance(trainer.model_wrapped, DistributedDataParallel), kind
    elif strategy.startswith("ZeRO"):
        assert kind == "DeepSpeedEngine", kind
        assert trainer.accelerator.num_processes == num_processes()
        assert trainer.model_wrapped.zero_optimization_stage() == int(strategy[-1])
    elif strategy == "FSDP2":
        assert isinstance(trainer.model_wrapped, FSDPModule), kind
        units = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)]
        assert len(units) > 4, "layers are units"


def generate(model: nn.Module, processor, images: Path, name: str) -> None:
    """Each process has a prompt of another kind, and another number of new tokens to write."""
    rank = dist.get_rank()
    for letters in ("IT", "GI", "TT"):
        batch = cases.prompt(letters[rank], processor, images)
        workflow = cases.WORKFLOW.get(name)
        model.eval()
        with use_workflow(model, workflow) if workflow else contextlib.nullcontext(), torch.no_grad():
            model.generate(**batch, max_new_tokens=2 + 2 * rank, do_sample=False, synced_gpus=True)


def save_parts(model: nn.Module, folder: Path, weights: dict[str, torch.Tensor], name: str) -> None:
    """``save_id_former`` and ``save_adaptors`` write the whole tensors of the run."""
    unset_hf_deepspeed_config()  # new models are whole
    if name.startswith("attached"):
        save_id_former(model, folder / "parts")
        other, _ = cases.build(name, torch.float64)
        detach_id_former(other)
        other.load_state_dict({k: v for k, v in weights.items() if not k.startswith("id_former.")})
        load_id_former(other, folder / "parts")
        loaded = other.id_former.state_dict()
        assert loaded
        assert all(torch.equal(v, weights[f"id_former.{k}"].to(v)) for k, v in loaded.items())
    if "adaptors" in name:
        save_adaptors(model, folder / "parts")
        other, _ = cases.build(name, torch.float64)
        base = {k: v for k, v in weights.items() if "inner_adaptor" not in k}
        other.load_state_dict(base, strict=False)
        load_adaptors(other.language_model, folder / "parts")
        assert equal_weights(
            {k: v for k, v in other.state_dict().items() if "inner_adaptor" in k},
            {k: v.double() for k, v in weights.items() if "inner_adaptor" in k},
        )


def equal_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def timed(function, *args, **kwargs):
    start = time.time()
    return function(*args, **kwargs), time.time() - start
