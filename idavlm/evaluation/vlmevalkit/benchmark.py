"""The tasks of ``idavlm eval`` as data sets of VLMEvalKit, scored by the same code."""

import json
import os
from pathlib import Path
from typing import Any

import pandas
from vlmeval.dataset.image_base import ImageBaseDataset

from idavlm.data import DataError, ImageStore
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.chat_messages import messages_of
from idavlm.evaluation.task_run import TaskRun
from idavlm.evaluation.tasks import TASKS
from idavlm.models import BoxFormat

PREFIX = "idavlm_"


class IdentityBenchmark(ImageBaseDataset):
    """The data set ``idavlm_<task>``. Environment variables, with the task in capital letters, say where its data is.

    ``$RAP_DATA`` is the file or folder of the task ``rap``, ``$RAP_IMAGES`` the folder of its images if they are
    elsewhere, ``$RAP_MISSING=skip`` leaves out items whose images are missing, and ``$MMID_BOXES`` is the box format of
    the model, a kind of :class:`idavlm.models.BoxFormat`, for tasks that ask for boxes.

    The answers are scored by the rules of ``idavlm eval``, without a judge.

    Args:
        dataset: the name.

    Raises:
        ValueError: a variable is not set, or the data cannot be used.
    """

    TYPE = "VQA"
    MODALITY = "IMAGE"

    def __init__(self, dataset: str = f"{PREFIX}mmid") -> None:
        self.task = TASKS[dataset.removeprefix(PREFIX)]
        if self.task.boxes:
            kinds = ", ".join(BoxFormat.KINDS)
            self.boxes = BoxFormat(self._setting("BOXES", f"the box format of the model, one of {kinds}"))
        self._files: dict[tuple, str] = {}
        super().__init__(dataset)

    @classmethod
    def supported_datasets(cls) -> list[str]:
        """Names of the data sets."""
        return [f"{PREFIX}{name}" for name in TASKS]

    def load_data(self, dataset: str) -> pandas.DataFrame:
        """The questions, one per row; ``id`` is that of ``idavlm eval``."""
        self.items = self._run(Path()).load_items()
        for item in self.items:
            if len(item.sample.messages) != 1:
                raise DataError(
                    f"the question has {len(item.sample.messages)} turns; VLMEvalKit asks questions of one turn. Use "
                    "idavlm eval.",
                    where=item.sample.where,
                )
        rows = [
            {
                "index": number,
                "id": item.sample.id,
                "question": "".join(part.text or "<image>" for part in item.sample.messages[0].content),
                "answer": item.sample.answer or "",
            }
            for number, item in enumerate(self.items)
        ]
        return pandas.DataFrame(rows)

    def build_prompt(self, line: Any) -> list[dict[str, str]]:
        """A line "Kate is <image>" per reference, then the question with its images."""
        index = line if isinstance(line, int) else line["index"]
        sample = self.items[int(index)].sample
        [message] = messages_of(sample, lambda path: self._written(sample.image_root, path))
        return [
            {"type": part["type"], "value": part["text"] if part["type"] == "text" else part["url"]}
            for part in message["content"]
        ]

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, float]:
        """Score the answers in ``eval_file``; write ``scores.json`` and ``report.md`` to the folder of the same name.

        Args:
            eval_file: the questions with the column ``prediction``, as VLMEvalKit writes them: .xlsx, .tsv or .json.
            judge_kwargs: options of VLMEvalKit's judges. A judge (``model``) is an error.

        Returns:
            The metrics of each task, ``matching_accuracy``, and its numbers of unparsed and refused answers.
        """
        if judge_kwargs.get("model"):
            raise ValueError(
                f"--judge {judge_kwargs['model']}: answers are scored without a judge here. Remove it, or pass the "
                "answers to idavlm eval --predictions with --judge."
            )
        found = _predictions(Path(eval_file))
        missing = [number for number in range(len(self.items)) if number not in found]
        if missing:
            raise ValueError(f"{eval_file} has no prediction for {len(missing)} questions, the first is {missing[0]}.")
        answers = [Answer(item.sample.id, found[number]) for number, item in enumerate(self.items)]
        read_box = self.task.box_reader(self.boxes) if self.task.boxes else None
        run, facts = self._run(Path(eval_file).with_suffix("")), {"answered by": f"`{eval_file}`"}
        result = run.score(self.items, answers, read_box, **facts)
        run.report(self.items, {"right": result}, model=Path(eval_file).stem, **facts)
        scores: dict[str, float] = {}
        for task, row in result.summary.items():
            scores |= {f"{task}_{metric}": value for metric, value in row["metrics"].items()}
            scores |= {f"{task}_{name}": row[name] for name in ("unparsed", "refused")}
        return scores

    def _run(self, out: Path) -> TaskRun:
        images = self._optional("IMAGES")
        return TaskRun(
            self.task,
            Path(self._setting("DATA", "the file or folder of the benchmark")),
            out,
            images=Path(images) if images else None,
            missing=self._optional("MISSING") or "fail",
        )

    def _written(self, root: Any, path: str) -> str:
        """File of the upright RGB image; models of VLMEvalKit open files without regard to orientation."""
        if (root, path) not in self._files:
            folder = Path(self.img_root)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{len(self._files)}.png"
            ImageStore(root).open(path).save(file, compress_level=1)
            self._files[root, path] = str(file)
        return self._files[root, path]

    def _optional(self, name: str) -> str | None:
        return os.environ.get(f"{self.task.name.upper()}_{name}")

    def _setting(self, name: str, meaning: str) -> str:
        value = self._optional(name)
        if value is None:
            variable = f"{self.task.name.upper()}_{name}"
            raise ValueError(f"{variable} is not set; export {variable}: {meaning}.")
        return value


def _predictions(path: Path) -> dict[int, str]:
    """The answers by the index of the question. VLMEvalKit's own reader takes "None" and "3" for numbers."""
    options = {"dtype": str, "keep_default_na": False}
    if path.suffix == ".xlsx":
        table = pandas.read_excel(path, **options)
    elif path.suffix == ".tsv":
        table = pandas.read_csv(path, sep="\t", **options)
    elif path.suffix == ".json":
        table = pandas.DataFrame(json.loads(path.read_text(encoding="utf-8")))
    else:
        raise ValueError(f"{path} is not .xlsx, .tsv or .json; export PRED_FORMAT=json and generate the answers again.")
    for name in ("index", "prediction"):
        if name not in table:
            raise ValueError(f"{path} has no column {name!r}; pass the predictions that VLMEvalKit wrote.")
    return {int(index): str(text) for index, text in zip(table["index"], table["prediction"], strict=True)}
