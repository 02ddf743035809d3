"""Evaluation: generate answers, score them with confidence intervals, compute baselines, write reports."""

from idavlm.evaluation.answers import Answer, AnswerFile, load_answers
from idavlm.evaluation.baselines import check_wrong_references, with_wrong_references, without_references
from idavlm.evaluation.bootstrap import Interval, bootstrap_mean
from idavlm.evaluation.checkpoint import load_checkpoint
from idavlm.evaluation.contact_sheet import Example, draw_contact_sheet, identity_maps, make_example, pick_examples
from idavlm.evaluation.evaluator import evaluate
from idavlm.evaluation.generation import generate_answers, generate_texts
from idavlm.evaluation.identity_map_scores import score_identity_maps
from idavlm.evaluation.metrics_file import RunMetrics, read_metrics, write_metrics
from idavlm.evaluation.perplexity import text_perplexity
from idavlm.evaluation.plots import plot_bars, plot_curves
from idavlm.evaluation.report import interval_summary, interval_table, score_table, write_report
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import (
    box_iou,
    name_spellings,
    names_in,
    score_answer,
    score_answers,
    score_box,
    score_description,
    score_matching,
)
from idavlm.evaluation.task_evaluation import TaskEvaluation
from idavlm.utils.answer_parsing import is_refusal, parse_image_number, parse_letter, parse_yes_no

__all__ = [
    "Answer",
    "AnswerFile",
    "EvaluationResult",
    "Example",
    "Interval",
    "Prediction",
    "RunMetrics",
    "TaskEvaluation",
    "bootstrap_mean",
    "box_iou",
    "check_wrong_references",
    "draw_contact_sheet",
    "evaluate",
    "generate_answers",
    "generate_texts",
    "identity_maps",
    "interval_summary",
    "interval_table",
    "is_refusal",
    "load_answers",
    "load_checkpoint",
    "make_example",
    "name_spellings",
    "names_in",
    "parse_image_number",
    "parse_letter",
    "parse_yes_no",
    "pick_examples",
    "plot_bars",
    "plot_curves",
    "read_metrics",
    "score_answer",
    "score_answers",
    "score_box",
    "score_description",
    "score_identity_maps",
    "score_matching",
    "score_table",
    "text_perplexity",
    "with_wrong_references",
    "without_references",
    "write_metrics",
    "write_report",
]
