"""Fine-tune a small VLM on facts about a few people, and measure what it learns and what it forgets.

    python examples/personal_knowledge.py --seeds 3
    python examples/personal_knowledge.py --tiny --steps 2 2          # few records, to try the script

A small VLM is trained from scratch first: on questions about general images, and on photos and facts (job, home town,
pet, favourite dish) of people that stand for public figures. Then it is fine-tuned on records about other people, whom
only their friends know, in three ways:

- full: the language model and the connector;
- LoRA: LoRA of the language model; the connector in full;
- LoRA + general: the same, with records of the first training in one of ten steps.

Every model is asked for the personal facts in words in which it was not told them, who is in photos that it has not
seen, and for facts about the person in such a photo, which it has practised on public figures only. General ability is
measured before and after: facts and new photos of public figures, and questions about new general images.
The report is written to runs/personal_knowledge/report.md, with a figure.
"""

import functools
import json
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean

import torch
from transformers import HfArgumentParser, set_seed

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor, IDTrainer, IDTrainingArguments, RecordDataset
from idavlm.datasets import build_characters
from idavlm.datasets.record_composer import FIRST_NAMES
from idavlm.evaluation.generation import evaluating, generate_texts
from idavlm.experimental.small_models import small_language_model, small_processor, small_vision_tower
from idavlm.training import LoRAArguments, add_lora
from idavlm.utils import describe_machine, markdown_table

VARIANTS = ("full", "LoRA", "LoRA + general")
LEARNING_RATES = {"base": 2e-3, "full": 1e-3, "LoRA": 1e-2, "LoRA + general": 1e-2}
LORA = LoRAArguments(r=32, lora_alpha=64)
GENERAL_RATIO = 0.1
BATCH_SIZE = 16
IMAGE_SIZE = 32
NUM_IMAGE_TOKENS = 16  # 4 x 4
NUM_PUBLIC, NUM_PERSONAL = 24, 8  # people
TRAIN_PHOTOS, TEST_PHOTOS = 6, 2  # per person
CHANCE = 1 / 8  # eight values of each kind of fact, and eight people
NUM_TEST_IMAGES = 60  # general images that no training record shows
MEASURES = {
    "personal facts, new wording": "facts",
    "personal: who is this, new photo": "names",
    "personal facts from a new photo": "facts from photos",
    "public facts": "public facts",
    "public: who is this, new photo": "public names",
    "public facts from a new photo": "public facts from photos",
    "general images": "general images",
}

# Kinds of facts: values, questions in training, question of the test, answer, and question about a photo.
FACTS = {
    "job": (
        ("baker", "pilot", "nurse", "farmer", "plumber", "judge", "tailor", "dentist"),
        ("What is {name}'s job?", "What does {name} do for a living?", "Tell me the job of {name}."),
        "What kind of work does {name} do?",
        "{name} is a {value}.",
        "What is the job of this person?",
    ),
    "home": (
        ("Lisbon", "Oslo", "Cairo", "Lima", "Dublin", "Prague", "Kyoto", "Havana"),
        ("Where does {name} live?", "Which city is {name}'s home?", "What is the home town of {name}?"),
        "In which city is {name}'s house?",
        "{name} lives in {value}.",
        "Where does this person live?",
    ),
    "pet": (
        ("cat", "parrot", "rabbit", "turtle", "goat", "hamster", "snake", "horse"),
        ("What pet does {name} have?", "Which animal does {name} keep?", "What kind of pet is {name}'s?"),
        "Which animal lives with {name}?",
        "{name} has a {value}.",
        "What pet does this person have?",
    ),
    "dish": (
        ("pizza", "soup", "curry", "pancakes", "salad", "noodles", "stew", "tacos"),
        ("What is {name}'s favourite dish?", "What does {name} like to eat?", "Which food does {name} love?"),
        "What can I cook for {name}?",
        "{name} loves {value}.",
        "What is the favourite dish of this person?",
    ),
}


