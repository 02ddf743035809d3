"""A run of ``idavlm eval``: generate answers, score them and write the report of a task to one folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from idavlm.data.errors import DataError, quote
from idavlm.data.schema import Identity, Sample
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.bootstrap import RESAMPLES
from idavlm.evaluation.fingerprints import item_fingerprint
from idavlm.evaluation.generation import generate_answers
from idavlm.evaluation.report import count_of, interval_summary, interval_table
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ReadBox
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.image_files import with_images
from idavlm.utils import describe_machine, read_json_object, write_text

VARIANT_FOLDERS = {"right": "", "none": "no-references", "wrong": "wrong-references"}
VARIANT_NAMES = {"right": "right references", "none": "no references", "wrong": "wrong references"}

Judge = Callable[[Sequence[Item], EvaluationResult], EvaluationResult]
"""Adds scores to a result, for example ``partial(judge_answers, client, tasks=...)``."""


@dataclass(frozen=True)
class TaskRun:
    """A task, its data and the output folder.

    Attributes:
        task: a task of :data:`idavlm.evaluation.tasks.TASKS`.
        data: file or folder of the data.
        out: folder for ``predictions.jsonl``, ``scores.json``, ``report.md``.
        images: folder that image paths are relative to; None for the default of the task.
        missing: what to do about missing image files: ``"fail"``, or ``"skip"`` the items that need them.
        max_references: photos that introduce an identity, at most; None for the default of the task.
    """

    task: EvaluationTask
    data: Path
    out: Path
    images: Path | None = None
    missing: str = "fail"
    max_references: int | None = None

    def load_items(self, *, need_images: bool = True) -> list[Item]:
        """Load the items of the task.

        Args:
            need_images: whether to check the image files. Items without them are an error or left out, according to
                ``missing``; the missing files are printed.

        Raises:
            DataError: a record cannot be used, there is no item, or two items have the same id.
        """
        items = self.task.load(self.data, self.images)
        if not items:
            raise DataError(f"{self.data} holds no record; pass a file with at least one.")
        ids: set[str] = set()
        for item in items:
            if item.sample.id in ids:
                message = f"id={quote(item.sample.id)} is not unique; use a different id for every record."
                raise DataError(message, where=item.sample.where)
            ids.add(item.sample.id)
        most = self.task.max_references if self.max_references is None else self.max_references
        if most is not None:
            items = [replace(item, sample=_with_references(item.sample, most)) for item in items]
        if need_images:
            items, absent = with_images(items, self.missing)
            if absent:
                listed = "\n  ".join(absent)
                print(f"{len(absent)} image files are missing, {len(items)} items are left:\n  {listed}")
        return items

    def generate(
        self, items: Sequence[Item], model, processor, *, name: str, references: str = "right", **options: int
    ) -> list[Answer]:
        """Call :func:`idavlm.evaluation.generate_answers` (``options``: its sizes); an interrupted run is resumed."""
        answers = generate_answers(
            model,
            processor,
            [item.sample for item in items],
            path=self.folder(references) / "predictions.jsonl",
            references=references,
            write_choices=self.task.write_choices,
            identity_key=self.task.identity_key,
            settings={"task": self.task.name},
            progress=True,
            **options,
        )
        if self.task.write is not None:
            self.task.write(self.folder(references) / "answers.jsonl", items, answers, name)
        return answers

    def folder(self, references: str = "right") -> Path:
        """Output folder for a choice of references."""
        return self.out / VARIANT_FOLDERS[references]

    def score(
        self,
        items: Sequence[Item],
        answers: Sequence[Answer],
        read_box: ReadBox | None,
        *,
        references: str = "right",
        judge: Judge | None = None,
        **facts: object,
    ) -> EvaluationResult:
        """Score answers and write ``scores.json``: tables with intervals, ``facts`` and all predictions.

        Each prediction has the fingerprint of its item, so that :func:`pair_predictions` compares equal items only.
        """
        result = self.task.score(items, answers, read_box)
        if judge is not None:
            result = judge(items, result)
        predictions = [
            replace(prediction, item=item_fingerprint(item.sample))
            for prediction, item in zip(result.predictions, items, strict=True)
        ]
        result = replace(result, predictions=predictions)
        tables = {name: interval_summary(result, label) for name, label in _labels(items).items()}
        facts = {"task": self.task.name, "data": str(self.data), "images": str(self.images or ""), **facts}
        result.save(self.folder(references) / "scores.json", **facts, references=references, tables=tables)
        return result

    def report(
        self, items: Sequence[Item], results: dict[str, EvaluationResult], *, model: str, **facts: object
    ) -> Path:
        """Write ``report.md`` with the tables of the task; each choice of references is a column.

        Args:
            items: the evaluated items.
            results: choice of references (``"right"``, ``"none"``, ``"wrong"``) -> result.
            model: the evaluated model or file of predictions, for the title.
            facts: lines below the title.
        """
        columns = {VARIANT_NAMES[references]: result for references, result in results.items()}
        lines = {"task": self.task.description, "data": f"`{self.data}`", **facts, "machine": describe_machine()}
        parts = [f"# {model} on {self.task.name} ({self.data.name}): {count_of(len(items), 'item')}"]
        parts += ["  \n".join(f"{name}: {value}" for name, value in lines.items() if value)]
        labels = _labels(items)
        for name, label in labels.items():
            parts += [f"## By {name}", interval_table(columns, label, first=name)]
        if len(labels) > 1:
            groups = {item.sample.id: " / ".join(item.groups.values()) for item in items}
            table = interval_table(columns, lambda prediction: groups[prediction.id], first=" / ".join(labels))
            parts += [f"## By {' and '.join(labels)}", table]
        if self.task.summary is not None:
            for references, result in results.items():
                text = self.task.summary(items, result)
                parts += [text if len(results) == 1 else f"{text}\n\n({VARIANT_NAMES[references]})"] if text else []
        parts.append(
            f"Means with 95 % bootstrap intervals over the items ({RESAMPLES} resamples). Answers that cannot be "
            "parsed score 0. Chance: a random candidate; for boxes, a random annotated box of the image."
        )
        return write_text(self.out / "report.md", "\n\n".join(parts) + "\n")


def _with_references(sample: Sample, most: int) -> Sample:
    """The sample with the first ``most`` photos of each identity."""
    identities = [Identity(identity.name, identity.images[:most]) for identity in sample.identities]
    return replace(sample, identities=identities)


def _labels(items: Sequence[Item]) -> dict[str, Callable[[Prediction], str]]:
    """For each table, a function that returns the row of a prediction."""
    groups = {item.sample.id: item.groups for item in items}
    names = dict.fromkeys(name for item in items for name in item.groups)
    return {name: lambda prediction, name=name: groups[prediction.id].get(name, "") for name in names}


def load_scores(path: str | Path) -> tuple[EvaluationResult, dict]:
    """Load ``scores.json`` of a folder (or the file itself): the result, and the facts stored with it.

    Raises:
        OSError: the file cannot be read.
        ValueError: with the path, for a file that ``idavlm eval`` did not write.
    """
    path = Path(path)
    path = path / "scores.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pass a folder that idavlm eval wrote.")
    result = EvaluationResult.load(path)
    content = read_json_object(path)
    for name in ("task", "data", "images"):
        if not isinstance(content.get(name), str):
            raise ValueError(f"{path}: {name}={quote(content.get(name))} is not a text; pass a file of idavlm eval.")
    return result, {key: value for key, value in content.items() if key not in ("predictions", "summary", "seconds")}
