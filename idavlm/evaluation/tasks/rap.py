"""RAP-MLLM (arXiv 2410.13360): recognition, visual and text questions over Yo'LLaVA, captions of several concepts."""

import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ReadBox
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import field, iterate_records, question_sample, read_object
from idavlm.evaluation.tasks.concept_questions import (
    bare,
    choice_question,
    constant_questions,
    entries,
    missing_parts,
    options_of,
    recognition_by_concept,
    score_questions,
    with_missing_parts,
)
from idavlm.evaluation.tasks.constant_answers import constant_answer_table

CAPTIONS = "eval/captions.json"
DATABASES = ("example_database/database.json", "database.json")


def load_rap(data: Path, images: Path | None) -> list[Item]:
    """Load the repository of RAP: the files of ``eval`` and ``example_database/database.json``.

    The database image introduces a concept, and its ``info`` is part of the question. Text questions are asked in the
    released order of options (``choice_t``) and with right answers in turn A, B, A, ... (``choice_t_shuffled``).
    ``eval/captions.json``, which users write, maps images to the names of their concepts.
    """
    root = images if images is not None else data
    found = [data / name for name in DATABASES if (data / name).is_file()]
    if not found:
        raise DataError(f"{data} has neither {' nor '.join(DATABASES)}; pass the repository of RAP-MLLM.")
    database = _Database(found[0], root)
    readers = {
        "eval/recognition_test.json": _recognition,
        "eval/yollava-visual-qa.json": _visual_questions,
        "eval/yollava-text-only-qa.json": _text_questions,
        CAPTIONS: _captions,
    }
    items, missing = [], []
    for name, read in readers.items():
        if (data / name).is_file():
            items += read(data / name, database)
        else:
            missing.append(f"{data / name} does not exist")
    if not items:
        raise DataError(f"{data} has none of {', '.join(readers)}; pass the repository of RAP-MLLM.")
    copies = sum(item.extra.get("copies", 0) for item in items)
    if copies:
        missing.append(f"{copies} recognition records that repeat another one are asked once")
    return with_missing_parts(items, missing)


class _Database:
    """The concepts of ``database.json`` and samples about them."""

    def __init__(self, file: Path, root: Path):
        self.root = root
        where = f"{file}: concept_dict"
        self.concepts = entries(read_object(file).get("concept_dict"), where)
        self.references = {tag: field(concept, ("image",), f"{where}: {tag}") for tag, concept in self.concepts.items()}

    def tag(self, name: str, where: str) -> str:
        tag = f"<{bare(name)}>"
        if tag not in self.concepts:
            raise DataError(f"{quote(name)} is not a concept of the database; add it to database.json.", where=where)
        return tag

    def sample(self, record: dict, tags: Sequence[str], where: str, *, task: str, answer: str):
        """A sample whose question is preceded by the infos of the concepts, in the words of RAP."""
        infos = "".join(f"Name: {tag}, Info: {self.concepts[tag].get('info', '')}\n" for tag in tags)
        head = "<image>\n" if "image" in record else ""
        record = record | {
            "text": f"{head}[{infos}]{record['text']}",
            "identities": [{"name": tag, "images": [self.references[tag]]} for tag in tags],
        }
        if "image" in record:
            record["image"] = self._image_path(record["image"])
        return question_sample(record, where, root=self.root, task=task, answer=answer)

    def _image_path(self, path: str) -> str:
        """A path below ``root``: the files of RAP place ``yollava-data`` at the root, or in ``benchmark_data``."""
        path = PurePosixPath(path).as_posix()
        _, folder, rest = path.partition("yollava-data/")
        places = [path, f"{folder}{rest}", f"benchmark_data/{folder}{rest}"] if folder else [path]
        return next((place for place in places if os.path.isfile(self.root / place)), places[-1])

    def distractors(self, tags: Sequence[str]) -> list[str]:
        """One further concept for each of ``tags``, of the same category if there is one."""
        found: list[str] = []
        for tag in tags:
            others = [other for other in self.concepts if other not in tags and other not in found]
            category = self.concepts[tag].get("category")
            alike = [other for other in others if self.concepts[other].get("category") == category]
            found += (alike or others)[:1]
        return found


