"""``evaluate`` of a study with ``program: train``: files of records that the trained model answers."""

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from torch import nn

from idavlm.data import RecordDataset
from idavlm.evaluation import EvaluationResult, evaluate
from idavlm.evaluation.generation import REFERENCES
from idavlm.utils import check_choice, check_positive, check_type


@dataclass(frozen=True)
class RecordEvaluation:
    """An entry of ``evaluate``.

    Attributes:
        data: file of evaluation records.
        references: ``"right"``, ``"none"`` or ``"wrong"``, see :func:`idavlm.evaluation.evaluate`.
        batch_size: records that are answered at once.
        max_new_tokens: maximum length of an answer.
        workflow: the inner-adaptor workflow that answers; None for a model without inner adaptors.
        tasks: answer the records of these tasks; None for all.
        max_records_per_task: answer the first records of each task, as many as this; None for all.
    """

    data: str
    references: str = "right"
    batch_size: int = 16
    max_new_tokens: int = 64
    workflow: str | None = None
    tasks: list[str] | None = None
    max_records_per_task: int | None = None

    def __post_init__(self) -> None:
        check_choice("references", self.references, REFERENCES)
        check_positive(batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        check_positive(max_records_per_task=self.max_records_per_task)
        if not Path(self.data).is_file():
            raise ValueError(f"data={self.data!r} is no file in the current folder.")
        if self.tasks is not None:
            known = {str(sample.task) for sample in RecordDataset(self.data)}
            unknown = set(self.tasks) - known
            if unknown or not self.tasks:
                raise ValueError(
                    f"tasks={self.tasks}: {self.data} has records of {', '.join(sorted(known))}; name some of these."
                )

    def run(self, model: nn.Module, processor) -> EvaluationResult:
        """Let a model answer the records."""
        samples, counts = [], Counter()
        for sample in RecordDataset(self.data):
            if self.tasks is not None and sample.task not in self.tasks:
                continue
            counts[sample.task] += 1
            if self.max_records_per_task is None or counts[sample.task] <= self.max_records_per_task:
                samples.append(sample)
        options = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
        with nullcontext() if self.workflow is None else model.workflow(self.workflow):
            return evaluate(model, processor, samples, references=self.references, **options)


def read_evaluations(values: Mapping[str, Any]) -> dict[str, RecordEvaluation]:
    """The evaluations of a study: each is a file, or a mapping with the attributes of :class:`RecordEvaluation`.

    Raises:
        ValueError: an entry has another form, or its file does not exist.
    """
    found, hints = {}, get_type_hints(RecordEvaluation)
    for name, value in values.items():
        options = {"data": value} if isinstance(value, str) else value
        if not isinstance(options, dict) or "data" not in options:
            raise ValueError(f"evaluate: {name!r} is {value!r}; expected a file, or a mapping with 'data'.")
        for key, option in options.items():
            check_choice(f"evaluate: key of {name}", key, hints)
            check_type(f"evaluate: {name}: {key}", option, hints[key])
        try:
            found[name] = RecordEvaluation(**options)
        except ValueError as error:
            raise ValueError(f"evaluate: {name}: {error}") from None
    return found
