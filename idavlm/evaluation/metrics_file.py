"""``metrics.json``: the scores of one training run, which ``idavlm ablate`` collects into tables."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from idavlm.data.errors import quote
from idavlm.evaluation.results import EvaluationResult
from idavlm.utils import read_json_object, write_text

METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class RunMetrics:
    """Content of ``metrics.json``.

    Attributes:
        metrics: name -> value. :func:`write_metrics` names them ``evaluation/task/metric``.
        answers: evaluation -> its scored answers, one result per seed of the run. With them, two runs are compared
            record by record.
        records: evaluation -> file of the evaluated records, for pages with their images.
        facts: further entries: ``parameters``, ``trained_parameters``, ``seconds``, ...
    """

    metrics: dict[str, float]
    answers: dict[str, list[EvaluationResult]]
    records: dict[str, Path]
    facts: dict[str, Any]


def write_metrics(
    folder: str | Path,
    results: Mapping[str, Sequence[EvaluationResult]],
    *,
    records: Mapping[str, str | Path] | None = None,
    **facts: Any,
) -> Path:
    """Write the scores of a training run: ``metrics.json``, and the scored answers in the folder ``answers``.

    Args:
        folder: folder of the run; created if missing.
        results: evaluation ("with ID-Former", "no references", ...) -> one result per seed. A metric is the mean over
            the seeds.
        records: evaluation -> file of the evaluated records. Pages that compare runs show their images.
        facts: what else is known of the run, for example ``parameters`` and ``seconds``.

    Returns:
        The path of ``metrics.json``.
    """
    folder = Path(folder)
    metrics: dict[str, float] = {}
    answers: dict[str, list[str]] = {}
    for evaluation, seeds in results.items():
        values: dict[str, list[float]] = {}
        for result in seeds:
            for task, row in result.summary.items():
                for metric, value in row["metrics"].items():
                    values.setdefault(f"{evaluation}/{task}/{metric}", []).append(value)
        metrics |= {name: fmean(found) for name, found in values.items()}
        names = [f"answers/{evaluation.replace('/', '-')}-{number}.json" for number in range(len(seeds))]
        for name, result in zip(names, seeds, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            result.save(folder / name)
        answers[evaluation] = names
    files = {evaluation: str(Path(path).absolute()) for evaluation, path in (records or {}).items()}
    content = {**facts, "metrics": metrics, "answers": answers, "records": files}
    return write_text(folder / METRICS_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_metrics(folder: str | Path) -> RunMetrics:
    """Read ``metrics.json`` of a folder: of :func:`write_metrics`, or one that a program of another kind wrote.

    Only the entry ``metrics`` is required: ``{"metrics": {"accuracy": 0.9}}``.

    Raises:
        OSError: the file cannot be read.
        ValueError: with the path, for a file of another form.
    """
    path = Path(folder) / METRICS_FILE
    content = read_json_object(path)
    metrics, answers, records = content.pop("metrics", None), content.pop("answers", {}), content.pop("records", {})
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(f"{path}: 'metrics' is {quote(metrics)}; expected an object of names and numbers.")
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{path}: the metric {quote(name)} is {quote(value)}; expected a finite number.")
    is_listed = isinstance(answers, dict) and all(isinstance(names, list) for names in answers.values())
    if not is_listed or not all(isinstance(name, str) for names in answers.values() for name in names):
        raise ValueError(f"{path}: 'answers' is {quote(answers)}; expected an object of lists of files.")
    if not isinstance(records, dict) or not all(isinstance(file, str) for file in records.values()):
        raise ValueError(f"{path}: 'records' is {quote(records)}; expected an object of files.")
    return RunMetrics(
        metrics={name: float(value) for name, value in metrics.items()},
        answers={
            name: [EvaluationResult.load(Path(folder) / file) for file in files] for name, files in answers.items()
        },
        records={name: Path(file) for name, file in records.items()},
        facts=content,
    )
