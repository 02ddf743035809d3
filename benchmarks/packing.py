"""Tokens per second of padded, length-grouped and packed batches, and the cost of ``DualDataLoader``.

    OMP_NUM_THREADS=1 python -m benchmarks.packing

Time is processor time of the process, so other work on the machine matters little. It needs one thread.
All batches have the same number of samples of the drawn characters, identity and general records mixed. The orders and
collators take turns, one training step each, on one model: forward, backward, clipping, optimizer, and the collation of
encoded samples. "tokens/s" counts tokens of samples, not padding. "padding" is the share of padding among the tokens
that the language model computes.

The second table compares ``DualDataLoader`` with a plain ``DataLoader`` that reads the same batches, step by step in
turn. "loader" is the time to get a batch, "step" that of the batch and the training step; the difference is the median
over pairs of steps, also as a share of a step.
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
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Sampler

from benchmarks.generation import CHARACTERS
from idavlm import DualDataLoader, IDAVLMForConditionalGeneration, RecordDataset
from idavlm.data import LengthGroupedSampler, PackingCollator
from idavlm.datasets import build_characters
from idavlm.experimental.small_models import small_language_model, small_processor, small_vision_tower
from idavlm.utils import describe_machine, markdown_table

LOADER_FIELDS = ("source", "sample_source", "sample_ids")


def build_model(processor, args: argparse.Namespace) -> IDAVLMForConditionalGeneration:
    torch.manual_seed(0)
    return IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=128),
        small_language_model(processor.tokenizer, hidden_size=args.hidden_size, num_hidden_layers=args.layers),
        processor=processor,
        num_queries=16,
        num_heads=4,
        null_token=True,
        identity_embedding="learned",
        max_identities=4,
        gate="none",
    ).train()


class Training:
    """One training step after the other of one model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(self, batch: dict) -> None:
        inputs = {name: value for name, value in batch.items() if name not in LOADER_FIELDS}
        self.model(**inputs).loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def endless(loader: DataLoader) -> Iterator[dict]:
    epoch = 0
    while True:
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def loaders(encoded: list, processor, args: argparse.Namespace) -> dict[str, DataLoader]:
    lengths = [len(sample["input_ids"]) for sample in encoded]
    pad = processor.tokenizer.pad_token_id

    def packing(max_length: int | None) -> PackingCollator:
        return PackingCollator(processor.collate, pad_token_id=pad, max_length=max_length)

    def loader(collate: Callable, sampler: Sampler | None = None) -> DataLoader:
        sampler = sampler or RandomSampler(encoded, generator=torch.Generator().manual_seed(0))
        return DataLoader(encoded, args.batch_size, sampler=sampler, collate_fn=collate, drop_last=True)

    longest = max(lengths)
    grouped = LengthGroupedSampler(lengths, batch_size=args.batch_size)
    return {
        "padded, random order": loader(processor.collate),
        "padded, grouped by length": loader(processor.collate, grouped),
        f"packed, rows of up to {longest} (the longest sample)": loader(packing(longest)),
        f"packed, rows of up to {2 * longest}": loader(packing(2 * longest)),
        "packed, one row per batch": loader(packing(None)),
    }


def measure_orders(training: Training, encoded: list, processor, args: argparse.Namespace) -> list[list[object]]:
    streams = {name: endless(loader) for name, loader in loaders(encoded, processor, args).items()}
    seconds, tokens, computed = defaultdict(list), defaultdict(list), defaultdict(int)
    for number in range(args.steps + 1):
        for name, stream in streams.items():
            start = time.process_time()
            batch = next(stream)
            training.step(batch)
            if number:  # the first step is a warm-up
                seconds[name].append(time.process_time() - start)
                is_token = (
                    batch["token_sample_index"] >= 0 if "token_sample_index" in batch else batch["attention_mask"]
                )
                tokens[name].append(int(is_token.sum()))
                computed[name] += is_token.numel()
    rates = {name: sum(tokens[name]) / sum(seconds[name]) for name in streams}
    base = next(iter(rates.values()))
    return [
        [
            name,
            f"{1 - sum(tokens[name]) / computed[name]:.1%}",
            f"{1000 * statistics.median(seconds[name]):.0f}",
            f"{rate:.0f}",
            f"{rate / base:.2f}x",
        ]
        for name, rate in rates.items()
    ]


