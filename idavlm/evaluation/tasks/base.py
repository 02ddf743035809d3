"""Interface of a task of ``idavlm eval``: how to load its data and how to score answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from idavlm.data.schema import Sample
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.baselines import IdentityKey
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ParseBox


@dataclass(frozen=True)
class Item:
    """An evaluation sample with the information that tables and scores need.

    Attributes:
        sample: the sample.
        groups: table -> row of the table that the item belongs to: ``{"task": "location", "domain": "movie"}``.
        extra: task-specific information for scoring.
    """

    sample: Sample
    groups: Mapping[str, str]
    extra: Mapping[str, Any] = field(default_factory=dict)


Load = Callable[[Path, "Path | None"], "list[Item]"]
"""``load(data, images)``: items of a file or folder; paths are relative to ``images`` (None: default of the task)."""

Score = Callable[[Sequence[Item], Sequence[Answer], "ParseBox | None"], EvaluationResult]
"""``score(items, answers, parse_box)``; ``parse_box`` is None if the box format of the model is not specified."""


@dataclass(frozen=True)
class EvaluationTask:
    """A task of ``idavlm eval``.

    Attributes:
        name: name on the command line.
        description: one line for help texts.
        load: see :data:`Load`.
        score: see :data:`Score`.
        boxes: whether answers contain boxes, so that the box format of the model is needed.
        write_choices: whether text is generated for multiple-choice questions too.
        judged: tasks of the samples whose answers a judge may score.
        summary: task-specific numbers as Markdown for the report.
        write: ``write(path, items, answers, model)`` writes the answers in the format of the benchmark's own tools.
        identity_key: see :func:`idavlm.evaluation.with_wrong_references`.
        max_new_tokens: default maximum length of an answer.
    """

    name: str
    description: str
    load: Load
    score: Score
    boxes: bool = False
    write_choices: bool = False
    judged: tuple[str, ...] = ()
    summary: Callable[[Sequence[Item], EvaluationResult], str] | None = None
    write: Callable[[Path, Sequence[Item], Sequence[Answer], str], None] | None = None
    identity_key: IdentityKey | None = None
    max_new_tokens: int = 64
