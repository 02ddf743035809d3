"""Every option of transformers' Trainer is honoured by IDTrainer, refused, or unrelated to losses and data."""

import inspect
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from idavlm.data import RecordDataset
from idavlm.training import IDTrainer, IDTrainingArguments
from tests.interrupted_run import write_data
from tests.small_models import small_model, small_processor

# Treatment of every option. A new option of transformers makes the test below fail: look whether the hooks that
# IDTrainer overrides follow it, and add it here.
HONOURED = {  # options that touch losses or data, and that the Trainer's own code follows in IDTrainer, too
    "auto_find_batch_size",
    "batch_eval_metrics",
    "data_seed",
    "dataloader_drop_last",
    "dataloader_in_order",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "full_determinism",
    "gradient_accumulation_steps",
    "ignore_data_skip",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "length_column_name",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "prediction_loss_only",
    "seed",
    "torch_empty_cache_steps",
    "train_sampling_strategy",
}
REFUSED = {  # a value that is refused, and a part of the message
    "accelerator_config": ({"dispatch_batches": True}, r"accelerator_config\.dispatch_batches=True splits a batch"),
    "average_tokens_across_devices": (False, "average_tokens_across_devices=False has no effect"),
    "label_names": (["answers"], r"label_names=\['answers'\] has no effect"),
    "label_smoothing_factor": (0.1, r"label_smoothing_factor=0\.1 has no effect"),
    "logging_nan_inf_filter": (True, "logging_nan_inf_filter=True hides losses"),
    "remove_unused_columns": (True, "remove_unused_columns=True removes image roles"),
    "use_liger_kernel": (True, "use_liger_kernel=True has no effect"),
}
REFUSED_IN_PRETRAINING = {
    "neftune_noise_alpha": (5.0, r"neftune_noise_alpha=5\.0 has no effect with stage='identity_pre")
}
TESTED_BELOW = {"parallelism_config"}
UNRELATED_TEXT = """
output_dir learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
adam_beta2 adam_epsilon optim_target_modules bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
torch_compile_backend torch_compile_mode liger_kernel_config use_cache logging_strategy logging_steps
logging_first_step log_on_each_node log_level log_level_replica disable_tqdm report_to run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start
save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub
hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
metric_for_best_model greater_is_better restore_callback_states_from_checkpoint use_cpu ddp_find_unused_parameters
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
"""
UNRELATED = set(UNRELATED_TEXT.split())
HONOURED_PARAMETERS = {
    "args",
    "callbacks",
    "compute_metrics",
    "data_collator",
    "eval_dataset",
    "model",
    "optimizer_cls_and_kwargs",
    "optimizers",
    "preprocess_logits_for_metrics",
    "processing_class",
    "train_dataset",
}
REFUSED_PARAMETERS = {"compute_loss_func", "model_init"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def arguments(tmp_path, **options) -> IDTrainingArguments:
    defaults = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "save_strategy": "no"}
    return IDTrainingArguments(str(tmp_path), **(defaults | {"per_device_train_batch_size": 2} | options))


def records(data, name="train") -> RecordDataset:
    return RecordDataset(data / f"{name}.jsonl", data / "images", encode=small_processor().encode)


def test_the_treatment_of_every_option_is_known():
    groups = [HONOURED, REFUSED.keys(), REFUSED_IN_PRETRAINING.keys(), TESTED_BELOW, UNRELATED]
    known = set().union(*groups)
    assert len(known) == sum(map(len, groups)), "an option is in two groups"
    assert {field.name for field in fields(TrainingArguments)} <= known
    parameters = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert parameters <= HONOURED_PARAMETERS | REFUSED_PARAMETERS


@pytest.mark.parametrize("name", REFUSED)
def test_options_without_effect_are_refused(tmp_path, name):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize("name", REFUSED_IN_PRETRAINING)
def test_options_without_effect_are_refused_in_identity_pretraining(tmp_path, name):
    value, message = REFUSED_IN_PRETRAINING[name]
    arguments(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, stage="identity_pretraining", **{name: value})