def measure_dual(training: Training, identity: list, general: list, processor, args) -> list[list[object]]:
    options = {"batch_size": args.loader_batch_size, "collate_fn": processor.collate, "drop_last": True}
    two = (DataLoader(samples, shuffle=True, **options) for samples in (identity, general))
    dual = DualDataLoader(*two, mixing_ratio=0.25, mode="interleave")
    first_of = (0, len(identity))

    def same_batches(epoch: int) -> DataLoader:
        dual.set_epoch(epoch)
        batches = [[first_of[source] + index for source, index in batch] for batch in dual.batch_sampler]
        return DataLoader(ConcatDataset([identity, general]), batch_sampler=batches, collate_fn=processor.collate)

    seconds = {name: {"loader": [], "step": []} for name in ("plain", "dual")}
    epoch = 0
    while len(seconds["dual"]["step"]) < args.loader_steps:
        plain = iter(same_batches(epoch))
        dual.set_epoch(epoch)
        streams = {"plain": plain, "dual": iter(dual)}
        for number in range(len(dual)):
            read = []
            for name in ("plain", "dual") if number % 2 else ("dual", "plain"):
                start = time.process_time()
                batch = next(streams[name])
                loaded = time.process_time()
                training.step(batch)
                seconds[name]["loader"].append(loaded - start)
                seconds[name]["step"].append(time.process_time() - start)
                read.append(batch["sample_ids"])
            if read[0] != read[1]:
                raise RuntimeError(f"the loaders read {read[0]} and {read[1]}.")
        epoch += 1
    rows = []
    for part in ("loader", "step"):
        plain, dual_seconds = seconds["plain"][part], seconds["dual"][part]
        difference = statistics.median(b - a for a, b in zip(plain, dual_seconds, strict=True))
        cells = [f"{1000 * statistics.median(values):.2f}" for values in (plain, dual_seconds)]
        relative = difference / statistics.median(seconds["plain"]["step"])
        rows.append([part, *cells, f"{1000 * difference:+.3f}", f"{relative:+.2%}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=256, help="width of the language model (%(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the language model (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each order (default: %(default)s)")
    parser.add_argument("--loader-batch-size", type=int, default=4, help="for the second table (default: %(default)s)")
    parser.add_argument("--loader-steps", type=int, default=200, help="steps of each loader (default: %(default)s)")
    parser.add_argument("--records", type=int, default=320, help="training records to draw (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = CHARACTERS | {"num_train_records": args.records, "num_general_records": args.records // 4}
        data = build_characters(Path(folder) / "data", **sizes)
        samples = list(RecordDataset(data / "train.jsonl"))
        processor = small_processor(samples, image_size=64, image_seq_length=16)
        identity, general = (
            [*RecordDataset(data / f"{name}.jsonl", encode=processor.encode)] for name in ("train", "general")
        )
        model = build_model(processor, args)
        training = Training(model)
        lengths = [len(sample["input_ids"]) for sample in identity + general]
        print(describe_machine(model.device), f"{model.num_parameters():,} parameters", sep="; ")
        print(
            f"{len(lengths)} samples of {min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.0f}\n"
        )
        print(f"Batches of {args.batch_size} samples, {args.steps} steps each\n")
        rows = measure_orders(training, identity + general, processor, args)
        print(markdown_table(["batches", "padding", "ms per step", "tokens/s", "ratio"], rows))
        print(f"\nDualDataLoader and a plain DataLoader, batches of {args.loader_batch_size} samples\n")
        rows = measure_dual(training, identity, general, processor, args)
        header = ["part", "plain ms", "dual ms", "median difference ms", "of the step"]
        print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