@dataclass
class ExampleArguments:
    tiny: bool = field(default=False, metadata={"help": "Use few images and records."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds."})
    steps: list[int] = field(
        default_factory=lambda: [1500, 400], metadata={"help": "Steps of the base model, and of fine-tuning."}
    )
    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": "Ways of fine-tuning."})
    resume: bool = field(default=False, metadata={"help": "Keep what an interrupted run has finished."})
    out: str = field(default="runs/personal_knowledge", metadata={"help": "Folder of data, models and report."})

    def __post_init__(self):
        if len(self.steps) != 2:
            raise ValueError(f"steps={self.steps} must be two numbers.")
        unknown = set(self.variants) - set(VARIANTS)
        if unknown:
            raise ValueError(f"variants={self.variants}; choose from {', '.join(VARIANTS)}.")


def main(args: ExampleArguments) -> None:
    start = time.time()
    out = Path(args.out)
    data = build_data(args, out / ("tiny" if args.tiny else "data"))
    base = out / "base"
    if not (args.resume and (out / "base.json").exists()):
        train_base(args, data, base)
        model, processor = load(base)
        (out / "base.json").write_text(json.dumps(measure_general(model, processor, data, base)))
    before = json.loads((out / "base.json").read_text())
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in args.variants}
    for seed in range(args.seeds):
        for variant in args.variants:
            file = out / f"seed-{seed}" / f"{variant.replace(' ', '')}.json"
            if not (args.resume and file.exists()):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(fine_tune(args, data, base, variant, seed)))
            results[variant].append(json.loads(file.read_text()))
            print(seed, variant, results[variant][-1], flush=True)
    report = write_report(args, before, results, seconds=time.time() - start)
    print(report.read_text())


# --- Data ------------------------------------------------------------------------------------------------------------


def build_data(args: ExampleArguments, folder: Path) -> Path:
    """Draw people and general images. Only the photos and the general records are used."""
    sizes = {"num_test": 5, "num_train_scenes": 12, "num_test_scenes": 6, "num_test_records": 4}
    sizes |= {"num_train": NUM_PUBLIC + 3 * NUM_PERSONAL, "num_train_records": 60, "size": 64}
    sizes["num_photos"] = TRAIN_PHOTOS + TEST_PHOTOS
    if args.tiny:
        return build_characters(folder, num_general=NUM_TEST_IMAGES + 8, num_general_records=120, **sizes)
    return build_characters(folder, num_general=NUM_TEST_IMAGES + 600, num_general_records=3300, **sizes)


def dialogue(question: str, answer: str, image: str | None = None, *, test: bool = False) -> dict:
    """A record of one question. A record of the test ends with the question."""
    content = [{"type": "text", "text": question}]
    if image is not None:
        content = [{"type": "image", "image": image}, {"type": "text", "text": f"\n{question}"}]
    messages = [{"role": "user", "content": content}]
    if test:
        return {"type": "qa_single", "messages": messages, "answer": answer}
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}


def records_about(people: dict[str, int], rng: Random, *, is_public: bool) -> tuple[list[dict], dict[str, list[dict]]]:
    """Records about people with random facts: those of the training, and those of the tests by name.

    Only about public figures, the training has all wordings and questions for facts about a photo.

    Args:
        people: name -> number of the drawn character.
    """
    train, facts, names, from_photos = [], [], [], []
    for name, number in people.items():
        photos = [f"train/photos/{number:04d}-{photo}.jpg" for photo in range(TRAIN_PHOTOS + TEST_PHOTOS)]
        seen, new = photos[:TRAIN_PHOTOS], photos[TRAIN_PHOTOS:]
        for values, questions, test_question, sentence, photo_question in FACTS.values():
            value = rng.choice(values)
            answer = sentence.format(name=name, value=value)
            asked = (*questions, test_question) if is_public else questions
            train += [dialogue(question.format(name=name), answer) for question in asked]
            if is_public:
                train += [dialogue(photo_question, answer, photo) for photo in seen]
            facts.append(dialogue(test_question.format(name=name), value, test=True))
            from_photos.append(dialogue(photo_question, value, new[0], test=True))
        train += [dialogue("Who is this?", f"This is {name}.", photo) for photo in seen]
        names += [dialogue("Who is this?", name, photo, test=True) for photo in new]
    return train, {"facts": facts, "names": names, "facts from photos": from_photos}


def public_records() -> tuple[list[dict], dict[str, list[dict]]]:
    """Records about the public figures; the same for all seeds."""
    people = {name: number for number, name in enumerate(FIRST_NAMES[:NUM_PUBLIC])}
    return records_about(people, Random("public"), is_public=True)


