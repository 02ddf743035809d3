"""The tasks of ``idavlm eval``; a new one is one more file and one more line."""

from idavlm.evaluation.tasks.grounding import GROUNDING
from idavlm.evaluation.tasks.mme import MME
from idavlm.evaluation.tasks.mmid import MMID
from idavlm.evaluation.tasks.personal import PERSONAL
from idavlm.evaluation.tasks.records import RECORDS
from idavlm.evaluation.tasks.task import EvaluationTask, Item
from idavlm.evaluation.tasks.vqa import VQA

TASKS: dict[str, EvaluationTask] = {task.name: task for task in (MMID, RECORDS, GROUNDING, MME, VQA, PERSONAL)}

__all__ = ["TASKS", "EvaluationTask", "Item"]
