"""Attach an ID-Former to a frozen vision-language model, and test it on identities that it was not trained on.

    python examples/attach_idformer.py
    python examples/attach_idformer.py --seeds 3
    python examples/attach_idformer.py --smoke    # tiny sizes: does everything run?
    python examples/attach_idformer.py --family qwen2_5_vl --teacher runs/attach_idformer --out runs/attach_qwen

No model is downloaded. The script does the following:

1. It trains a small ``LlavaForConditionalGeneration`` on general images (examples/general_vlm.py). That model has never
   seen a character twice. From here on it is frozen. With ``--family qwen2_5_vl`` it is a small
   ``Qwen2_5_VLForConditionalGeneration`` with images of several sizes. Its vision tower learns from the finished LLaVA
   in the folder ``--teacher`` as well, and its language model starts with the weights of that one.
2. It attaches an ID-Former and trains that alone on the training identities: first from boxes, then with the loss of
   the answers. Some of the training identities are kept out of all trainings, for validation: settings are chosen on
   them, never on the test identities.
3. It trains the alternatives: the ID-Former together with LoRA, and LoRA without an ID-Former.
4. All of them answer questions about held-out identities, with the right references, with those of other identities,
   and without references.

The report is written to runs/attach_idformer/report.md, the models beside it. A run that was interrupted continues with
the general model if that was finished. On one core, that model takes half an hour, and each seed 12 to 20 minutes.
"""

import copy
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import fmean

import numpy as np
import torch
from general_vlm import (
    BOXES,
    DRAWN_SIZE,
    FAMILIES,
    Features,
    Grid,
    Photo,
    Record,
    Scene,
    StoredTower,
    batches,
    cached_tokenize,
    cells,
    collate,
    draw_general_images,
    general_scores,
    general_tests,
    generate,
    imitate_tokens,
    resized,
    train_base,
    train_tower,
    warmup_stable_decay,
    word_tokenizer,
)
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import HfArgumentParser, PreTrainedModel, set_seed

from idavlm import RecordDataset, ask, attach_id_former, save_id_former
from idavlm.data import Sample
from idavlm.datasets import build_characters
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.baselines import with_wrong_references, without_references
from idavlm.evaluation.report import format_range
from idavlm.evaluation.scoring import score_answers
from idavlm.utils import ImageRole, check_choice, describe_machine, markdown_table

LORA_MODULES = r".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
REFERENCES = ("right", "wrong", "none")
QUESTIONS = ("Which picture shows", "Where is")


