"""Evaluation of the live model during training: scores by task, and answers with images for the tracker."""

from collections.abc import Sequence
from itertools import zip_longest

from PIL import Image
from torch import nn

from idavlm.data.schema import Sample
from idavlm.evaluation.answer_image import draw_answer
from idavlm.evaluation.answers import question_text
from idavlm.evaluation.evaluator import evaluate
from idavlm.evaluation.results import EvaluationResult


class TaskEvaluation:
    """The ``task_evaluation`` of :class:`idavlm.IDTrainer`: the model answers evaluation samples.

    Attributes:
        result: result of the last evaluation; None before the first one.

    Args:
        processor: as in :func:`evaluate`.
        samples: evaluation samples.
        batch_size: samples per batch.
        max_new_tokens: maximum length of an answer.
    """

    def __init__(self, processor, samples: Sequence[Sample], *, batch_size: int = 16, max_new_tokens: int = 64):
        self.processor = processor
        self.samples = list(samples)
        self.options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        self.result: EvaluationResult | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The main score of each task."""
        self.result = evaluate(model, self.processor, self.samples, **self.options)
        return self.result.main_scores

    def draw_answers(self, count: int) -> list[tuple[str, Image.Image, str]]:
        """Task, image and text of the first answers of every task in turn, ``count`` in all."""
        if self.result is None:
            return []
        by_task: dict[str, list] = {}
        for sample, prediction in zip(self.samples, self.result.predictions, strict=True):
            by_task.setdefault(prediction.task, []).append((sample, prediction))
        in_turn = [pair for group in zip_longest(*by_task.values()) for pair in group if pair is not None]
        return [
            (
                prediction.task,
                draw_answer(sample, prediction),
                f"{question_text(sample)}\n\nanswer: {prediction.text}\n\nright: {prediction.answer}",
            )
            for sample, prediction in in_turn[:count]
        ]
