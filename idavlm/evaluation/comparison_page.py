"""One HTML file of the items where two runs differ: pictures with boxes, question, right answer, both answers."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from idavlm.data.errors import DataError
from idavlm.data.images import ImageStore
from idavlm.data.schema import Sample
from idavlm.evaluation.answers import question_text
from idavlm.evaluation.comparing import Comparison, Pair, comparison_cells, main_scores

GOLD, A, B = "#1a9850", "#c0392b", "#2c6fbb"
_SIDE = 240  # longest side of a picture on the page

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #22242a; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0 2rem; } th, td { padding: .25rem .7rem; text-align: right; }
th { border-bottom: 2px solid #22242a; font-weight: 600; } td { border-bottom: 1px solid #e3e5ea; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
article { border-top: 1px solid #cfd2d9; padding: 1rem 0; } .pictures { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; } figcaption { font-size: 12px; color: #666b76; } img { display: block; border-radius: 3px; }
.gold { color: #1a9850; } .a { color: #c0392b; } .b { color: #2c6fbb; } p { margin: .35rem 0; }
.id { color: #666b76; font-size: 13px; } .score { font-variant-numeric: tabular-nums; font-weight: 600; }
"""


def write_comparison_page(
    path: str | Path,
    pairs: Sequence[Pair],
    comparisons: Sequence[Comparison],
    *,
    names: tuple[str, str],
    samples: Mapping[str, Sample],
    most: int = 60,
) -> int:
    """Write the page; it needs no other file.

    Shown are the items whose main scores differ most, wins and losses of B in turn.

    Args:
        path: the ``.html`` file.
        pairs: predictions of both.
        comparisons: of :func:`compare_scores`.
        names: what A and B are called.
        samples: what was asked, by id; items without, or whose pictures are not there, are shown without pictures.
        most: how many items.

    Returns:
        How many items differ.
    """
    scored = [(pair, scores) for pair in pairs if (scores := main_scores(pair)) is not None]
    differ = [(pair, scores) for pair, scores in scored if scores[0] != scores[1]]
    wins = sorted((one for one in differ if one[1][1] > one[1][0]), key=lambda one: one[1][0] - one[1][1])
    losses = sorted((one for one in differ if one[1][1] < one[1][0]), key=lambda one: one[1][1] - one[1][0])
    shown = _in_turn(wins, losses)[:most]
    a, b = map(html.escape, names)
    articles = "\n".join(_article(pair, scores, (a, b), samples.get(pair[0].id)) for pair, scores in shown)
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{a} / {b}</title><style>{_STYLE}</style>\n'
        f"<h1><span class=a>{a}</span> against <span class=b>{b}</span></h1>\n{_table(comparisons, names)}\n"
        f"<p>{len(differ)} of {len(pairs)} items differ: {b} is better on {len(wins)}, worse on {len(losses)}. "
        f"{len(shown)} of them follow. Boxes: <span class=gold>right</span>, <span class=a>{a}</span>, "
        f"<span class=b>{b}</span>.</p>\n{articles}\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return len(differ)


def _article(pair: Pair, scores: tuple[float, float], names: tuple[str, str], sample: Sample | None) -> str:
    one = pair[0]
    question = html.escape(question_text(sample)) if sample is not None else ""
    gold = html.escape(one.answer) or ("the green box" if one.gold_box else "")
    answers = "".join(
        f"<p><span class={mark}>{name}</span> <span class=score>{score:.2f}</span> {html.escape(prediction.text)}</p>"
        for mark, name, score, prediction in zip("ab", names, scores, pair, strict=True)
    )
    return (
        f"<article><p class=id>{html.escape(one.id)} ({html.escape(one.task)})</p>{_pictures(pair, sample)}"
        f"<p><b>{question}</b></p><p class=gold>{gold}</p>{answers}</article>"
    )


def _pictures(pair: Pair, sample: Sample | None) -> str:
    if sample is None or sample.image_root is None:
        return ""
    store, figures = ImageStore(sample.image_root), []
    shown = [(person.name, image) for person in sample.identities for image in person.images]
    several = len(sample.message_images) > 1
    shown += [(str(place) if several else "", image) for place, image in enumerate(sample.message_images, 1)]
    for number, (caption, path) in enumerate(shown, 1):
        try:
            picture = store.open(path)
        except DataError:
            figures.append(f"<figure><figcaption>{html.escape(path)} is not there</figcaption></figure>")
            continue
        boxes = []
        if number == len(shown):
            found = [(pair[0].gold_box, GOLD), (pair[0].box, A), (pair[1].box, B)]
            boxes = [(box, colour) for box, colour in found if box is not None]
        figures.append(f"<figure>{_image(picture, boxes)}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f"<div class=pictures>{''.join(figures)}</div>"


def _image(picture: Image.Image, boxes: Sequence[tuple[Sequence[float], str]]) -> str:
    scale = min(1.0, _SIDE / max(picture.size))
    small = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(small)
    for box, colour in boxes:
        draw.rectangle([edge * scale for edge in box], outline=colour, width=3)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" width={small.width} height={small.height} src="data:image/jpeg;base64,{data}">'


def _table(rows: Sequence[Comparison], names: tuple[str, str]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    header, cells = comparison_cells(rows, *names)
    return f"<table>{line('th', header)}{''.join(line('td', row) for row in cells)}</table>"


def _in_turn(first: list, second: list) -> list:
    """One of each, then the rest of the longer."""
    turns = [one for pair in zip(first, second, strict=False) for one in pair]
    return turns + first[len(second) :] + second[len(first) :]
