"""Tasks of ``idavlm eval``. To add a task, add a file and an entry of ``TASKS``."""

from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.grounding import GROUNDING
from idavlm.evaluation.tasks.human_ref import HUMAN_REF
from idavlm.evaluation.tasks.identity_tasks import MMID, RECORDS
from idavlm.evaluation.tasks.mc_llava import MC_LLAVA
from idavlm.evaluation.tasks.mme import MME
from idavlm.evaluation.tasks.mmpb import MMPB
from idavlm.evaluation.tasks.myvlm import MYVLM
from idavlm.evaluation.tasks.personal import PERSONAL
from idavlm.evaluation.tasks.pvit import PVIT
from idavlm.evaluation.tasks.rap import RAP
from idavlm.evaluation.tasks.repic import REPIC
from idavlm.evaluation.tasks.vqa import VQA
from idavlm.evaluation.tasks.yollava import YOLLAVA

TASKS: dict[str, EvaluationTask] = {
    task.name: task
    for task in (
        *(MMID, RECORDS, GROUNDING, MME, VQA, PERSONAL),
        *(YOLLAVA, MYVLM, RAP, MC_LLAVA),
        *(MMPB, REPIC, PVIT, HUMAN_REF),
    )
}  # fmt: skip

__all__ = ["TASKS", "EvaluationTask", "Item"]
