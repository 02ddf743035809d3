"""Samples per second of training and of generation: this library's model and trainer against a bare loop and TRL.

    pip install "idavlm[trl]"
    python -m benchmarks.throughput

All models have the same vision tower, language model and number of image tokens, and read the same batches:

- base: ``LlavaForConditionalGeneration`` of transformers, in a bare loop and in TRL's ``SFTTrainer``;
- attached: the same with an ID-Former from ``attach_id_former``, all weights trained, with and without identities;
- own class, MLP: ``IDAVLMForConditionalGeneration`` with the same connector as base;
- own class, ID-Former: with an ID-Former, once on batches with identities, once with the same images as general images.

Both loops of a model take turns, and every model takes part in every round. All of them read the same batches in the
same order. A step of a trainer lasts from the start of one step to the start of the next. "Loop overhead" compares it
with the step of the bare loop on the same batch: forward, backward, clipping, optimizer and scheduler. "Time" compares
a step of the bare loop with that of base on the same batch. Both are medians over all pairs of steps. The loss is that
of the text alone, without boxes. Without TRL its rows are left out.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TrainerCallback,
    get_linear_schedule_with_warmup,
)

from benchmarks.generation import CHARACTERS
from idavlm import (
    IDAVLMForConditionalGeneration,
    IDTrainer,
    IDTrainingArguments,
    RecordDataset,
    attach_id_former,
)
from idavlm.datasets import build_characters
from idavlm.experimental.small_models import small_language_model, small_processor
from idavlm.utils import ImageRole, describe_machine, markdown_table

BASE = "base (LLaVA of transformers)"
ATTACHED = "attached ID-Former, no identities"
ATTACHED_WITH = "attached ID-Former, identities"
MLP = "own class, MLP"
WITHOUT = "own class, ID-Former, no identities"
WITH = "own class, ID-Former, identities"
LEARNING_RATE = 1e-4


def build_models(processor, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The models to compare. ``processor`` has as many tokens per image as the tower has patches."""
    vision = CLIPVisionConfig(
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )

    def language_model():
        return small_language_model(
            processor.tokenizer, hidden_size=args.hidden_size, num_hidden_layers=args.layers
        ).train()

    def llava():
        config = LlavaConfig(
            vision_config=vision,
            text_config=language_model().config,
            image_token_index=processor.image_token_id,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
        return LlavaForConditionalGeneration(config)

    torch.manual_seed(0)
    identity = {"num_heads": 4, "null_token": True, "gate": "none"}
    identity |= {"identity_embedding": "learned", "max_identities": 8}
    base, attached = llava(), attach_id_former(llava(), freeze_model=False, **identity)
    own = {
        connector: IDAVLMForConditionalGeneration.from_parts(
            CLIPVisionModel(vision), language_model(), processor=processor, connector=connector, **options
        )
        for connector, options in (("mlp2x_gelu", {}), ("id_former", {"num_queries": 64, **identity}))
    }
    return {
        BASE: base,
        ATTACHED: attached,
        ATTACHED_WITH: attached,
        MLP: own["mlp2x_gelu"],
        WITHOUT: own["id_former"],
        WITH: own["id_former"],
    }


def as_general(batch: dict) -> dict:
    """The same batch, whose images are general images."""
    return {**batch, "image_roles": torch.full_like(batch["image_roles"], ImageRole.GENERAL)}


def for_base(batch: dict) -> dict:
    """The part of the batch that LLaVA takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "pixel_values") if name in batch}


def for_attached(batch: dict, num_image_tokens: int) -> dict:
    """The part of the batch that LLaVA with an attached ID-Former takes."""
    roles = {name: batch[name] for name in ("image_roles", "sample_index", "identity_index")}
    return {**for_base(batch), **roles, "num_image_tokens": torch.full_like(batch["image_roles"], num_image_tokens)}


def collators(processor, padding_side: str = "right") -> dict[str, Callable[[list], dict]]:
    """How the samples of a batch become the inputs of each model."""

    def collate(samples: list) -> dict:
        batch = processor.collate(samples, padding_side=padding_side)
        return {name: x for name, x in batch.items() if "box" not in name}

    return {
        BASE: lambda samples: for_base(collate(samples)),
        ATTACHED: lambda samples: for_base(collate(samples)),
        ATTACHED_WITH: lambda samples: for_attached(collate(samples), processor.image_seq_length),
        MLP: collate,
        WITHOUT: lambda samples: as_general(collate(samples)),
        WITH: collate,
    }


def bare_steps(model: nn.Module, loader: DataLoader) -> Iterator[float]:
    """Seconds of each step of a plain training loop."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, len(loader))
    model.train()
    start = time.perf_counter()
    for batch in loader:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        now = time.perf_counter()
        yield now - start
        start = now


class _StepTimes(TrainerCallback):
    """Seconds from the start of a step to the start of the next."""

    def __init__(self):
        self.starts: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.starts.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.starts, self.starts[1:], strict=False)]


def trainer_steps(trainer_class, arguments_class, model, dataset, collate, folder, args, **options) -> list[float]:
    """Seconds of each step of a trainer with the settings of the bare loop."""
    times = _StepTimes()
    arguments = arguments_class(
        output_dir=str(folder),
        max_steps=args.steps + 2,
        per_device_train_batch_size=args.batch_size,
        learning_rate=LEARNING_RATE,
        optim="adamw_torch_fused",
        lr_scheduler_type="linear",
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        **options,
    )
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=dataset, data_collator=collate, callbacks=[times]
    )
    trainer.train()
    return times.seconds()[1:]  # the first step creates the state of the optimizer


