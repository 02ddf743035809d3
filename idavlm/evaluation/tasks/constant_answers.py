"""Scores of answers that ignore the images: what a benchmark gives for nothing."""

from collections.abc import Callable, Mapping, Sequence

from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, metrics_of
from idavlm.evaluation.tasks.base import Item
from idavlm.utils import markdown_table

ConstantAnswer = Callable[[Item], str]
"""Returns the answer to an item without looking at its images."""


def constant_answer_table(
    items: Sequence[Item],
    score: Callable[[Sequence[Item], Sequence[Answer]], EvaluationResult],
    constants: Mapping[str, str | ConstantAnswer],
) -> str:
    """Markdown table of the scores of constant answers: one row per metric of a task, one column per constant.

    Args:
        items: the evaluated items.
        score: scores one answer per item.
        constants: title of the column -> the answer to every item, or a function that returns it.
    """
    columns = {}
    for title, constant in constants.items():
        texts = [constant if isinstance(constant, str) else constant(item) for item in items]
        answers = [Answer(item.sample.id, text) for item, text in zip(items, texts, strict=True)]
        columns[title] = score(items, answers).summary
    rows = []
    for task in next(iter(columns.values())):
        found = [summary[task]["metrics"] for summary in columns.values()]
        for metric in metrics_of(found):
            cells = [f"{metrics[metric]:.3f}" if metric in metrics else "-" for metrics in found]
            rows.append([task, metric, *cells])
    return "## Constant answers\n\n" + markdown_table(["task", "metric", *columns], rows)