def _recognition(file: Path, database: _Database) -> list[Item]:
    """The true pairs stand in the file twice, once as ``type`` negative; only ``correct_answer`` is right."""
    found: dict[tuple[str, str], Item] = {}
    copies = 0
    for record, where in iterate_records(file):
        tag = database.tag(field(record, ("concept",), where), where)
        image = field(record, ("image",), where)
        answer = "Yes" if field(record, ("correct_answer",), where, kinds=(bool,)) else "No"
        before = found.get((image, tag))
        if before is not None:
            if before.sample.answer != answer:
                raise DataError(
                    f"correct_answer of {quote(image)} and {tag} contradicts an earlier record.", where=where
                )
            copies += 1
            continue
        question = field(record, ("question",), where).removeprefix("<image>\n")
        asked = {"id": f"recognition/{tag}/{image}", "text": question, "image": image}
        sample = database.sample(asked, [tag], where, task="recognition", answer=answer)
        found[image, tag] = Item(sample, {"task": "recognition", "concept": tag}, {})
    items = list(found.values())
    if items:
        items[0].extra["copies"] = copies
    return items


def _visual_questions(file: Path, database: _Database) -> list[Item]:
    items = []
    for concept, questions in entries(read_object(file), str(file)).items():
        for path, entry in entries(questions, f"{file}: {concept}").items():
            where = f"{file}: {concept}: {path}"
            asked = {"id": f"choice_v/{concept}/{path}", "image": path}
            items.append(_choice(database, asked, entry, "options", concept, where, "choice_v"))
    return items


def _text_questions(file: Path, database: _Database) -> list[Item]:
    items, shuffled = [], []
    for concept, questions in entries(read_object(file), str(file)).items():
        for key, entry in entries(questions, f"{file}: {concept}").items():
            where = f"{file}: {concept}: {key}"
            asked = {"id": f"choice_t/{concept}/{key}"}
            items.append(_choice(database, asked, entry, "option", concept, where, "choice_t"))
            turned = _with_answer_at(len(shuffled), entry)
            asked = {"id": f"choice_t_shuffled/{concept}/{key}"}
            shuffled.append(_choice(database, asked, turned, "option", concept, where, "choice_t_shuffled"))
    return items + shuffled


def _with_answer_at(number: int, entry: Mapping) -> dict:
    """The record with the right option exchanged with that of another letter: A for number 0, B for 1, and so on."""
    options, right = dict(entry["option"]), entry["correct_answer"]
    letter = list(options)[number % len(options)]
    options[letter], options[right] = options[right], options[letter]
    return {**entry, "option": options, "correct_answer": letter}


def _choice(database: _Database, asked: dict, entry: dict, options: str, concept: str, where: str, task: str) -> Item:
    tag, letters = database.tag(concept, where), options_of(entry, options, where)
    question = re.sub(r"<sks>|\bsks\b", tag, field(entry, ("question",), where))
    asked = asked | {"text": choice_question(question, letters)}
    sample = database.sample(asked, [tag], where, task=task, answer=entry["correct_answer"])
    return Item(sample, {"task": task, "concept": tag}, {"options": len(letters)})


def _captions(file: Path, database: _Database) -> list[Item]:
    """In place of the retrieval of RAP, the right concepts and as many wrong ones are introduced."""
    items = []
    for path, names in read_object(file).items():
        where = f"{file}: {path}"
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{quote(names)} is not a list of the names of concepts.", where=where)
        tags = list(dict.fromkeys(database.tag(name, where) for name in names))
        others = database.distractors(tags)
        asked = {"id": f"caption/{path}", "text": "Give a caption of the image.", "image": path}
        sample = database.sample(asked, sorted([*tags, *others]), where, task="caption", answer=", ".join(tags))
        groups = {"task": "caption", "concept": ", ".join(tags)}
        items.append(Item(sample, groups, {"names": tags, "others": others}))
    return items


def normalize_answer(text: str) -> str:
    """What the released scorer of questions compares: no case, no punctuation, no a, an and the, single spaces.

    It deletes the answer "A" as an article: an empty answer is then right, and "A. Dog" is wrong.
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _released(item: Item, text: str) -> dict[str, float]:
    if item.sample.task not in ("choice_v", "choice_t"):
        return {}
    return {"released_accuracy": float(normalize_answer(text) == normalize_answer(item.sample.answer))}


def score_rap(items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None = None) -> EvaluationResult:
    """Scores of :func:`score_questions`; ``released_accuracy`` of questions by :func:`normalize_answer`."""
    return score_questions(items, answers, _released)


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    constant = constant_answer_table(items, score_rap, constant_questions(items))
    parts = [recognition_by_concept(items, result), constant, missing_parts(items)]
    return "\n\n".join(part for part in parts if part)


RAP = EvaluationTask(
    name="rap",
    description="RAP-MLLM: recognition, visual and text questions, captions (repository of RAP-MLLM)",
    load=load_rap,
    score=score_rap,
    summary=_summary,
    identity_key=lambda name, path: name,
    max_new_tokens=128,
)
