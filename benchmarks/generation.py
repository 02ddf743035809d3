"""Answers a second, by batch size: a small model, or a checkpoint and its records.

    python -m benchmarks.generation                                   # the example's model, untrained, drawn characters
    python -m benchmarks.generation --model FOLDER --data test.jsonl  # a trained one

Pictures are read and prepared beforehand, so that what is timed is the model. Answers of all batch sizes are compared
with those one by one.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.measure import describe_machine
from idavlm.data import RecordDataset, Sample
from idavlm.datasets.characters import build_characters
from idavlm.evaluation import Answer, generate_answers
from idavlm.evaluation.answers import likeliest
from idavlm.experimental.small_models import small_language_model, small_processor, small_vision_tower
from idavlm.models import IDAVLMForConditionalGeneration, IDAVLMProcessor

SMALL = {"num_train": 12, "num_test": 12, "num_train_scenes": 12, "num_test_scenes": 16, "num_general": 4}
SMALL |= {"num_train_records": 8, "num_test_records": 64, "num_general_records": 4}


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
        null_token=True,
        max_identities=4,
        gate="none",
    )
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint")
    parser.add_argument("--data", type=Path, help="its records")
    parser.add_argument("--records", type=int, default=64, help="so many of each task")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many counts")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or build_characters(Path(folder) / "data", **SMALL) / "test.jsonl"
        samples = list(RecordDataset(data))
        if args.model is None:
            model, processor = untrained(samples)
        else:
            model = IDAVLMForConditionalGeneration.from_pretrained(args.model)
            processor = IDAVLMProcessor.from_pretrained(args.model)
        processor.image_cache_size = 100_000
        print(describe_machine(model.device), f"{model.num_parameters():,} parameters", sep="; ", end="\n\n")
        print("| task | batch | answers a second | over one by one | same answers |\n| --- | --- | --- | --- | --- |")
        seconds: dict[int, float] = defaultdict(float)
        asked = 0
        for task in dict.fromkeys(sample.task for sample in samples):
            some = [one for one in samples if one.task == task][: args.records]
            asked += len(some)
            measured = measure(some, model, processor, args)
            one_by_one = measured[args.batch_sizes[0]][0]
            for batch_size, (best, same) in measured.items():
                seconds[batch_size] += best
                cells = [task, batch_size, f"{len(some) / best:.1f}", f"{one_by_one / best:.2f}x", f"{same:.2f}"]
                print("|", " | ".join(map(str, cells)), "|", flush=True)
        for batch_size, total in seconds.items():
            print(f"| all | {batch_size} | {asked / total:.1f} | {seconds[args.batch_sizes[0]] / total:.2f}x | |")


def measure(samples: list, model, processor, args: argparse.Namespace) -> dict[int, tuple[float, float]]:
    """Seconds of the fastest round, and the share of answers equal to the first batch size's, by batch size."""
    for sample in samples:
        processor.encode(sample, add_generation_prompt=True)
    best: dict[int, float] = {}
    answers: dict[int, list] = {}
    for _ in range(args.rounds):
        for batch_size in args.batch_sizes:
            start = time.perf_counter()
            answers[batch_size] = generate_answers(
                model, processor, samples, batch_size=batch_size, max_new_tokens=args.max_new_tokens
            )
            taken = time.perf_counter() - start
            best[batch_size] = min(taken, best.get(batch_size, taken))
    first = [_text(one, sample) for one, sample in zip(answers[args.batch_sizes[0]], samples, strict=True)]
    same = {
        batch_size: sum(_text(*one) == text for one, text in zip(zip(found, samples, strict=True), first, strict=True))
        for batch_size, found in answers.items()
    }
    return {batch_size: (best[batch_size], same[batch_size] / len(samples)) for batch_size in args.batch_sizes}


def _text(answer: Answer, sample: Sample) -> str:
    """What was written, or the candidate found likeliest."""
    return answer.prediction if answer.likelihoods is None else likeliest(sample, answer)


if __name__ == "__main__":
    main()
