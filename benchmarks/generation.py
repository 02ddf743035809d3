"""Answers a second, by batch size: a small model, or a checkpoint and its records.

    python -m benchmarks.generation                                   # the example's model, untrained, drawn characters
    python -m benchmarks.generation --model FOLDER --data test.jsonl  # a trained one

Pictures are read and prepared beforehand, so that what is timed is the model. Answers of all batch sizes are compared
with those one by one.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from idavlm.data import RecordDataset
from idavlm.data.characters import build_characters
from idavlm.evaluation import generate_answers
from idavlm.models import IDAVLMForConditionalGeneration, IDAVLMProcessor
from idavlm.models.small import small_language_model, small_processor, small_vision_tower


def untrained(records: list) -> tuple[IDAVLMForConditionalGeneration, IDAVLMProcessor]:
    """The size of examples/train_idformer.py."""
    torch.manual_seed(0)
    processor = small_processor(records, image_size=64, num_queries=16)
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=128),
        small_language_model(processor.tokenizer, hidden_size=128),
        image_token_id=processor.image_token_id,
        connector="id_former",
        num_queries=16,
        num_heads=4,
        nobody_token=True,
        num_identity_slots=4,
        gate="none",
    )
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint")
    parser.add_argument("--data", type=Path, help="its records")
    parser.add_argument("--records", type=int, default=64, help="so many of each task")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--max-new-tokens", type=int, default=16)
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or build_characters(folder, train=64, test=args.records) / "test.jsonl"
        samples = list(RecordDataset(data))
        if args.model is None:
            model, processor = untrained(samples)
        else:
            model = IDAVLMForConditionalGeneration.from_pretrained(args.model)
            processor = IDAVLMProcessor.from_pretrained(args.model)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {torch.get_num_threads()} threads\n")
        print("| task | batch | answers a second | over one by one | same answers |\n| --- | --- | --- | --- | --- |")
        for task in dict.fromkeys(sample.type for sample in samples):
            measure(task, [one for one in samples if one.type == task][: args.records], model, processor, args)


def measure(task: str, samples: list, model, processor, args: argparse.Namespace) -> None:
    processor.image_cache_size = 100_000
    for sample in samples:
        processor.encode(sample, add_generation_prompt=True)
    first, reference = None, None
    for batch_size in args.batch_sizes:
        start = time.perf_counter()
        answers = generate_answers(
            model, processor, samples, batch_size=batch_size, max_new_tokens=args.max_new_tokens, write_choices=False
        )
        rate = len(samples) / (time.perf_counter() - start)
        first, reference = first or rate, reference or answers
        same = sum(a.prediction == b.prediction for a, b in zip(answers, reference, strict=True)) / len(samples)
        print(f"| {task} | {batch_size} | {rate:.1f} | {rate / first:.2f}x | {same:.2f} |", flush=True)


if __name__ == "__main__":
    main()