def personal_records(seed: int) -> tuple[list[dict], dict[str, list[dict]]]:
    """Records about people whose names, looks and facts depend on the seed."""
    rng = Random(seed)
    names = rng.sample(FIRST_NAMES[NUM_PUBLIC:], NUM_PERSONAL)
    numbers = rng.sample(range(NUM_PUBLIC, NUM_PUBLIC + 3 * NUM_PERSONAL), NUM_PERSONAL)
    return records_about(dict(zip(names, numbers, strict=True)), rng, is_public=False)


def general_records(data: Path) -> tuple[list[dict], list[dict]]:
    """Records about general images: those of the training, and one question for each image of the test."""
    train, test = [], {}
    for line in (data / "general.jsonl").read_text().splitlines():
        record = json.loads(line)
        image = record["messages"][0]["content"][0]["image"]
        if int(Path(image).stem) >= NUM_TEST_IMAGES:
            train.append({"messages": record["messages"]})
            continue
        question, answer = record["messages"][0]["content"][1]["text"].strip(), record["messages"][1]["content"]
        if not question.startswith("Describe"):  # there are many right descriptions
            test.setdefault(image, dialogue(question, answer.strip("."), image, test=True))
    return train, list(test.values())


def base_records(data: Path) -> list[dict]:
    """All records of the first training."""
    return public_records()[0] + general_records(data)[0]


def write(records: list[dict], path: Path, data: Path, processor: IDAVLMProcessor | None = None) -> RecordDataset:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"{path.stem}-{number}", **record}) for number, record in enumerate(records)]
    path.write_text("\n".join(lines) + "\n")
    encode = None if processor is None else processor.encode
    return RecordDataset(path, data / "images", encode=encode)


# --- Training --------------------------------------------------------------------------------------------------------


