"""Loss curves of the same training run with different attention backends.

    python -m benchmarks.loss_curves --bf16        # on a GPU: SDPA twice, and the kernels

The model is that of examples/train_idformer.py, trained end to end. The second run with SDPA shows the run-to-run
variance; the distance of another backend should not be larger.
"""

import argparse
from pathlib import Path

from transformers import set_seed

from idavlm import IDAVLMForConditionalGeneration, IDTrainer, IDTrainingArguments, RecordDataset
from idavlm.datasets.characters import build_characters
from idavlm.experimental.small_models import small_language_model, small_processor, small_vision_tower
from idavlm.utils import describe_machine, markdown_table


def train(implementation: str, folder: Path, args: argparse.Namespace) -> tuple[list[float], str]:
    """The logged losses of one run, and the machine that it ran on."""
    set_seed(0)
    data = RecordDataset(folder / "train.jsonl")
    processor = small_processor(data, image_size=64)
    data.encode = processor.encode
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=128),
        small_language_model(processor.tokenizer),
        processor=processor,
        num_queries=16,
        num_heads=4,
        num_identity_heads=1,
        identity_keys="patches",
        identity_embedding="learned",
        max_identities=4,
        null_token=True,
        gate="none",
        detach_references=False,
        contrastive_loss_weight=1.0,
        attn_implementation=implementation,
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
    parser.add_argument(
        "--implementations", nargs="+", default=["sdpa", "sdpa", "triton"], help="backends (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per step (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="train with bfloat16 autocast")
    parser.add_argument("--records", type=int, default=8000, help="training records to draw (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/loss_curves"), help="folder of the data (default: %(default)s)"
    )
    args = parser.parse_args()
    args.logging_steps = max(1, args.steps // 20)
    folder = build_characters(args.out / f"data-{args.records}", num_train_records=args.records)
    runs = [train(implementation, folder, args) for implementation in args.implementations]
    print(f"\n{runs[0][1]}; {args.steps} steps, batch {args.batch_size}, {'bfloat16' if args.bf16 else 'float32'}\n")
    curves = [curve for curve, _ in runs]
    rows = [
        [number * args.logging_steps, *(f"{loss:.4f}" for loss in losses)]
        for number, losses in enumerate(zip(*curves, strict=True), 1)
    ]
    distances = [sum(abs(a - b) for a, b in zip(curves[0], curve, strict=True)) / len(curve) for curve in curves]
    rows.append(["mean distance to the first", *(f"{distance:.4f}" for distance in distances)])
    print(markdown_table(["step", *args.implementations], rows))


if __name__ == "__main__":
    main()
