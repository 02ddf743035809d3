"""What ``idavlm eval`` needs to know of a task: how to read its data, how to score answers, what tables there are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from idavlm.data.schema import Sample
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.baselines import Person
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ParseBox


@dataclass(frozen=True)
class Item:
    """A sample and what tables and scores need beside it.

    Attributes:
        sample: what is asked.
        groups: table -> the row the item counts in: ``{"type": "location", "domain": "movie"}``.
        extra: what this task's scores need.
    """

    sample: Sample
    groups: Mapping[str, str]
    extra: Mapping[str, Any] = field(default_factory=dict)


Load = Callable[[Path, "Path | None"], "list[Item]"]
"""``load(data, images)``: items of a file or folder, pictures below ``images`` (None: where the format keeps them)."""

Score = Callable[[Sequence[Item], Sequence[Answer], "ParseBox | None"], EvaluationResult]
"""``score(items, answers, parse_box)``; ``parse_box`` is None where nobody said how the model writes boxes."""


@dataclass(frozen=True)
class EvaluationTask:
    """A task of ``idavlm eval``.

    Attributes:
        name: as on the command line.
        about: one line.
        load: see :data:`Load`.
        score: see :data:`Score`.
        boxes: whether answers hold boxes, so that the convention must be stated.
        write_choices: whether questions with false answers are written freely too.
        judged: types whose answers a judge may score.
        summary: numbers of the task's own, as Markdown for the report.
        write: ``write(path, items, answers, model)``: the answers in the form of the task's own tools.
        person: see :func:`idavlm.evaluation.with_wrong_references`.
        max_new_tokens: longest answer, if nothing else is asked for.
    """

    name: str
    about: str
    load: Load
    score: Score
    boxes: bool = False
    write_choices: bool = False
    judged: tuple[str, ...] = ()
    summary: Callable[[Sequence[Item], EvaluationResult], str] | None = None
    write: Callable[[Path, Sequence[Item], Sequence[Answer], str], None] | None = None
    person: Person | None = None
    max_new_tokens: int = 64
