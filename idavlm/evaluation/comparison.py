"""Compare two evaluation runs on the same items: paired bootstrap, wins and losses, an HTML page of the differences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import jinja2
import numpy as np

from idavlm.data.errors import DataError, quote
from idavlm.data.images import ImageStore
from idavlm.data.page_images import small_jpeg
from idavlm.data.schema import Sample
from idavlm.evaluation.answers import question_text
from idavlm.evaluation.bootstrap import RESAMPLES, Interval, bootstrap_mean, resampled_means
from idavlm.evaluation.fingerprints import changed_parts
from idavlm.evaluation.results import EvaluationResult, Prediction, main_metric, metrics_of
from idavlm.utils import check_positive, markdown_table, write_text

Pair = tuple[Prediction, Prediction]

GOLD, A, B = "#1a9850", "#c0392b", "#2c6fbb"
_SIDE = 240  # longest side of an image on the page in pixels

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ a }} / {{ b }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; color: #22242a; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0 2rem; } th, td { padding: .25rem .7rem; text-align: right; }
td { white-space: nowrap; }
th:is(:nth-child(4), :nth-child(5), :nth-child(8)) { min-width: 6rem; overflow-wrap: anywhere; }
th { border-bottom: 2px solid #22242a; font-weight: 600; } td { border-bottom: 1px solid #e3e5ea; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
article { border-top: 1px solid #cfd2d9; padding: 1rem 0; } .images { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; } figcaption { font-size: 12px; color: #666b76; } img { display: block; border-radius: 3px; }
.gold { color: #1a9850; } .a { color: #c0392b; } .b { color: #2c6fbb; } p { margin: .35rem 0; }
.id { color: #666b76; font-size: 13px; } .score { font-variant-numeric: tabular-nums; font-weight: 600; }
</style>
<h1><span class=a>{{ a }}</span> against <span class=b>{{ b }}</span></h1>
<table><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>{{ differ }} of {{ total }} items differ: {{ b }} is better on {{ wins }}, worse on {{ differ - wins }}.
{{ items | length }} of them are shown. Boxes: <span class=gold>right</span>, <span class=a>{{ a }}</span>,
<span class=b>{{ b }}</span>.</p>
{% for item in items %}<article><p class=id>{{ item.id }} ({{ item.task }})</p>
<div class=images>{% for figure in item.figures %}<figure>{% if figure.image %}<img alt=""
src="data:image/jpeg;base64,{{ figure.image }}">{% endif %}<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}</div><p><b>{{ item.question }}</b></p><p class=gold>{{ item.gold }}</p>
{% for run, name, score, text in item.answers %}<p><span class={{ run }}>{{ name }}</span>
<span class=score>{{ "%.2f" % score }}</span> {{ text }}</p>
{% endfor %}</article>
{% endfor %}</html>
"""


@dataclass(frozen=True)
class Comparison:
    """Comparison of runs A and B by one metric of one task.

    Attributes:
        task, metric: what is compared.
        a, b: means over the common items.
        difference: B minus A, with the 95 % interval of a paired bootstrap.
        p_value: two-sided p-value of the paired bootstrap.
        wins: number of items where B scores higher.
        losses: number of items where A scores higher.
        ties: number of items with equal scores.
    """

    task: str
    metric: str
    a: float
    b: float
    difference: Interval
    p_value: float
    wins: int
    losses: int
    ties: int


def pair_predictions(a: EvaluationResult, b: EvaluationResult) -> list[Pair]:
    """Pairs of predictions for the items that both runs have, in the order of ``a``.

    Raises:
        ValueError: the runs have no common item, an id occurs twice in one run, or it belongs to different items: other
            questions, choices, references, images or right answers.
    """
    for name, result in (("a", a), ("b", b)):
        ids = Counter(prediction.id for prediction in result.predictions)
        repeated = next((found for found, count in ids.items() if count > 1), None)
        if repeated is not None:
            raise ValueError(f"{name} has {ids[repeated]} predictions of item {quote(repeated)}; keep one.")
    by_id = {prediction.id: prediction for prediction in b.predictions}
    pairs = [(first, by_id[first.id]) for first in a.predictions if first.id in by_id]
    if not pairs:
        raise ValueError("a and b have no item in common; compare runs on the same data.")
    for first, second in pairs:
        changed = [
            name for name in ("task", "answer", "gold_box") if getattr(first, name) != getattr(second, name)
        ] + changed_parts(first.item, second.item)
        if changed:
            raise ValueError(
                f"item {quote(first.id)} differs between a and b ({', '.join(changed)}); compare runs on the same data."
            )
    return pairs


def compare_scores(pairs: Sequence[Pair]) -> list[Comparison]:
    """Compare every common metric of each task; with several tasks, the last row compares all main scores."""
    tasks: dict[str, list[Pair]] = {}
    for pair in pairs:
        tasks.setdefault(pair[0].task, []).append(pair)
    rows = []
    for task, found in tasks.items():
        for metric in metrics_of([first.scores for first, _ in found]):
            scores = [
                (a.scores[metric], b.scores[metric]) for a, b in found if metric in a.scores and metric in b.scores
            ]
            if scores:
                rows.append(compare_values(task, metric, scores))
    if len(tasks) > 1:
        main = [scores for pair in pairs if (scores := main_scores(pair)) is not None]
        rows += [compare_values("all", "main scores", main)] if main else []
    return rows


