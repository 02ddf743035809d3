"""The tasks of ``idavlm eval``; a new one is one more file and one more line."""

from idavlm.evaluation.tasks.mmid import MMID
from idavlm.evaluation.tasks.records import RECORDS
from idavlm.evaluation.tasks.task import EvaluationTask, Item

TASKS: dict[str, EvaluationTask] = {task.name: task for task in (MMID, RECORDS)}

__all__ = ["TASKS", "EvaluationTask", "Item"]