def test_context_parallelism_is_refused(tmp_path):
    class Parallelism:
        cp_size = 2

    checked = arguments(tmp_path)
    checked.parallelism_config = Parallelism()
    with pytest.raises(
        ValueError, match=r"parallelism_config=.* with context or sequence parallelism separates tokens"
    ):
        checked._check_inherited()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_init": lambda: small_model(small_processor())}, "model_init is not supported"),
        ({"compute_loss_func": lambda *_: 0}, "compute_loss_func=.* has no effect: the model computes the losses"),
    ],
)
def test_parameters_without_effect_are_refused(tmp_path, options, message):
    model = None if "model_init" in options else small_model(small_processor())
    with pytest.raises(ValueError, match=message):
        IDTrainer(model, arguments(tmp_path), **options)


def test_metrics_of_logits_are_refused_in_identity_pretraining(tmp_path):
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"{name}=.* has no effect with stage='identity_pretraining'"):
            IDTrainer(
                small_model(small_processor()),
                arguments(tmp_path, stage="identity_pretraining"),
                **{name: lambda *_: {}},
            )


@pytest.mark.parametrize(("name", "value"), [("mixing_ratio", 0.3), ("mixing_mode", "joint")])
def test_options_of_mixing_need_a_general_data_set(data, tmp_path, name, value):
    model, options = small_model(small_processor()), arguments(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=f"{name}={value!r} has no effect without general_dataset"):
        IDTrainer(model, options, train_dataset=records(data))
    IDTrainer(model, options)  # to evaluate


def test_an_optimizer_class_is_used_with_rates_of_modules(data, tmp_path):
    options = {"module_learning_rates": {"id_former": 1e-3}}
    trainer = IDTrainer(
        small_model(small_processor()),
        arguments(tmp_path, **options),
        train_dataset=records(data),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.5}),
    )
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}


def test_batches_of_an_iterable_data_set_are_not_split(data, tmp_path):
    """accelerate would cut all tensors of a batch to the number of samples, although there are more images."""

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(list(records(data)))

    def train(**options):
        processor = small_processor()
        model = small_model(processor)
        IDTrainer(model, arguments(tmp_path, **options), train_dataset=Stream(), processing_class=processor).train()

    with pytest.raises(ValueError, match=r'IterableDataset.*set accelerator_config=\{"dispatch_batches": False\}'):
        train()
    train(accelerator_config={"dispatch_batches": False})


def test_a_smaller_batch_size_is_found(tmp_path):
    """The losses of the attempt that failed are not logged."""
    attempts = []

    class OutOfMemory(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            attempts.append(len(x))
            if len(x) > 2 and len(attempts) > 1:
                raise RuntimeError("CUDA out of memory.")
            return {"loss": self.weight.sum() * len(x)}

    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "logging_steps": 2, "learning_rate": 0.0}
    trainer = IDTrainer(OutOfMemory(), arguments(tmp_path, **options), train_dataset=[{"x": 1.0}] * 8)
    trainer.train()
    assert attempts[:3] == [4, 4, 2] or attempts[:3] == [4, 4, 3]
    assert attempts[-2:] == [2, 2]
    assert trainer.state.log_history[0]["loss_identity"] == 2


def test_general_records_are_refused_in_identity_pretraining(data, tmp_path):
    samples = [records(data)[0], records(data, "general")[1]]
    processor = small_processor()
    trainer = IDTrainer(
        small_model(processor),
        arguments(tmp_path, stage="identity_pretraining"),
        train_dataset=samples,
        processing_class=processor,
    )
    with pytest.raises(ValueError, match=r"the batch has general records among (0, g1|g1, 0); remove the records"):
        trainer.train()


def test_joint_batches_need_labels(data, tmp_path):
    processor = small_processor()
    trainer = IDTrainer(small_model(processor), arguments(tmp_path))
    batch = processor.collate([records(data)[0], records(data, "general")[0]])
    del batch["labels"]
    with pytest.raises(ValueError, match="a batch of two sources needs 'labels'"):
        trainer.compute_loss(trainer.model, batch)