@dataclass
class AttachArguments:
    family: str = field(default="llava", metadata={"help": "The general model: llava or qwen2_5_vl."})
    teacher: str | None = field(
        default=None, metadata={"help": "Folder of a finished run with --family llava, for --family qwen2_5_vl."}
    )
    steps: list[int] | None = field(
        default=None,
        metadata={
            "help": "Steps of the tower, of the language model, of the ID-Former from boxes, and of tuning. By default "
            "those of the family."
        },
    )
    seeds: int = field(default=1, metadata={"help": "Number of seeds. The general model is trained once."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA beside the ID-Former."})
    smoke: bool = field(default=False, metadata={"help": "Tiny sizes, to see that everything runs."})
    out: str = field(default="runs/attach_idformer", metadata={"help": "Folder of data, models and the report."})

    def __post_init__(self):
        check_choice("family", self.family, FAMILIES)
        if (self.family == "llava") != (self.teacher is None):
            raise ValueError(
                f"family={self.family!r} and teacher={self.teacher!r}: qwen2_5_vl needs the folder of a finished run "
                "of llava as its teacher, and llava has none."
            )
        if self.teacher is not None and not (Path(self.teacher) / "base.pt").exists():
            raise ValueError(f"teacher={self.teacher!r} holds no base.pt; run this script with --family llava before.")
        if self.steps is None:
            self.steps = FAMILIES[self.family].steps
        if len(self.steps) != 4:
            raise ValueError(f"steps={self.steps} must be four numbers: tower, language model, boxes and tuning.")


def main(args: AttachArguments) -> None:
    out, start = Path(args.out), time.time()
    out.mkdir(parents=True, exist_ok=True)

    def log(text: str) -> None:
        line = f"{time.time() - start:5.0f} s  {text}"
        print(line, flush=True)
        with (out / "log.txt").open("a") as file:
            file.write(line + "\n")

    sizes, num_scenes, num_figure_scenes, num_plans, num_tests = {}, 6000, 3000, 1500, 200
    tower_steps, base_steps, box_steps, tuning_steps = args.steps
    family = FAMILIES[args.family]
    if args.smoke:
        sizes = {"num_train": 8, "num_test": 10, "num_train_scenes": 12, "num_test_scenes": 8, "num_general": 4}
        sizes |= {"num_train_records": 200, "num_test_records": 2, "num_general_records": 8}
        num_scenes, num_figure_scenes, num_plans, num_tests = 180, 60, 60, 1
        tower_steps, base_steps, box_steps, tuning_steps = 1, 2, 1, 2

    # --- Data ---
    data = build_characters(out / "data" / "characters", **sizes)
    general_images, scenes = draw_general_images(
        out / "data", num_scenes=num_scenes, num_figure_scenes=num_figure_scenes, num_plans=num_plans
    )
    samples = [sample for sample in RecordDataset(data / "train.jsonl") if is_asked(sample)]
    train, validation = split_characters(samples, every=4 if args.smoke else 15)
    test = [sample for sample in RecordDataset(data / "test.jsonl") if is_asked(sample)]
    log(
        f"{len(scenes)} general images, {len(train)} training records, {len(validation)} validation records, "
        f"{len(test)} test records"
    )

    # --- The general model: vision tower and projector, then the language model on stored features of the tower ---
    set_seed(0)
    tokenizer = word_tokenizer()
    model = family.new_model(tokenizer)
    general_grids = [family.grid(row) for row in range(len(scenes))]
    for scene, grid in zip(scenes, general_grids, strict=True):
        scene.grid = grid
    if (out / "tower.pt").exists():
        model.load_state_dict(torch.load(out / "tower.pt"))
    else:
        count = num_plans + num_scenes  # without painted figures, whose colours the tower sees without having seen them
        images = general_images[:count]
        if args.teacher:
            teacher = teacher_tokens(Path(args.teacher), tokenizer, images)
            imitate_tokens(family, model, images, teacher, steps=tower_steps, log=log)
        else:
            train_tower(family, model, images, scenes[:count], steps=tower_steps, log=log)
        torch.save(model.state_dict(), out / "tower.pt")
    paths = sorted({path for sample in [*samples, *test] for path in sample.images})
    shown = {path: (row, family.grid(row)) for row, path in enumerate(paths)}
    if not (out / "features.pt").exists():
        images = np.stack([np.asarray(Image.open(test[0].image_root / path).convert("RGB")) for path in paths])
        found = (
            Features.compute(family, model, general_images, general_grids),
            Features.compute(family, model, images, [grid for _, grid in shown.values()]),
        )
        torch.save([features.tokens for features in found], out / "features.pt")
    general_features, features = (Features(family, tokens) for tokens in torch.load(out / "features.pt"))
    tower = family.replace_tower(model, StoredTower())
    if (out / "base.pt").exists():
        model.load_state_dict(torch.load(out / "base.pt"))
    else:
        if args.teacher:
            family.copy_language_model(model, torch.load(Path(args.teacher) / "base.pt"))
        train_base(
            model,
            general_features,
            scenes,
            tokenizer,
            steps=base_steps,
            seed=0,
            num_tests=min(num_tests, 50),
            log=log,
        )
        torch.save(model.state_dict(), out / "base.pt")
    model.requires_grad_(False).eval()

    # --- Evaluation ---
    general = general_tests(scenes, cached_tokenize(tokenizer), count=num_tests)
    questions = {"right": test, "wrong": with_wrong_references(test), "none": list(map(without_references, test))}
    tokenize = cached_tokenize(tokenizer)
    validation_records = {
        task: [identity_record(sample, shown, tokenize) for sample in validation if sample.task == of_task][:50]
        for task, of_task in (("which image", "matching"), ("where", "location"))
    }
    results = defaultdict(list)

    def evaluate(name: str, model: nn.Module) -> None:
        scores = {
            kind: identity_scores(model, samples, shown, features, tokenizer) for kind, samples in questions.items()
        }
        scores["general"] = general_scores(model, general_features, general, tokenizer)
        scores["trained"] = num_trained(model)
        results[name].append(scores)
        log(f"{name}: {scores}")
        (out / "results.json").write_text(json.dumps(results, indent=1))

    def validation_scores(model: nn.Module) -> dict[str, float]:
        return general_scores(model, features, validation_records, tokenizer, identities=has_id_former(model))

    evaluate("general model", model)
    general_batch = collate([record for records in general.values() for record in records], general_features)
    with torch.no_grad():
        logits = model(**general_batch).logits

    # --- Identities ---
    records = [identity_record(sample, shown, tokenize) for sample in train]
    vectors = colour_differences(model, general_features, scenes, count=4)
    for seed in range(args.seeds):
        set_seed(seed)
        options = {"seed": seed, "log": log, "scores": validation_scores}

        log(f"seed {seed}: ID-Former from boxes")
        attached = attach(copy.deepcopy(model), vectors)
        train_identities(attached, records, features, steps=box_steps, learning_rate=5e-3, from_boxes=True, **options)
        with_both = with_lora(copy.deepcopy(attached), args.lora_r)

        log(f"seed {seed}: ID-Former, model frozen")
        train_identities(attached, records, features, steps=tuning_steps, learning_rate=1e-3, **options)
        evaluate("ID-Former, model frozen", attached)
        with torch.no_grad():
            is_same = torch.equal(logits, attached(**general_batch).logits)
        results["general logits bit-identical with the ID-Former attached and trained"].append(is_same)

        log(f"seed {seed}: ID-Former and LoRA")
        train_identities(with_both, records, features, steps=tuning_steps, learning_rate=1e-3, **options)
        evaluate("ID-Former and LoRA", with_both)

        log(f"seed {seed}: LoRA alone")
        rank = round(num_trained(attached) / num_trained(with_lora(copy.deepcopy(model), 1)))
        alone = with_lora(copy.deepcopy(model), rank)
        steps = box_steps + tuning_steps
        train_identities(alone, records, features, steps=steps, learning_rate=3e-3, **options)
        evaluate("LoRA alone", alone)

        if seed == 0:
            for with_tower in (model, attached):
                family.replace_tower(with_tower, tower)
            model.save_pretrained(out / "model")
            save_id_former(attached, out / "id-former")
            processor = family.new_processor(tokenizer)
            processor.save_pretrained(out / "model")
            log(example_answer(attached, processor, test[-1], shown, out / "example"))
            family.replace_tower(model, StoredTower())

    report = write_report(out, results, args, seconds=time.time() - start)
    print(report)


def teacher_tokens(folder: Path, tokenizer, images: np.ndarray) -> Tensor:
    """Image tokens of the LLaVA that a run of this script has trained, ``[N, 36, 128]``."""
    family = FAMILIES["llava"]
    model = family.new_model(tokenizer)
    model.load_state_dict(torch.load(folder / "tower.pt"))
    (grid,) = family.grids
    features = Features.compute(family, model, images, [grid] * len(images))
    with torch.no_grad():
        return family.project(model, features.tokens)


def identity_record(sample: Sample, shown: dict[str, tuple[int, Grid]], tokenize: Callable[[str], list[int]]) -> Record:
    """The two questions of this script in a sample; ``shown``: row of each image among the features, and its grid."""
    record, names = Record(tokenize), [identity.name for identity in sample.identities]
    role = ImageRole.SCENE if names else ImageRole.GENERAL
    for number, identity in enumerate(sample.identities):
        for path in identity.images:
            label = record.text(f"{identity.name} is ")
            record.image(Photo(*shown[path], ImageRole.REFERENCE, number), label)
            record.text("\n")
    question = ""
    for message in sample.messages:
        if message.role == "assistant":
            answer = "".join(
                part.text
                if part.type == "text"
                else BOXES.write("", sample.box_of_part(part).box, (DRAWN_SIZE, DRAWN_SIZE))
                for part in message.content
            )
            if question.strip().startswith(QUESTIONS):
                name = question.split()[-1].rstrip("?")
                record.turn(question, f"{name} {answer}")
            question = "\n" if record.is_new else ""
            continue
        for part in message.content:
            if part.type == "image":
                record.text(question)
                question = ""
                boxes = [box for box in sample.boxes if box.image == part.image and box.name in names]
                of_names = [(box.box, names.index(box.name)) for box in boxes]
                record.image(Photo(*shown[part.image], role, boxes=of_names))
            else:
                question += part.text
    if sample.is_evaluation:
        record.turn(question, None)
    return record


def split_characters(samples: Sequence[Sample], *, every: int) -> tuple[list[Sample], list[Sample]]:
    """Keep one of ``every`` characters for validation: samples without them, and samples that ask for them alone.

    The validation samples resemble those of the test: one question, about four images or a scene of three or four
    figures.
    """

    def of_photo(path: str) -> int:
        return int(Path(path).stem.split("-")[0])

    shown = defaultdict(set)  # the characters of each image
    for sample in samples:
        characters = {identity.name: of_photo(identity.images[0]) for identity in sample.identities}
        for path in sample.images:
            if "photos" in path:
                shown[path].add(of_photo(path))
        for box in sample.boxes:
            if box.name in characters:
                shown[box.image].add(characters[box.name])
    train, validation = [], []
    for sample in samples:
        held_out = {character for path in sample.images for character in shown[path] if character % every == 0}
        if not held_out:
            train.append(sample)
            continue
        sample = replace(sample, messages=sample.messages[:2])
        question = sample.messages[0].content[-1].text
        if not question.strip().startswith(QUESTIONS):
            continue
        name = question.split()[-1].rstrip("?")
        asked = next(identity for identity in sample.identities if identity.name == name)
        is_crowd = len(sample.message_images) == 4 or len(shown[sample.message_images[0]]) > 2
        if of_photo(asked.images[0]) in held_out and is_crowd:
            validation.append(sample)
    return train, validation


def is_asked(sample: Sample) -> bool:
    """Whether a record asks which picture shows someone, or where someone is: the two tasks of this script."""
    texts = [part.text for message in sample.messages for part in message.content if part.type == "text"]
    return sample.task in ("matching", "location") and any(text.strip().startswith(QUESTIONS) for text in texts)


def identity_scores(
    model: nn.Module, samples: Sequence[Sample], shown: dict[str, tuple[int, Grid]], features: Features, tokenizer
) -> dict[str, float]:
    """Matching (accuracy) and location (share of boxes with an IoU of at least 0.5)."""
    records = [identity_record(sample, shown, cached_tokenize(tokenizer)) for sample in samples]
    texts = generate(model, records, features, tokenizer, identities=has_id_former(model))
    answers = [
        Answer(sample.id, text, image_size=(DRAWN_SIZE, DRAWN_SIZE))
        for sample, text in zip(samples, texts, strict=True)
    ]
    scores = score_answers(samples, answers, read_box=BOXES.read).main_scores
    return {task: round(scores[task], 3) for task in ("matching", "location")}


def has_id_former(model: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "id_former" for name, _ in model.named_modules())


@torch.no_grad()
def colour_differences(model: PreTrainedModel, features: Features, scenes: Sequence[Scene], *, count: int) -> Tensor:
    """What the image tokens of painted figures have that those of other figures lack, ``[count, 128]``.

    The frozen model tells figures of different colours apart. Added to the tokens of a figure and of its references,
    such a vector marks both in a way that the model already compares. The colours are chosen to be far from each other.
    """
    tokens = defaultdict(list)
    for row, scene in enumerate(scenes):
        if len(scene.items) == 1 and scene.items[0].kind == "person":
            inside = cells(scene.items[0].box, scene.grid)
            tokens[scene.items[0].colour].append(features.family.project(model, features.of(row, scene.grid))[inside])
    means = {colour: torch.cat(found).mean(0) for colour, found in tokens.items()}
    unpainted = means.pop("")
    differences = torch.stack([mean - unpainted for mean in means.values()])
    distances = torch.cdist(differences, differences)
    chosen = [int(differences.norm(dim=1).argmax())]
    while len(chosen) < count:
        chosen.append(int(distances[chosen].amin(0).argmax()))
    return differences[chosen]


def attach(model: PreTrainedModel, vectors: Tensor) -> PreTrainedModel:
    """Attach an ID-Former that starts from scratch, with ``vectors`` as the first embeddings of the identities.

    The embeddings contribute from the first step, and both sides of the comparison learn. Contrast with all references
    of a batch speeds that up several times. The embeddings are all that is added to the tokens: what the attention
    copies from the references stays at zero, because it disturbed what the tokens say about boxes.
    """
    attach_id_former(
        model,
        num_heads=1,
        gate="none",
        detach_references=False,
        identity_embedding="learned",
        max_identities=len(vectors),
        contrastive_loss_weight=3.0,
    )
    model.id_former.identity_embedding.weight.data.copy_(vectors)
    for layer in model.id_former.identity_layers:
        nn.init.zeros_(layer.attention.out_proj.weight)
    freeze_copied_values(model)
    return model


def freeze_copied_values(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "id_former" in name and (".v_proj." in name or ".out_proj." in name):
            parameter.requires_grad_(False)


def with_lora(model: PreTrainedModel, rank: int) -> nn.Module:
    """LoRA on all matrices of the language model; an attached ID-Former is trained as without LoRA."""
    new = ["id_former"] if has_id_former(model) else []
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_MODULES, modules_to_save=new)
    model = get_peft_model(model, config)
    freeze_copied_values(model)
    return model


def num_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def train_identities(
    model: nn.Module,
    records: Sequence[Record],
    features: Features,
    *,
    steps: int,
    seed: int,
    learning_rate: float,
    from_boxes: bool = False,
    log: Callable[[str], None],
    scores: Callable[[nn.Module], object],
) -> None:
    """Train what is not frozen: LoRA, an ID-Former, or both.

    With ``from_boxes``, the identity attention is trained alone and the language model does not run. Otherwise the
    answers are trained as well, without the contrastive loss, which would outweigh them.
    """
    rng, with_identities = Random(seed), has_id_former(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(steps, warmup=20, decay=0.5))
    stream, means, log_every = batches(lambda: rng.choice(records), rng), defaultdict(list), max(1, steps // 4)
    model.train()
    for step in range(steps):
        batch = collate(next(stream), features, identities=with_identities)
        if from_boxes:
            batch = {name: batch[name] for name in batch if name not in ("input_ids", "attention_mask", "labels")}
        output = model(**batch)
        loss = output.loss
        if with_identities and not from_boxes:
            loss = output.language_loss + 0.5 * output.identity_map_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        for name in ("loss", "language_loss", "identity_map_loss"):
            if output.get(name) is not None:
                means[name].append(output[name].item())
        if step % log_every == log_every - 1 or step == steps - 1:
            shown = {name: round(fmean(values[-log_every:]), 3) for name, values in means.items()}
            log(f"  {step + 1}: {shown} {'' if from_boxes else scores(model)}")
    model.eval()


def example_answer(
    model: nn.Module, processor, sample: Sample, shown: dict[str, tuple[int, Grid]], folder: Path
) -> str:
    """Ask the model a question of the test set about image files, in the sizes of the family: no stored features."""
    question = sample.messages[-1].content[-1].text.strip()
    files = {path: folder / path.replace("/", "-").replace(".jpg", ".png") for path in sample.images}
    folder.mkdir(exist_ok=True)
    for path, file in files.items():
        _, grid = shown[path]
        resized(Image.open(sample.image_root / path), grid).save(file)
    answer = ask(
        model,
        processor,
        "\n" + question,
        images=[files[path] for path in sample.message_images],
        identities={identity.name: [files[path] for path in identity.images] for identity in sample.identities},
        max_new_tokens=16,
    )
    return f"{question} {answer!r} (right: {sample.answer or sample.target_box})"


def write_report(out: Path, results: dict[str, list], args: AttachArguments, *, seconds: float) -> str:
    """Write report.md: the mean of the seeds, with the lowest and the highest score."""
    columns = [(task, references) for task in ("matching", "location") for references in REFERENCES]
    header, rows = ["trained", "parameters", *(f"{task}, {kind}" for task, kind in columns), "general"], []
    for name, seeds in results.items():
        if not isinstance(seeds[0], dict):
            continue
        values = [format_range([scores[kind][task] for scores in seeds]) for task, kind in columns]
        general = format_range([fmean(scores["general"].values()) for scores in seeds])
        rows.append([name, f"{seeds[0]['trained']:,}", *values, general])
    facts = [f"{name}: {seeds}" for name, seeds in results.items() if not isinstance(seeds[0], dict)]
    command = " ".join(["python", *sys.argv])
    facts += [f"family: {args.family}", f"steps: {args.steps}", f"seeds: {args.seeds}", f"command: `{command}`"]
    facts += [f"seconds: {seconds:.0f}", f"machine: {describe_machine()}"]
    text = f"# An ID-Former on a frozen model\n\n{markdown_table(header, rows)}\n\n" + "  \n".join(facts) + "\n"
    (out / "report.md").write_text(text)
    return text


if __name__ == "__main__":
    main(HfArgumentParser(AttachArguments, description=__doc__).parse_args_into_dataclasses()[0])
