"""Answers per second by batch size, of the example's model or of a checkpoint.

    python -m benchmarks.generation                                   # untrained model of the example, drawn characters
    python -m benchmarks.generation --model FOLDER --data test.jsonl  # a trained model and its evaluation records

Images are loaded and prepared beforehand, so that the time is that of the model. The answers of every batch size are
compared with those of the first batch size.
"""

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor, RecordDataset
from idavlm.datasets.characters import build_characters
from idavlm.evaluation import Answer, generate_answers
from idavlm.experimental.small_models import small_language_model, small_processor, small_vision_tower
from idavlm.utils import describe_machine, markdown_table

CHARACTERS = {
    "num_train": 12,
    "num_test": 12,
    "num_train_scenes": 12,
    "num_test_scenes": 16,
    "num_general": 4,
    "num_train_records": 8,
    "num_test_records": 64,
    "num_general_records": 4,
}


def untrained(samples: list) -> tuple[IDAVLMForConditionalGeneration, IDAVLMProcessor]:
    """A model of the size of examples/train_idformer.py with random weights, and its processor."""
    torch.manual_seed(0)
    processor = small_processor(samples, image_size=64)
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=128),
        small_language_model(processor.tokenizer, hidden_size=128),
        processor=processor,
        num_queries=16,
        num_heads=4,
        null_token=True,
        identity_embedding="learned",
        max_identities=4,
        gate="none",
    )
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint (default: an untrained small model)")
    parser.add_argument("--data", type=Path, help="evaluation records for --model (default: drawn characters)")
    parser.add_argument("--records", type=int, default=64, help="records per task (default: %(default)s)")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32], help="to compare (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of an answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements; the fastest counts (default: %(default)s)")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data must be passed together")
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or build_characters(Path(folder) / "data", **CHARACTERS) / "test.jsonl"
        samples = list(RecordDataset(data))
        if args.model is None:
            model, processor = untrained(samples)
        else:
            model = IDAVLMForConditionalGeneration.from_pretrained(args.model)
            processor = IDAVLMProcessor.from_pretrained(args.model)
        processor.image_loader = functools.lru_cache(maxsize=None)(processor.load_image)
        print(describe_machine(model.device), f"{model.num_parameters():,} parameters", sep="; ", end="\n\n")
        header = ["task", "batch size", "answers per second", "speed", "same answers"]
        print(markdown_table(header, measure_tasks(samples, model, processor, args)))


def measure_tasks(samples: list, model, processor, args: argparse.Namespace) -> list[list[object]]:
    """One row per task and batch size, then the totals of each batch size."""
    first = args.batch_sizes[0]
    total_seconds: dict[int, float] = defaultdict(float)
    total_records, rows = 0, []
    for task in dict.fromkeys(sample.task for sample in samples):
        task_samples = [sample for sample in samples if sample.task == task][: args.records]
        total_records += len(task_samples)
        measured = measure(task_samples, model, processor, args)
        for batch_size, (seconds, same) in measured.items():
            total_seconds[batch_size] += seconds
            speed = f"{measured[first][0] / seconds:.2f}x"
            rows.append([task, batch_size, f"{len(task_samples) / seconds:.1f}", speed, f"{same:.2f}"])
    for batch_size, seconds in total_seconds.items():
        speed = f"{total_seconds[first] / seconds:.2f}x"
        rows.append(["all", batch_size, f"{total_records / seconds:.1f}", speed, ""])
    return rows


def measure(samples: list, model, processor, args: argparse.Namespace) -> dict[int, tuple[float, float]]:
    """By batch size: seconds of the fastest round, and the share of answers equal to those of the first batch size."""
    for sample in samples:
        processor.encode(sample, add_generation_prompt=True)  # loads the images
    fastest: dict[int, float] = {}
    answers: dict[int, list[str | int]] = {}
    for _ in range(args.rounds):
        for batch_size in args.batch_sizes:
            start = time.perf_counter()
            generated = generate_answers(
                model, processor, samples, batch_size=batch_size, max_new_tokens=args.max_new_tokens
            )
            seconds = time.perf_counter() - start
            fastest[batch_size] = min(seconds, fastest.get(batch_size, seconds))
            answers[batch_size] = [_answer_key(answer) for answer in generated]
    expected = answers[args.batch_sizes[0]]
    result = {}
    for batch_size, found in answers.items():
        same = sum(answer == first for answer, first in zip(found, expected, strict=True))
        result[batch_size] = fastest[batch_size], same / len(samples)
    return result


def _answer_key(answer: Answer) -> str | int:
    """The text that was generated, or the index of the most likely candidate."""
    if answer.likelihoods is None:
        return answer.prediction
    return max(range(len(answer.likelihoods)), key=answer.likelihoods.__getitem__)


if __name__ == "__main__":
    main()
