"""The report of a study: tables, figures, and pages with the records where variants differ."""

from pathlib import Path

import jinja2

from idavlm.ablation.figures import plot_study
from idavlm.ablation.run_folder import RunFolder
from idavlm.ablation.study import Study, folder_name, short
from idavlm.ablation.summary import Summary, VariantSummary, summarize_study
from idavlm.ablation.tables import (
    EXPLAIN_DIFFERENCES,
    EXPLAIN_SCORES,
    csv_text,
    difference_rows,
    latex_tables,
    markdown_tables,
    score_rows,
    scores_csv,
)
from idavlm.data import RecordDataset
from idavlm.data.schema import Sample
from idavlm.evaluation.comparison import compare_scores, pair_predictions, write_comparison_page
from idavlm.utils import write_text

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ name }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; color: #22242a; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0 2rem; } th, td { padding: .25rem .7rem; text-align: right; }
td { white-space: nowrap; }
th { border-bottom: 2px solid #22242a; font-weight: 600; } td { border-bottom: 1px solid #e3e5ea; }
th:first-child, td:first-child { text-align: left; } td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; } pre { background: #f4f5f7; padding: .6rem; overflow-x: auto; font-size: 12px; }
.fact { color: #666b76; font-size: 13px; } .wide { overflow-x: auto; }
</style>
<h1>{{ name }}</h1>
<p>{{ description }}</p>
<p class=fact>
{% for name, value, is_code in facts %}{{ name }}:
{% if is_code %}<code>{{ value }}</code>{% else %}{{ value }}{% endif %}<br>
{% endfor %}</p>
{% for heading, explanation, header, rows in tables %}<h2>{{ heading }}</h2><p class=fact>{{ explanation }}</p>
<div class=wide><table><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
{% if figure %}<img alt="Scores of the variants" src="{{ figure }}">{% endif %}
{% if pages %}<h2>Records where variants differ from {{ baseline }}</h2><ul>
{% for text, link in pages %}<li><a href="{{ link }}">{{ text }}</a></li>
{% endfor %}</ul>{% endif %}
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}
{% if failures %}<h2>Failed runs</h2>{% for name, text in failures %}<p>{{ name }}</p><pre>{{ text }}</pre>
{% endfor %}{% endif %}</html>
"""


def write_study_report(study: Study, *, command: str, max_items: int = 40) -> Summary:
    """Write the report into the folder of a study, from the runs that have finished so far.

    ``report.md`` and ``report.html`` hold the tables, the figure and the failed runs; ``scores.csv`` one line per
    variant and metric; ``scores.tex`` the tables for LaTeX with booktabs; ``runs.csv`` one line per run; ``scores.png``
    the figure. ``differences/`` holds a page per variant with the images of the records where it differs from the
    baseline, if the runs stored their answers and the records are still there.

    Args:
        study: the study.
        command: the command that repeats the study.
        max_items: maximum number of records on a page.

    Raises:
        ValueError: a finished run had other settings, or a metric of the study does not exist.
        RuntimeError: the figure could not be drawn, for example without matplotlib. All other files are written.
    """
    summary = summarize_study(study)
    folder = study.folder
    write_text(folder / "scores.csv", scores_csv(summary))
    write_text(folder / "scores.tex", latex_tables(summary))
    write_text(folder / "runs.csv", _runs_csv(summary))
    pages = _write_pages(summary, folder / "differences", max_items)
    error = None
    figure = folder / "scores.png"
    figure.unlink(missing_ok=True)
    try:
        plot_study(figure, summary)
    except ImportError as missing:
        error = missing
    _write_reports(summary, command, pages, figure.name if figure.exists() else None)
    if error is not None:
        raise RuntimeError(f"{folder / 'report.md'} is written, but without its figure: {error}") from error
    return summary


def _write_reports(summary: Summary, command: str, pages: list[tuple[str, str]], figure: str | None) -> None:
    study = summary.study
    facts = _facts(summary, command)
    parts = [
        f"# {study.name}",
        study.description,
        "  \n".join(_in_markdown(facts)),
        "## Scores",
        *markdown_tables(summary),
    ]
    parts += [f"![Scores of the variants]({figure})"] if figure else []
    if pages:
        parts += [f"## Records where variants differ from {summary.baseline.name}"]
        parts += ["\n".join(f"- [{text}](<{link}>)" for text, link in pages)]
    parts += ["## Notes", "\n".join(f"- {note}" for note in summary.notes)] if summary.notes else []
    if summary.failures:
        parts.append("## Failed runs")
        parts += [f"{name}\n\n```text\n{text}\n```" for name, text in summary.failures.items()]
    write_text(study.folder / "report.md", "\n\n".join(part.strip() for part in parts if part.strip()) + "\n")
    header, rows = difference_rows(summary)
    tables = [("Scores", EXPLAIN_SCORES, *score_rows(summary))]
    if rows:
        tables.append((f"Difference from {summary.baseline.name}", EXPLAIN_DIFFERENCES, header, rows))
    page = jinja2.Template(_PAGE, autoescape=True).render(
        name=study.name,
        description=study.description,
        facts=facts,
        tables=tables,
        figure=figure,
        pages=pages,
        baseline=summary.baseline.name,
        notes=summary.notes,
        failures=list(summary.failures.items()),
    )
    write_text(study.folder / "report.html", page)


def _in_markdown(facts: list[tuple[str, str, bool]]) -> list[str]:
    return [f"{name}: `{value}`" if is_code else f"{name}: {value}" for name, value, is_code in facts]


def _facts(summary: Summary, command: str) -> list[tuple[str, str, bool]]:
    """Name, value, and whether the value is code."""
    counts = ", ".join(f"{len(names)} {state}" for state, names in summary.states.items())
    facts = [("command", command, True), ("program", summary.study.program, True), ("runs", counts, False)]
    machines = dict.fromkeys(record["machine"] for record in summary.environments if record.get("machine"))
    facts += [("machine", machine, False) for machine in machines]
    revisions = {}
    for record in summary.environments:
        state = (record.get("git") or {}).get("program") or (record.get("git") or {}).get("idavlm")
        if state:
            revisions[f"{state['revision'][:12]}{' with changes' if state['dirty'] else ''}"] = None
    return facts + ([("git revision", ", ".join(revisions), False)] if revisions else [])


def _write_pages(summary: Summary, folder: Path, max_items: int) -> list[tuple[str, str]]:
    """Text and link of the pages with images, one per variant and evaluation of the tables."""
    shown = dict.fromkeys(metric.partition("/")[0] for metric in summary.metrics)
    samples: dict[Path, dict[str, Sample]] = {}
    pages = []
    for variant in summary.variants:
        seed = next((seed for seed in variant.runs if seed in summary.baseline.runs), None)
        if variant is summary.baseline or seed is None:
            continue
        for evaluation in shown:
            page = _write_page(summary, variant, seed, evaluation, folder, samples, max_items)
            pages += [page] if page else []
    return pages


def _write_page(
    summary: Summary,
    variant: VariantSummary,
    seed: int,
    evaluation: str,
    folder: Path,
    samples: dict[Path, dict[str, Sample]],
    max_items: int,
) -> tuple[str, str] | None:
    """Text and link of a page; None if the runs did not answer the same records, or the records are gone."""
    baseline, other = summary.baseline.runs[seed], variant.runs[seed]
    records = other.records.get(evaluation)
    if not (baseline.answers.get(evaluation) and other.answers.get(evaluation)) or not records or not records.exists():
        return None
    try:
        pairs = pair_predictions(baseline.answers[evaluation][0], other.answers[evaluation][0])
    except ValueError:  # a note of the summary says so
        return None
    if records not in samples:
        samples[records] = {sample.id: sample for sample in RecordDataset(records)}
    path = folder / f"{folder_name(f'{variant.name}, {evaluation}')}.html"
    differ = write_comparison_page(
        path,
        pairs,
        compare_scores(pairs),
        names=(summary.baseline.name, variant.name),
        samples=samples[records],
        max_items=max_items,
    )
    text = f"{variant.name}: {evaluation}, seed {seed}, {differ} of {len(pairs)} records differ"
    return text, f"{folder.name}/{path.name}"


def _runs_csv(summary: Summary) -> str:
    """One line per run: what it was, how it ended, and its metrics."""
    first = ["run", "variant", "choice", "seed", "state", "seconds", "attempts", "started", "ended", "git"]
    rows = []
    for run in summary.runs:
        folder = RunFolder(summary.study.folder / run.name)
        record = folder.record
        row = {"run": run.name, "variant": run.variant, "choice": short(run.choice), "seed": run.seed}
        row |= {
            "state": folder.state,
            **{name: record.get(name) for name in ("seconds", "attempts", "started", "ended")},
        }
        state = (record.get("git") or {}).get("program")
        row["git"] = state and f"{state['revision']}{' with changes' if state['dirty'] else ''}"
        rows.append(row | (summary.finished[run.name].metrics if run.name in summary.finished else {}))
    names = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    return csv_text(names, rows)
