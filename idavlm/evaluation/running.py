"""One run of ``idavlm eval``: answers, scores and report of a task in one folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from idavlm.evaluation.answers import Answer, load_answers
from idavlm.evaluation.generation import generate_answers
from idavlm.evaluation.report import describe_machine
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ParseBox
from idavlm.evaluation.tables import interval_summary, interval_table
from idavlm.evaluation.tasks.images import with_images
from idavlm.evaluation.tasks.task import EvaluationTask, Item

VARIANT_FOLDERS = {"right": "", "none": "no-references", "wrong": "wrong-references"}
VARIANT_NAMES = {"right": "right references", "none": "no references", "wrong": "wrong references"}

Judge = Callable[[Sequence[Item], EvaluationResult], EvaluationResult]
"""Adds scores; :func:`idavlm.evaluation.judge.judge_answers` with a client and types."""


@dataclass(frozen=True)
class TaskRun:
    """What was evaluated, and where its files go.

    Attributes:
        task: a task of :data:`idavlm.evaluation.tasks.TASKS`.
        data: file or folder of the task.
        out: folder for ``predictions.jsonl``, ``scores.json``, ``report.md``.
        images: folder the pictures stand below; None for the task's own.
        missing: pictures that are not there: ``"fail"`` or ``"skip"`` their items.
    """

    task: EvaluationTask
    data: Path
    out: Path
    images: Path | None = None
    missing: str = "fail"

    def items(self, *, pictures: bool = True) -> list[Item]:
        """The task's items; with ``pictures`` only those whose pictures are there, and the others are listed once."""
        items = self.task.load(self.data, self.images)
        if pictures:
            items, absent = with_images(items, self.missing)
            if absent:
                listed = "\n  ".join(absent)
                print(f"{len(absent)} pictures are missing, {len(items)} items are left:\n  {listed}")
        return items

    def generate(
        self,
        items: Sequence[Item],
        model,
        processor,
        *,
        name: str,
        references: str = "right",
        batch_size: int = 16,
        max_new_tokens: int | None = None,
    ) -> list[Answer]:
        """Answers of a model, going on where an earlier run was stopped."""
        answers = generate_answers(
            model,
            processor,
            [item.sample for item in items],
            path=self.folder(references) / "predictions.jsonl",
            batch_size=batch_size,
            max_new_tokens=max_new_tokens or self.task.max_new_tokens,
            references=references,
            write_choices=self.task.write_choices,
            person=self.task.person,
            settings={"task": self.task.name, "data": str(self.data), "model": name},
            progress=True,
        )
        if self.task.write is not None:
            self.task.write(self.folder(references) / "answers.jsonl", items, answers, name)
        return answers

    def folder(self, references: str = "right") -> Path:
        return self.out / VARIANT_FOLDERS[references]

    def score(
        self,
        items: Sequence[Item],
        answers: Sequence[Answer],
        parse_box: ParseBox | None,
        *,
        references: str = "right",
        judge: Judge | None = None,
        **facts: object,
    ) -> EvaluationResult:
        """Score answers and write ``scores.json``: tables with intervals, facts of the run, every prediction."""
        result = self.task.score(items, answers, parse_box)
        if judge is not None:
            result = judge(items, result)
        tables = {name: interval_summary(result, self._label(items, name)) for name in self._tables(items)}
        facts = {"task": self.task.name, "data": str(self.data), "images": str(self.images or ""), **facts}
        result.save(self.folder(references) / "scores.json", **facts, references=references, tables=tables)
        return result

    def report(self, items: Sequence[Item], results: dict[str, EvaluationResult], **facts: object) -> Path:
        """Write ``report.md``: a table by type, and the task's other tables; a column a variant.

        Args:
            items: what was asked.
            results: of the references shown: ``{"right": ..., "none": ..., "wrong": ...}``.
            facts: lines at the top.
        """
        columns = {VARIANT_NAMES[references]: result for references, result in results.items()}
        lines = {"data": f"`{self.data}`", **facts, "machine": describe_machine()}
        parts = [f"# {self.task.name}: {self.task.about}", "  \n".join(f"{k}: {v}" for k, v in lines.items() if v)]
        for name in self._tables(items):
            parts += [f"## By {name}", interval_table(columns, self._label(items, name), first=name)]
        if len(self._tables(items)) > 1:
            parts += ["## By " + " and ".join(self._tables(items))]
            parts += [interval_table(columns, self._cross(items), first=" / ".join(self._tables(items)))]
        if self.task.summary is not None:
            for references, result in results.items():
                text = self.task.summary(items, result)
                parts += [text if len(results) == 1 else f"{text}\n\n({VARIANT_NAMES[references]})"] if text else []
        parts.append(
            "Means with 95 % bootstrap intervals over the items (2000 resamples). An answer that cannot be read scores "
            "0 and is counted. Guessing: one of the answers; for boxes, where persons are marked, one of them."
        )
        path = self.out / "report.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        return path

    @staticmethod
    def _tables(items: Sequence[Item]) -> list[str]:
        return list(dict.fromkeys(name for item in items for name in item.groups))

    @staticmethod
    def _label(items: Sequence[Item], table: str) -> Callable[[Prediction], str]:
        groups = {item.sample.id: item.groups.get(table, "") for item in items}
        return lambda prediction: groups[prediction.id]

    @staticmethod
    def _cross(items: Sequence[Item]) -> Callable[[Prediction], str]:
        groups = {item.sample.id: " / ".join(item.groups.values()) for item in items}
        return lambda prediction: groups[prediction.id]


def read_predictions(path: Path, items: Sequence[Item], missing: str) -> tuple[list[Item], list[Answer]]:
    """Answers of any model to ``items``; with ``missing="skip"`` items without an answer are left out."""
    if missing == "skip":
        there = {answer.id for answer in load_answers(path)}
        items = [item for item in items if item.sample.id in there]
    return list(items), load_answers(path, [item.sample for item in items])


def load_scores(path: str | Path) -> tuple[EvaluationResult, dict]:
    """``scores.json`` of a folder (or file), and the facts beside its predictions."""
    path = Path(path)
    path = path / "scores.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a folder that idavlm eval wrote.")
    content = json.loads(path.read_text(encoding="utf-8"))
    facts = {key: value for key, value in content.items() if key not in ("predictions", "summary", "seconds")}
    return EvaluationResult.load(path), facts
