"""An HTML page of records to look at: references, scenes with boxes, and turns."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from idavlm.data.errors import DataError
from idavlm.data.images import ImageStore
from idavlm.data.page_images import small_jpeg
from idavlm.data.schema import Box, Sample
from idavlm.utils import write_text
from idavlm.utils.answer_text import name_matches
from idavlm.utils.figures import COLOURS

_REFERENCE, _SCENE = 120, 420  # longest sides in pixels
_OTHER = "#8a8f99"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; color: #22242a; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
article { border-top: 1px solid #cfd2d9; padding: 1rem 0 1.3rem; }
.images { display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-end; margin: .5rem 0; }
figure { margin: 0; } figcaption { font-size: 12px; color: #666b76; overflow-wrap: anywhere; max-width: 420px; }
img { display: block; border-radius: 3px; } .reference img { border: 3px solid var(--colour); box-sizing: border-box; }
.missing { border: 1px dashed #c0392b; color: #c0392b; padding: .6rem; font-size: 12px; max-width: 200px; }
.turn { display: grid; grid-template-columns: 5.2rem 1fr; gap: .3rem .8rem; margin: .25rem 0; }
.turn > :first-child { color: #666b76; font-size: 13px; text-align: right; padding-top: .1rem; }
.turn p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.name { color: var(--colour); font-weight: 600; }
.image, .box { font-size: 12.5px; background: #eef0f4; border-radius: 3px; padding: .05rem .35rem; }
.box { border-left: 4px solid var(--colour); } .id { color: #666b76; font-size: 13px; margin: 0; }
.error { color: #c0392b; margin: .2rem 0; } .warning { color: #a8650c; margin: .2rem 0; }
details { font-size: 13px; color: #666b76; } pre { white-space: pre-wrap; margin: .3rem 0; }
</style>
<h1>{{ title }}</h1>
<p>{{ records | length }} of {{ total }} records. A colour stands for a name; boxes of other names are grey.</p>
{% for record in records %}<article><p class=id>{{ record.where }} &middot; id {{ record.id }}
&middot; {{ record.kind }}</p>
{% for level, text in record.problems %}<p class={{ level }}>{{ text }}</p>
{% endfor %}{% for row in record.rows %}<div class=images>{% for figure in row %}
<figure class={{ figure.kind }} style="--colour: {{ figure.colour }}">{% if figure.image %}<img alt=""
src="data:image/jpeg;base64,{{ figure.image }}">{% else %}<div class=missing>{{ figure.problem }}</div>{% endif %}
<figcaption>{{ figure.caption }}</figcaption></figure>{% endfor %}</div>
{% endfor %}{% for role, pieces in record.turns %}<div class=turn><span>{{ role }}</span><p>
{%- for kind, text, colour in pieces %}{% if kind == "text" %}{{ text }}{% else -%}
<span class={{ kind }} style="--colour: {{ colour }}">{{ text }}</span>{% endif %}{% endfor %}</p></div>
{% endfor %}{% if record.meta %}<details><summary>meta</summary><pre>{{ record.meta }}</pre></details>{% endif %}
</article>
{% endfor %}</html>
"""


def write_record_page(
    path: str | Path,
    samples: Iterable[Sample],
    *,
    title: str,
    total: int,
    problems: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> int:
    """Write a self-contained HTML page of records.

    Args:
        path: the ``.html`` file.
        samples: the records that are shown.
        title: title of the page.
        total: number of records that they were chosen from.
        problems: file and line of a record (``Sample.where``) -> level and message of its problems.

    Returns:
        Number of records on the page.
    """
    import jinja2  # torch installs it

    records = [_values(sample, (problems or {}).get(sample.where, ())) for sample in samples]
    page = jinja2.Template(_PAGE, autoescape=True).render(title=title, records=records, total=total)
    write_text(path, page)
    return len(records)


def _values(sample: Sample, problems: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Values of one article of the page."""
    names = [identity.name for identity in sample.identities]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    numbers = {image: number for number, image in enumerate(dict.fromkeys(sample.message_images), 1)}
    store = None if sample.image_root is None else ImageStore(sample.image_root)
    references = [
        _figure(store, image, "reference", identity.name, colours[identity.name], _REFERENCE)
        for identity in sample.identities
        for image in identity.images
    ]
    scenes = [
        _figure(store, image, "scene", f"image {number}: {image}", _OTHER, _SCENE, sample.all_boxes, colours)
        for image, number in numbers.items()
    ]
    turns = [(message.role, _pieces(message.content, sample, colours, numbers)) for message in sample.messages]
    if sample.is_evaluation:
        turns.append(("right answer", _named(sample.answer, colours)))
        turns += [("false answer", _named(text, colours)) for text in sample.false_answers]
        if sample.target is not None:
            turns.append(("target", _named(sample.target, colours)))
    kind = [sample.source, sample.task or "", "evaluation" if sample.is_evaluation else "training"]
    return {
        "where": sample.where,
        "id": sample.id,
        "kind": ", ".join(filter(None, kind)),
        "problems": problems,
        "rows": [row for row in (references, scenes) if row],
        "turns": turns,
        "meta": "" if sample.meta is None else json.dumps(sample.meta, ensure_ascii=False, indent=1),
    }


def _figure(
    store: ImageStore | None,
    path: str,
    kind: str,
    caption: str,
    colour: str,
    side: int,
    boxes: Sequence[Box] = (),
    colours: Mapping[str, str] | None = None,
) -> dict[str, str]:
    figure = {"kind": kind, "caption": caption, "colour": colour, "image": "", "problem": ""}
    if store is None:
        return figure | {"problem": f"{path}: no image root"}
    try:
        image = store.open(path)
    except DataError as error:
        return figure | {"problem": str(error)}
    drawn = []
    for box in boxes:
        if box.image == path:
            edges = [edge * length for edge, length in zip(box.box, image.size * 2, strict=True)]
            drawn.append((edges if box.relative else box.box, (colours or {}).get(box.name, _OTHER)))
    return figure | {"image": small_jpeg(image, side, drawn)}


def _pieces(
    content: Sequence[Any], sample: Sample, colours: Mapping[str, str], numbers: Mapping[str, int]
) -> list[tuple[str, str, str]]:
    """Kind, text and colour of the pieces of a turn."""
    pieces = []
    for part in content:
        if part.type == "text":
            pieces += _named(part.text, colours)
        elif part.type == "image":
            pieces.append(("image", f"image {numbers[part.image]}", _OTHER))
        else:
            box = sample.box_of_part(part)
            edges = ", ".join(f"{edge:.5g}" for edge in box.box)
            pieces.append(("box", f"{box.name} [{edges}]".strip(), colours.get(box.name, _OTHER)))
    return pieces


def _named(text: str, colours: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """A text, in which the names of identities have their colours."""
    pieces, rest = [], text
    for name in name_matches(text, colours, ignore_case=False):
        before, found, rest_after = rest.partition(name)
        if not found:  # another Unicode form of the name
            continue
        pieces += [("text", before, "")] if before else []
        pieces.append(("name", name, colours[name]))
        rest = rest_after
    return [*pieces, ("text", rest, "")] if rest else pieces
