"""Floor 3: questions asked, answers kept, scores with intervals, baselines beside them, and reports."""

from idavlm.evaluation.answers import Answer, AnswerFile, load_answers
from idavlm.evaluation.baselines import with_wrong_references, without_references
from idavlm.evaluation.contact_sheet import Example, draw_contact_sheet
from idavlm.evaluation.examples import identity_maps, make_example, pick_examples
from idavlm.evaluation.generation import generate_answers
from idavlm.evaluation.intervals import Interval, bootstrap_mean
from idavlm.evaluation.metrics import (
    box_iou,
    name_spellings,
    names_in,
    score_box,
    score_description,
    score_picture,
)
from idavlm.evaluation.parsing import parse_letter, parse_picture, parse_yes_no
from idavlm.evaluation.perplexity import text_perplexity
from idavlm.evaluation.plots import plot_bars, plot_curves
from idavlm.evaluation.report import score_table, write_report
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.runner import evaluate
from idavlm.evaluation.scoring import score_answer, score_answers
from idavlm.evaluation.tables import interval_summary, interval_table

__all__ = [
    "Answer",
    "AnswerFile",
    "EvaluationResult",
    "Example",
    "Interval",
    "Prediction",
    "bootstrap_mean",
    "box_iou",
    "draw_contact_sheet",
    "evaluate",
    "generate_answers",
    "identity_maps",
    "interval_summary",
    "interval_table",
    "load_answers",
    "make_example",
    "name_spellings",
    "names_in",
    "parse_letter",
    "parse_picture",
    "parse_yes_no",
    "pick_examples",
    "plot_bars",
    "plot_curves",
    "score_answer",
    "score_answers",
    "score_box",
    "score_description",
    "score_picture",
    "score_table",
    "text_perplexity",
    "with_wrong_references",
    "without_references",
    "write_report",
]
