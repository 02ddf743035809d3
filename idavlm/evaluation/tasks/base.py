"""Interface of a task of ``idavlm eval``: how to load its data and how to score answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from idavlm.data import ImageStore
from idavlm.data.errors import DataError
from idavlm.data.schema import Sample
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.baselines import IdentityKey
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ReadBox, score_answers
from idavlm.models.boxes import BoxFormat

BOX_TASKS = ("location", "human_ref")
"""Tasks of samples whose answers hold boxes."""


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

    @property
    def asks_for_boxes(self) -> bool:
        """Whether the answer holds boxes, so that the box format and the size of the image are needed."""
        return self.sample.task in BOX_TASKS

    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the last image: ``extra["size"]``, else those of the file; None if it is missing.

        Only the header of the file is read.

        Raises:
            DataError: the file is not an image.
        """
        if self.extra.get("size") is not None:
            return self.extra["size"]
        if self.sample.image_root is None or not self.sample.message_images:
            return None
        store, path = ImageStore(self.sample.image_root), self.sample.message_images[-1]
        if not store.has(path):
            return None
        try:
            return store.size(path)
        except DataError as error:
            raise error.at(self.sample.where) from error


Load = Callable[[Path, "Path | None"], "list[Item]"]
"""``load(data, images)``: items of a file or folder; paths are relative to ``images`` (None: default of the task)."""

ReadBoxes = Callable[[str, "tuple[int, int] | None"], "tuple[list[list[float]], str | None]"]
"""``read_boxes(text, image_size)``, see :meth:`idavlm.models.BoxFormat.read_boxes`."""

Score = Callable[[Sequence[Item], Sequence[Answer], "ReadBox | ReadBoxes | None"], EvaluationResult]
"""``score(items, answers, read_box)``; ``read_box`` is None if the box format of the model is not specified."""


@dataclass(frozen=True)
class EvaluationTask:
    """A task of ``idavlm eval``.

    Attributes:
        name: name on the command line.
        description: one line for help texts.
        load: see :data:`Load`.
        score: see :data:`Score`.
        boxes: whether answers contain boxes, so that the box format of the model is needed.
        several_boxes: whether an answer may contain several boxes; ``score`` then receives ``read_boxes`` in place of
            ``read_box``.
        write_choices: whether text is generated for multiple-choice questions too.
        judged: tasks of the samples whose answers a judge may score.
        summary: task-specific numbers as Markdown for the report.
        write: ``write(path, items, answers, model)`` writes the answers in the format of the benchmark's own tools.
        identity_key: see :func:`idavlm.evaluation.with_wrong_references`.
        max_references: default of ``--max-references``: photos that introduce an identity; None for all.
        max_new_tokens: default maximum length of an answer.
    """

    name: str
    description: str
    load: Load
    score: Score
    boxes: bool = False
    several_boxes: bool = False
    write_choices: bool = False
    judged: tuple[str, ...] = ()
    summary: Callable[[Sequence[Item], EvaluationResult], str] | None = None
    write: Callable[[Path, Sequence[Item], Sequence[Answer], str], None] | None = None
    identity_key: IdentityKey | None = None
    max_references: int | None = None
    max_new_tokens: int = 64

    def box_reader(self, boxes: Any) -> "ReadBox | ReadBoxes":
        """What :attr:`score` reads boxes with: a method of a :class:`idavlm.models.BoxFormat`, or of a processor."""
        if self.several_boxes:
            return boxes.read_boxes
        return boxes.read if isinstance(boxes, BoxFormat) else boxes.read_box


def score_items(
    items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None, **options
) -> EvaluationResult:
    """Score samples of the six tasks of the schema by :func:`idavlm.evaluation.score_answers`; ``options`` are its."""
    size_of = {item.sample.id: item.image_size for item in items}
    samples = [item.sample for item in items]
    return score_answers(samples, answers, read_box=read_box, image_size=lambda sample: size_of[sample.id](), **options)
