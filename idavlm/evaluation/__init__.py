"""Floor 3: scores of the six tasks on identities never trained on, baselines beside them, and the report."""

from idavlm.evaluation.baselines import with_wrong_references, without_references
from idavlm.evaluation.contact_sheet import Example, draw_contact_sheet
from idavlm.evaluation.examples import identity_maps, make_example, pick_examples
from idavlm.evaluation.metrics import box_iou, names_in, parse_picture, score_box, score_description, score_picture
from idavlm.evaluation.perplexity import text_perplexity
from idavlm.evaluation.plots import plot_bars, plot_curves
from idavlm.evaluation.report import score_table, write_report
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.runner import evaluate
from idavlm.evaluation.scoring import score_answer

__all__ = [
    "EvaluationResult",
    "Example",
    "Prediction",
    "box_iou",
    "draw_contact_sheet",
    "evaluate",
    "identity_maps",
    "make_example",
    "names_in",
    "parse_picture",
    "pick_examples",
    "plot_bars",
    "plot_curves",
    "score_answer",
    "score_box",
    "score_description",
    "score_picture",
    "score_table",
    "text_perplexity",
    "with_wrong_references",
    "without_references",
    "write_report",
]