def train_base(args: ExampleArguments, data: Path, folder: Path) -> None:
    """Train a small VLM from scratch."""
    set_seed(0)
    texts = [*base_records(data), *(record for seed in range(args.seeds) for record in personal_records(seed)[0])]
    samples = write(texts, data / "texts.jsonl", data)  # for the tokenizer
    processor = small_processor(samples, image_size=IMAGE_SIZE, image_seq_length=NUM_IMAGE_TOKENS)
    processor.image_loader = functools.lru_cache(maxsize=None)(processor.load_image)  # keeps all images in memory
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=128),
        small_language_model(processor.tokenizer, hidden_size=128, num_hidden_layers=3),
        image_token_id=processor.image_token_id,
        connector="mlp2x_gelu",
        image_seq_length=NUM_IMAGE_TOKENS,
    )
    dataset = write(base_records(data), data / "base.jsonl", data, processor)
    train(model, processor, dataset, folder, max_steps=args.steps[0], learning_rate=LEARNING_RATES["base"])
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def fine_tune(args: ExampleArguments, data: Path, base: Path, variant: str, seed: int) -> dict[str, float]:
    """Fine-tune the base model in one way, and return the scores."""
    start = time.time()
    set_seed(seed)
    folder = base.parent / f"seed-{seed}" / variant.replace(" ", "")
    model, processor = load(base)
    records, tests = personal_records(seed)
    dataset = write(records, folder / "train.jsonl", data, processor)
    options = {}
    if variant == "full":
        options["freeze"] = ["vision_tower"]
    else:
        model.vision_tower.requires_grad_(False)
        model = add_lora(model, {"language_model": LORA})
    general = None
    if variant == "LoRA + general":
        general = write(base_records(data), folder / "general.jsonl", data, processor)
        options["mixing_ratio"] = GENERAL_RATIO
    train(
        model,
        processor,
        dataset,
        folder / "run",
        general_dataset=general,
        seed=seed,
        max_steps=args.steps[1],
        learning_rate=LEARNING_RATES[variant],
        **options,
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    minutes = (time.time() - start) / 60
    scores = {
        name: accuracy(model, processor, list(write(questions, folder / "test.jsonl", data)))
        for name, questions in tests.items()
    }
    scores |= measure_general(model, processor, data, folder)
    return scores | {"trained parameters": trained, "minutes of training": minutes}


def train(
    model, processor: IDAVLMProcessor, dataset: RecordDataset, out: Path, *, general_dataset=None, **options
) -> None:
    """Train with the options that all stages share, and with ``options`` of IDTrainingArguments."""
    steps = options["max_steps"]
    arguments = IDTrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=BATCH_SIZE,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, steps // 5),
        adam_beta2=0.98,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    IDTrainer(
        model, arguments, train_dataset=dataset, general_dataset=general_dataset, processing_class=processor
    ).train()


# --- Measurements ----------------------------------------------------------------------------------------------------


def accuracy(model, processor: IDAVLMProcessor, samples: list, *, batch_size: int = 32) -> float:
    """The share of answers that contain the right value."""
    right = []
    with evaluating(model):
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            texts = generate_texts(model, processor, batch, max_new_tokens=12)
            for sample, (text, _) in zip(batch, texts, strict=True):
                right.append(re.search(rf"\b{re.escape(sample.answer)}\b", text, re.IGNORECASE) is not None)
    return fmean(right)


def measure_general(model, processor: IDAVLMProcessor, data: Path, folder: Path) -> dict[str, float]:
    """General ability: facts and new photos of public figures, and questions about new general images."""
    _, public = public_records()
    tests = {
        "public facts": public["facts"],
        "public names": public["names"],
        "public facts from photos": public["facts from photos"],
        "general images": general_records(data)[1],
    }
    return {
        name: accuracy(model, processor, list(write(records, folder / "test.jsonl", data)))
        for name, records in tests.items()
    }


def write_report(
    args: ExampleArguments, before: dict[str, float], results: dict[str, list[dict[str, float]]], *, seconds: float
) -> Path:
    """Write a table and a figure."""
    out = Path(args.out)
    rows = []
    for title, name in MEASURES.items():
        row = [title, "" if name not in before else f"{before[name]:.2f}"]
        for seeds in results.values():
            values = [scores[name] for scores in seeds]
            row.append(f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        rows.append(row)
    for name, scale, unit in (("trained parameters", 1e6, "million"), ("minutes of training", 1, "minutes")):
        values = [f"{fmean(scores[name] for scores in seeds) / scale:.1f} {unit}" for seeds in results.values()]
        rows.append([name, "", *values])
    table = markdown_table(["measure", "before", *results], rows)
    figure = plot(out / "personal_knowledge.png", before, results)
    lines = [
        "# Personal knowledge by fine-tuning",
        table,
        f"Chance level of facts and of personal names: {CHANCE:.2f}.",
        f"![scores]({figure.name})",
        f"Command `{' '.join(['python', *sys.argv])}`; {args.seeds} seeds; {seconds / 60:.0f} min.",
        describe_machine(),
    ]
    report = out / "report.md"
    report.write_text("\n\n".join(lines) + "\n")
    (out / "results.json").write_text(json.dumps({"before": before, "after": results}, indent=1))
    return report


def plot(path: Path, before: dict[str, float], results: dict[str, list[dict[str, float]]]) -> Path:
    """One panel per measure; a bar per variant, a point per seed, and a line for the score before."""
    from idavlm.evaluation.plots import COLOURS, INK, new_figure

    figure = new_figure(14, 6)
    panels = list(figure.subplots(2, 4).flat)
    # The last column of the upper row stays empty: three personal measures, then four of general ability.
    panels.pop(3).axis("off")
    for panel, (title, name) in zip(panels, MEASURES.items(), strict=True):
        for place, (seeds, colour) in enumerate(zip(results.values(), COLOURS, strict=False)):
            values = [scores[name] for scores in seeds]
            panel.bar(place, fmean(values), color=colour, width=0.6)
            panel.plot([place] * len(values), values, "o", color=INK, markersize=4)
        if name in before:
            panel.axhline(before[name], color=INK, linestyle="--", linewidth=1)
        else:
            panel.axhline(CHANCE, color=INK, linestyle=":", linewidth=1)
        panel.set_xticks(range(len(results)), list(results))
        panel.set_title(title, fontsize=10)
        panel.set_ylim(0, 1.02)
    figure.suptitle("A point per seed. Dashed: before fine-tuning. Dotted: chance.", fontsize=9)
    figure.savefig(path, dpi=130)
    return path


# --- Models ----------------------------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[IDAVLMForConditionalGeneration, IDAVLMProcessor]:
    processor = IDAVLMProcessor.from_pretrained(folder)
    processor.image_loader = functools.lru_cache(maxsize=None)(processor.load_image)  # keeps all images in memory
    return IDAVLMForConditionalGeneration.from_pretrained(folder), processor


if __name__ == "__main__":
    main(HfArgumentParser(ExampleArguments, description=__doc__).parse_args_into_dataclasses()[0])
