"""Do attention implementations train alike? The same model, records and seed with each of them.

    python -m benchmarks.loss_curves --bf16        # on a GPU: SDPA, SDPA once more, the kernels

The model is that of examples/train_idformer.py, all of it trained at once. The second run of SDPA tells how far two
runs of one computation drift apart; another implementation should lie no farther away.
"""

import argparse
from pathlib import Path

from transformers import set_seed

from benchmarks.measure import describe_machine, markdown_table
from idavlm.data import RecordDataset
from idavlm.datasets.characters import build_characters
from idavlm.experimental.small_models import small_language_model, small_processor, small_vision_tower
from idavlm.models import IDAVLMForConditionalGeneration
from idavlm.training import IDTrainer, IDTrainingArguments

OPTIONS = {"num_heads": 4, "gate": "none", "detach_references": False, "contrastive_loss_weight": 1.0}
OPTIONS |= {"num_identity_heads": 1, "identity_keys": "patches", "null_token": True, "max_identities": 4}


def losses(implementation: str, folder: Path, args: argparse.Namespace) -> tuple[list[float], str]:
    """What is logged of the loss, and the machine."""
    set_seed(0)
    data = RecordDataset(folder / "train.jsonl")
    processor = small_processor(data, image_size=64, num_queries=16)
    data.encode = processor.encode
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=128),
        small_language_model(processor.tokenizer),
        image_token_id=processor.image_token_id,
        num_queries=processor.image_seq_length,
        attn_implementation=implementation,
        **OPTIONS,
    )
    arguments = IDTrainingArguments(
        str(args.out / "checkpoints"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=2e-3,
        warmup_steps=min(20, args.steps // 5),
        bf16=args.bf16,
        logging_steps=args.logging_steps,
        save_strategy="no",
        report_to=[],
    )
    trainer = IDTrainer(model, arguments, train_dataset=data, data_collator=processor.collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], describe_machine(model.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="+", default=["sdpa", "sdpa", "triton"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--records", type=int, default=8000, help="to draw and train on")
    parser.add_argument("--out", type=Path, default=Path("runs/loss_curves"))
    args = parser.parse_args()
    args.logging_steps = max(1, args.steps // 20)
    folder = build_characters(args.out / f"data-{args.records}", num_train_records=args.records)
    runs = [losses(implementation, folder, args) for implementation in args.implementations]
    print(f"\n{runs[0][1]}; {args.steps} steps, batch {args.batch_size}, {'bfloat16' if args.bf16 else 'float32'}\n")
    curves = [curve for curve, _ in runs]
    rows = [
        [number * args.logging_steps, *(f"{loss:.4f}" for loss in row)]
        for number, row in enumerate(zip(*curves, strict=True), 1)
    ]
    apart = [sum(abs(a - b) for a, b in zip(curves[0], curve, strict=True)) / len(curve) for curve in curves]
    rows.append(["mean distance to the first", *(f"{distance:.4f}" for distance in apart)])
    print(markdown_table(["step", *args.implementations], rows))


if __name__ == "__main__":
    main()