def sft_steps(model, dataset, collate, processor, folder, args) -> list[float]:
    """The same for TRL's ``SFTTrainer``, whose preparation of data is skipped: the samples are encoded already."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Trainer(SFTTrainer):
        def __init__(self, *, train_dataset, data_collator, **kwargs):
            rows = Dataset.from_dict({"number": list(range(len(train_dataset)))})

            def by_number(examples):
                return data_collator([train_dataset[example["number"]] for example in examples])

            super().__init__(
                train_dataset=rows, data_collator=by_number, processing_class=processor.tokenizer, **kwargs
            )

    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}
    return trainer_steps(Trainer, SFTConfig, model, dataset, collate, folder, args, **options)


def measure_training(models, dataset, processor, folder: Path, args) -> list[list[object]]:
    """Rows: model, loop, milliseconds, samples per second, time relative to base, overhead of the loop."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    collate = collators(processor)
    has_trl = _installed("trl")
    for _ in range(args.rounds):
        for name, model in models.items():
            loader = DataLoader(dataset, args.batch_size, collate_fn=collate[name], drop_last=True)
            seconds[name, "bare loop"] += list(bare_steps(model, loader))[1 : args.steps + 1]
            if name in (BASE, ATTACHED_WITH, WITH):
                seconds[name, "IDTrainer"] += trainer_steps(
                    IDTrainer, IDTrainingArguments, model, dataset, collate[name], folder, args
                )
            if name == BASE and has_trl:
                seconds[name, "SFTTrainer"] += sft_steps(model, dataset, collate[name], processor, folder, args)
    rows = []
    for (name, loop), values in seconds.items():
        step, bare = statistics.median(values), loop == "bare loop"
        time_ = _median_ratio(values, seconds[BASE, "bare loop"])
        overhead = _median_ratio(values, seconds[name, "bare loop"]) - 1
        row = [name, loop, f"{1000 * step:.0f}", f"{args.batch_size / step:.1f}"]
        rows.append([*row, f"{time_:.2f}x" if bare else "", "" if bare else f"{overhead:+.1%}"])
    return rows


def _median_ratio(values: list[float], others: list[float]) -> float:
    """Median ratio of the times of the same steps."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


class _Stopwatch:
    """Seconds that modules spend forward and backward."""

    def __init__(self, modules: list[nn.Module]):
        self.seconds, self._start = 0.0, 0.0
        self.handles = []
        for module in modules:
            self.handles += [
                module.register_forward_pre_hook(self._begin),
                module.register_forward_hook(self._end),
                module.register_full_backward_pre_hook(self._begin),
                module.register_full_backward_hook(self._end),
            ]

    def _begin(self, *_) -> None:
        self._start = time.perf_counter()

    def _end(self, *_) -> None:
        self.seconds += time.perf_counter() - self._start

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def measure_share(models, dataset, processor, args) -> list[list[object]]:
    """Share of a training step that the identity layers take, and the whole ID-Former of the own class."""
    watched = {
        (ATTACHED_WITH, "identity attention"): list(models[ATTACHED_WITH].id_former.identity_layers),
        (WITH, "identity attention"): list(models[WITH].id_former.identity_layers),
        (WITH, "whole ID-Former, resampler included"): [models[WITH].id_former],
    }
    rows = []
    for (name, part), modules in watched.items():
        loader = DataLoader(
            dataset, args.batch_size, shuffle=True, collate_fn=collators(processor)[name], drop_last=True
        )
        watch, shares = _Stopwatch(modules), []
        for number, step in enumerate(bare_steps(models[name], loader)):
            shares += [watch.seconds / step] if number else []
            watch.seconds = 0.0
            if number == args.steps:
                break
        watch.remove()
        rows.append([name, part, f"{statistics.median(shares):.1%}"])
    return rows


@torch.no_grad()
def measure_generation(models, samples, processor, args) -> list[list[object]]:
    """Rows: model, samples per second of generating answers of a fixed length."""
    collate, seconds = collators(processor, padding_side="left"), defaultdict(list)
    for round_ in range(args.rounds + 1):
        for name, model in models.items():
            batch = {key: value for key, value in collate[name](samples).items() if key != "labels"}
            model.eval()
            start = time.perf_counter()
            length = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.max_new_tokens}
            model.generate(**batch, **length, do_sample=False)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        [name, f"{args.batch_size / value:.1f}", f"{medians[BASE] / value:.2f}x"] for name, value in medians.items()
    ]


def _installed(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=128, help="width of tower and language model (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers of each (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="samples per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="length of answers (default: %(default)s)")
    parser.add_argument("--records", type=int, default=320, help="training records to draw (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = build_characters(Path(folder) / "data", **CHARACTERS | {"num_train_records": args.records})
        samples = list(RecordDataset(data / "train.jsonl"))
        processor = small_processor(samples, image_size=64, image_seq_length=64)
        models = build_models(processor, args)
        dataset = [processor.encode(sample) for sample in samples[: args.batch_size * (args.steps + 2)]]
        test = list(RecordDataset(data / "test.jsonl"))[: args.batch_size]
        questions = [processor.encode(sample, add_generation_prompt=True) for sample in test]
        print(describe_machine(next(models[BASE].parameters()).device), f"medians of {args.rounds} rounds", sep="; ")
        training = measure_training(models, dataset, processor, Path(folder) / "checkpoints", args)
        print("\nTraining\n")
        print(markdown_table(["model", "loop", "ms per step", "samples/s", "time", "loop overhead"], training))
        print("\nShare of a training step (bare loop, identities)\n")
        print(markdown_table(["model", "part", "share"], measure_share(models, dataset, processor, args)))
        print(f"\nGeneration of {args.max_new_tokens} tokens, batch of {args.batch_size}\n")
        generation = measure_generation(models, questions, processor, args)
        print(markdown_table(["model", "samples/s", "relative to base"], generation))


if __name__ == "__main__":
    main()
