"""MC-LLaVA (arXiv 2411.11706): recognition, choices, questions and captions of two to four concepts per scenario."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ReadBox, word_f1
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import field, iterate_records, question_sample, read_object
from idavlm.evaluation.tasks.concept_questions import (
    bare,
    constant_questions,
    missing_parts,
    photos_in,
    score_questions,
    with_missing_parts,
)
from idavlm.evaluation.tasks.constant_answers import constant_answer_table
from idavlm.utils import plain_answer
from idavlm.utils.answer_parsing import is_refusal

LETTER = "\nIMPORTANT: Answer the question using a single letter A, B or C."
_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]", re.MULTILINE)


def load_mc_llava(data: Path, images: Path | None) -> list[Item]:
    """Load the folder of the release, with ``concept_type.json`` and ``<type>/concept`` and ``<type>/multi``.

    All concepts of a scenario are introduced by their photos in ``train``, in every question about it.
    """
    root = images if images is not None else data
    types_file = data / "concept_type.json"
    types = read_object(types_file)
    items: list[Item] = []
    missing = ["negative questions about random images of other scenarios, which the released code draws"]
    for name, kind in types.items():
        if not isinstance(kind, str) or not kind.isidentifier():
            raise DataError(f"{quote(kind)} is not a type such as 'two_concept'.", where=f"{types_file}: {name}")
    for kind in sorted(set(types.values())):
        multi = data / kind / "multi"
        if not os.path.isdir(multi):
            missing.append(f"{multi} does not exist")
            continue
        for folder in sorted(path for path in multi.iterdir() if path.is_dir()):
            # The released code finds folders by substring, so that "Ann" finds the scenario of "Joanna".
            names = folder.name.split("_")
            unknown = [name for name in names if types.get(name) != kind]
            if unknown:
                raise DataError(
                    f"{folder}: {quote(unknown[0])} is not a concept of {kind} in concept_type.json; folders are named "
                    "by the concepts, joined by '_'."
                )
            items += _Scenario(data, root, kind, names, missing).items()
    if not items:
        raise DataError(f"{data} has no scenario in <type>/multi; pass the folder of the release.")
    return with_missing_parts(items, missing)


@dataclass(frozen=True)
class _Scenario:
    """The questions about one folder of ``multi`` and its concepts."""

    data: Path
    root: Path
    kind: str
    names: list[str]
    missing: list[str]

    def items(self) -> Iterator[Item]:
        """Settings as released: one image and one query (``si_sq``), several concepts in either (``mi_``, ``_mq``)."""
        concept, multi = f"{self.kind}/concept", f"{self.kind}/multi/{'_'.join(self.names)}"
        references = {name: photos_in(self.root / concept / "train" / name, self.root) for name in self.names}
        identities = [{"name": f"<{name}>", "images": photos} for name, photos in references.items()]
        singles = {name: photos_in(self.root / concept / "test" / name, self.root) for name in self.names}
        present = self._present(self.data / multi / "position.json")
        for name in self.names:
            for shown, images in singles.items():
                for image in images:
                    yield self._recognition(image, [name], "si_sq", identities, shown == name, shown == name)
        for image in photos_in(self.root / multi, self.root):
            there = present.get(image, set(self.names))
            for name in self.names:
                yield self._recognition(image, [name], "mi_sq", identities, name in there, True)
            yield self._recognition(image, self.names, "mi_mq", identities, set(self.names) <= there, True)
        for name in self.names:
            for image in singles[name]:
                yield self._caption(image, [name], "si", identities)
        for image, there in present.items():
            if there:
                yield self._caption(image, [name for name in self.names if name in there], "mi", identities)
        for name in self.names:
            yield from self._questions(f"{concept}/test/{name}", identities, is_single=True)
        yield from self._questions(multi, identities, is_single=False)

    def _present(self, file: Path) -> dict[str, set[str]]:
        """The concepts that each image of several concepts shows."""
        if not self._is_there(file):
            return {}
        present = {}
        for path, positions in read_object(file).items():
            if not isinstance(positions, dict) or {bare(name) for name in positions} - set(self.names):
                raise DataError(
                    f"{quote(positions)} is not a position or null for {self.names}.", where=f"{file}: {path}"
                )
            present[self._image_path(path)] = {bare(name) for name, place in positions.items() if place is not None}
        return present

    def _is_there(self, file: Path) -> bool:
        if not file.is_file():
            self.missing.append(f"{file} does not exist")
        return file.is_file()

    def _image_path(self, path: str) -> str:
        """A path of a file of the release, without the folders above the type."""
        parts = PurePosixPath(path).parts
        start = parts.index(self.kind) if self.kind in parts else 0
        return PurePosixPath(*parts[start:]).as_posix()

    def _recognition(
        self, image: str, asked: list[str], setting: str, identities: list, is_there: bool, released: bool
    ) -> Item:
        names = " and ".join(f"<{name}>" for name in asked)
        question = f"Can you see {names} in this photo? Answer the question using a single word Yes or No."
        record = {"id": f"recognition/{setting}/{'_'.join(asked)}/{image}", "text": question, "image": image}
        answer = "Yes" if is_there else "No"
        extra = {"released": "Yes" if released else "No"}
        return self._item(record, str(self.root / image), "recognition", setting, identities, answer, extra)

    def _caption(self, image: str, present: list[str], setting: str, identities: list) -> Item:
        names = ", ".join(f"<{name}>" for name in self.names)
        question = (
            f"Can you see {names} in the image? Don't answer the question but remember it, and only response a "
            "detailed caption for the image. Your caption:"
        )
        record = {"id": f"caption/{setting}/{image}", "text": question, "image": image}
        extra = {"names": [f"<{name}>" for name in present]}
        extra["others"] = [f"<{name}>" for name in self.names if name not in present]
        answer = ", ".join(extra["names"])
        return self._item(record, str(self.root / image), "caption", setting, identities, answer, extra)

    def _questions(self, folder: str, identities: list, *, is_single: bool) -> Iterator[Item]:
        files = {"choice.json": "choice_v", "vqa.json": "vqa"} | (
            {} if is_single else {"vqa_position.json": "position"}
        )
        for name, task in files.items():
            file = self.data / folder / name
            if not self._is_there(file):
                continue
            for path, found in read_object(file).items():
                entries = [found] if is_single else found
                if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                    raise DataError(f"{quote(found)} is not a list of questions.", where=f"{file}: {path}")
                for number, entry in enumerate(entries):
                    # Of an image of several concepts, the first two questions concern one of them.
                    setting = "si_sq" if is_single else "mi_sq" if number < 2 else "mi_mq"
                    where, image = f"{file}: {path}: {number}", self._image_path(path)
                    record = {"id": f"{task}/{setting}/{number}/{image}", "text": field(entry, ("Human",), where)}
                    record["image"] = image
                    answer = field(entry, ("AI",), where)
                    yield self._question(record, where, task, setting, identities, answer)
        file = self.data / folder / "qa.json"
        if self._is_there(file):
            for number, (entry, where) in enumerate(iterate_records(file)):
                record = {"id": f"choice_t/{folder}/{number}", "text": field(entry, ("question",), where)}
                answer = field(entry, ("answer",), where)
                yield self._question(record, where, "choice_t", "s" if is_single else "m", identities, answer)

    def _question(self, record: dict, where: str, task: str, setting: str, identities: list, answer: str) -> Item:
        if task == "vqa":
            return self._item(record, where, task, setting, identities, answer, {})
        letters = set(_OPTION.findall(record["text"]))
        if not re.fullmatch("[A-Z]", answer) or (letters and answer not in letters):
            options = ", ".join(sorted(letters)) or "one letter"
            raise DataError(f"the answer {quote(answer)} is not one of the options ({options}).", where=where)
        record["text"] += LETTER
        task = "choice_position" if task == "position" else task
        return self._item(record, where, task, setting, identities, answer, {"options": len(letters) or None})

    def _item(
        self, record: dict, where: str, task: str, setting: str, identities: list, answer: str, extra: dict
    ) -> Item:
        record["identities"] = identities
        sample = question_sample(record, where, root=self.root, task=task, answer=answer)
        return Item(sample, {"task": task, "setting": setting}, {**extra, "scenario": "_".join(self.names)})


def score_mc_llava(
    items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None = None
) -> EvaluationResult:
    """Scores of :func:`score_questions`, ``word_f1`` of ``vqa``, and the scores of the released code as ``released_``.

    The released code compares answers exactly, counts a concept as present in all images of its scenario, finds
    ``<name>`` anywhere in a caption, and scores ``vqa`` by :func:`character_bleu`.
    """
    predictions: list[Prediction] = []
    for item, answer in zip(items, answers, strict=True):
        if item.sample.task != "vqa":
            predictions += score_questions([item], [answer], _released).predictions
            continue
        text, right = answer.prediction or "", item.sample.answer
        scores = {"word_f1": word_f1(plain_answer(text), right), "released_bleu": character_bleu(right, text)}
        problem = "refused" if is_refusal(text) and not is_refusal(right) else ""
        predictions.append(Prediction(item.sample.id, "vqa", text, right, scores, problem=problem))
    return EvaluationResult(predictions)


def _released(item: Item, text: str) -> dict[str, float]:
    if item.sample.task == "recognition":
        right = item.extra["released"]
        metric = "released_positive" if right == "Yes" else "released_negative"
        return {metric: float(text == right), "released_accuracy": float(text == right)}
    if item.sample.task == "caption":
        names = item.extra["names"]
        names = names if item.groups["setting"] == "si" else list(map(bare, names))
        return {"released_recall": sum(name in text for name in names) / len(names)}
    return {"released_accuracy": float(text == item.sample.answer)}


def character_bleu(reference: str, text: str) -> float:
    """BLEU over characters and pairs of characters with weights 0.7 and 0.3, as the released code calls NLTK.

    A count of zero pairs is taken as 0.1 (smoothing 1).
    """
    if not set(reference) & set(text):
        return 0.0
    logarithms = []
    for weight, expected, found in (
        (0.7, Counter(reference), Counter(text)),
        (0.3, Counter(pairwise(reference)), Counter(pairwise(text))),
    ):
        matches = (expected & found).total()
        logarithms.append(weight * math.log((matches or 0.1) / max(1, found.total())))
    brevity = min(0.0, 1 - len(reference) / len(text))
    return math.exp(brevity + sum(logarithms))


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    constant = constant_answer_table(items, score_mc_llava, constant_questions(items))
    return "\n\n".join(part for part in (constant, missing_parts(items)) if part)


MC_LLAVA = EvaluationTask(
    name="mc_llava",
    description="MC-LLaVA: recognition, choices, questions, captions of several concepts (folder of the release)",
    load=load_mc_llava,
    score=score_mc_llava,
    judged=("vqa",),
    summary=_summary,
    identity_key=lambda name, path: name,
    max_new_tokens=128,
)