def main_scores(pair: Pair) -> tuple[float, float] | None:
    """Main scores of both predictions, by a metric that both have; None without one."""
    a, b = pair
    metric = main_metric(a.task, [metric for metric in a.scores if metric in b.scores])
    return None if metric is None else (a.scores[metric], b.scores[metric])


def comparison_table(rows: Sequence[Comparison], a: str, b: str) -> str:
    """Markdown table of means, difference with interval, p-value, wins, losses and ties of ``b``."""
    return markdown_table(_header(a, b), [_cells(row) for row in rows])


def write_comparison_page(
    path: str | Path,
    pairs: Sequence[Pair],
    comparisons: Sequence[Comparison],
    *,
    names: tuple[str, str],
    samples: Mapping[str, Sample],
    max_items: int = 60,
) -> int:
    """Write a self-contained HTML page of the items whose main scores differ most, wins and losses of B alternating.

    Args:
        path: the ``.html`` file.
        pairs: from :func:`pair_predictions`.
        comparisons: from :func:`compare_scores`.
        names: names of A and B.
        samples: id -> evaluated sample. Items without a sample or image files are shown without images.
        max_items: maximum number of items on the page.

    Returns:
        Number of items whose main scores differ.
    """
    check_positive(max_items=max_items)
    differ = [(pair, scores) for pair in pairs if (scores := main_scores(pair)) is not None and scores[0] != scores[1]]
    wins = sorted((item for item in differ if item[1][1] > item[1][0]), key=lambda item: item[1][0] - item[1][1])
    losses = sorted((item for item in differ if item[1][1] < item[1][0]), key=lambda item: item[1][1] - item[1][0])
    alternating = [item for turn in zip_longest(wins, losses) for item in turn if item is not None]
    page = jinja2.Template(_PAGE, autoescape=True).render(
        a=names[0],
        b=names[1],
        header=_header(*names),
        rows=[_cells(row) for row in comparisons],
        differ=len(differ),
        total=len(pairs),
        wins=len(wins),
        items=[_item(pair, scores, names, samples.get(pair[0].id)) for pair, scores in alternating[:max_items]],
    )
    write_text(path, page)
    return len(differ)


def _item(pair: Pair, scores: tuple[float, float], names: tuple[str, str], sample: Sample | None) -> dict:
    """Values of one article of the page."""
    return {
        "id": pair[0].id,
        "task": pair[0].task,
        "question": question_text(sample) if sample is not None else "",
        "gold": pair[0].answer or ("the green box" if pair[0].gold_box else ""),
        "answers": zip("ab", names, scores, (prediction.text for prediction in pair), strict=True),
        "figures": [] if sample is None or sample.image_root is None else _figures(pair, sample),
    }


def _figures(pair: Pair, sample: Sample) -> list[dict[str, str]]:
    """Captions and JPEG images (base 64) of references and scenes; the last image shows the boxes."""
    images = [(identity.name, image) for identity in sample.identities for image in identity.images]
    several = len(sample.message_images) > 1
    images += [(str(number) if several else "", path) for number, path in enumerate(sample.message_images, 1)]
    figures = []
    for number, (caption, path) in enumerate(images, 1):
        try:
            image = ImageStore(sample.image_root).open(path)
        except DataError:
            figures.append({"image": "", "caption": f"{path} is missing"})
            continue
        boxes = [(pair[0].gold_box, GOLD), (pair[0].box, A), (pair[1].box, B)] if number == len(images) else []
        small = small_jpeg(image, _SIDE, [(box, colour) for box, colour in boxes if box is not None])
        figures.append({"image": small, "caption": caption})
    return figures


def _header(a: str, b: str) -> list[str]:
    return ["task", "metric", "n", a, b, "difference", "p", f"{b} wins", "loses", "ties"]


def _cells(row: Comparison) -> list[str]:
    difference = f"{row.difference.mean:+.3f} [{row.difference.low:+.3f}, {row.difference.high:+.3f}]"
    p_value = f"{row.p_value:.3f}" if row.p_value >= 0.001 else "< 0.001"
    counts = [str(row.wins), str(row.losses), str(row.ties)]
    return [row.task, row.metric, str(row.difference.n), f"{row.a:.3f}", f"{row.b:.3f}", difference, p_value, *counts]


def compare_values(task: str, metric: str, scores: Sequence[tuple[float, float]]) -> Comparison:
    """Compare pairs of scores (A, B) of the same items."""
    a, b = np.asarray(scores, np.float64).T
    differences = b - a
    means = resampled_means(differences)
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return Comparison(
        task=task,
        metric=metric,
        a=float(a.mean()),
        b=float(b.mean()),
        difference=bootstrap_mean(differences),
        p_value=float(min(1.0, max(2 * tail, 1 / RESAMPLES))),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        ties=int((differences == 0).sum()),
    )
