"""Scores of answers that ignore the images: what a benchmark gives for nothing."""

from collections.abc import Callable, Mapping, Sequence

from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.tasks.base import Item
from idavlm.utils import markdown_table

ConstantAnswer = Callable[[Item], "str | None"]
"""Returns the answer to an item without looking at its images; None for an item that it does not answer."""


def constant_answer_table(
    items: Sequence[Item],
    score: Callable[[Sequence[Item], Sequence[Answer]], EvaluationResult],
    constants: Mapping[str, str | ConstantAnswer],
) -> str:
    """Markdown table of the scores of constant answers: one row per task and constant.

    An accuracy means little without it: in the text questions of RAP, "A" is right in 390 of 400. ``weighted`` is the
    mean of ``positive`` and ``negative``, where both are known.

    Args:
        items: the evaluated items.
        score: scores one answer per item.
        constants: name of the answer in the table -> the answer to every item, or a function that returns it.
    """
    rows = []
    for task in dict.fromkeys(item.sample.task for item in items):
        of_task = [item for item in items if item.sample.task == task]
        for name, constant in constants.items():
            texts = [constant if isinstance(constant, str) else constant(item) for item in of_task]
            answered = [(item, text) for item, text in zip(of_task, texts, strict=True) if text is not None]
            if not answered:
                continue
            answers = [Answer(item.sample.id, text) for item, text in answered]
            for kind, summary in score([item for item, _ in answered], answers).summary.items():
                metrics = summary["metrics"]
                if {"positive", "negative"} <= metrics.keys():
                    metrics["weighted"] = (metrics["positive"] + metrics["negative"]) / 2
                rows.append([kind, name, ", ".join(f"{metric} {value:.3f}" for metric, value in metrics.items())])
    return "## Constant answers\n\n" + markdown_table(["task", "answer", "scores"], rows) if rows else ""
