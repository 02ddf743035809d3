"""Ablation studies: a program, variants of its options, seeds; runs in folders of their own, and tables of results."""

from idavlm.ablation.report import write_study_report
from idavlm.ablation.run_folder import RunFolder
from idavlm.ablation.study import Run, Study, read_study

__all__ = ["Run", "RunFolder", "Study", "read_study", "write_study_report"]
