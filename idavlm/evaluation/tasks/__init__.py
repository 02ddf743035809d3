"""Tasks of ``idavlm eval``. To add a task, add a file and an entry of ``TASKS``."""

from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.grounding import GROUNDING
from idavlm.evaluation.tasks.human_ref import HUMAN_REF
from idavlm.evaluation.tasks.identity_tasks import MMID, RECORDS
from idavlm.evaluation.tasks.mme import MME
from idavlm.evaluation.tasks.mmpb import MMPB
from idavlm.evaluation.tasks.personal import PERSONAL
from idavlm.evaluation.tasks.pvit import PVIT
from idavlm.evaluation.tasks.repic import REPIC
from idavlm.evaluation.tasks.vqa import VQA

TASKS: dict[str, EvaluationTask] = {
    task.name: task for task in (MMID, RECORDS, GROUNDING, MME, VQA, PERSONAL, MMPB, REPIC, PVIT, HUMAN_REF)
}

__all__ = ["TASKS", "EvaluationTask", "Item"]
