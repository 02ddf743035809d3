"""Tables of a study: Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from idavlm.ablation.study import short
from idavlm.ablation.summary import Score, Summary, VariantSummary
from idavlm.evaluation.report import format_seconds
from idavlm.utils import markdown_table

FACTS = ("parameters", "trained_parameters")
"""Facts of a run that have a column."""

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def score_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of scores: mean and standard deviation over the seeds."""
    facts = [name for name in FACTS if any(name in variant.facts for variant in summary.variants)]
    chosen = list(summary.study.choose["values"]) if summary.study.choose else []
    header = ["variant", *chosen, "n", *(name.replace("_", " ") for name in facts), "time"]
    header += [label(metric, summary.metrics) for metric in summary.metrics]
    rows = []
    for variant in summary.variants:
        row = [variant.name, *(short(variant.choice[name]) for name in chosen), str(len(variant.runs))]
        row += [f"{variant.facts[name]:,}" if name in variant.facts else "-" for name in facts]
        row += ["-" if variant.seconds is None else format_seconds(variant.seconds)]
        row += [_mean(variant.scores.get(metric)) for metric in summary.metrics]
        rows.append(row)
    chance = [_chance_level(summary, metric) for metric in summary.metrics]
    if any(chance):
        rows.append(["chance level", *[""] * (len(header) - len(chance) - 1), *chance])
    return header, rows


def difference_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of differences from the baseline; no rows if there is none to compare."""
    rows = []
    for variant in summary.variants:
        cells = [_difference(variant, summary.baseline, metric) for metric in summary.metrics]
        if variant is not summary.baseline and any(cell != "-" for cell in cells):
            rows.append([variant.name, *cells])
    return ["variant", *(label(metric, summary.metrics) for metric in summary.metrics)], rows


def markdown_tables(summary: Summary) -> list[str]:
    """The two tables as Markdown, each after a line that explains it."""
    parts = [EXPLAIN_SCORES, markdown_table(*score_rows(summary))]
    header, rows = difference_rows(summary)
    if rows:
        parts += [f"Difference from **{summary.baseline.name}**. {EXPLAIN_DIFFERENCES}", markdown_table(header, rows)]
    return parts


def latex_tables(summary: Summary) -> str:
    """The two tables for LaTeX with the package booktabs."""
    tables = [_latex_table(*score_rows(summary), f"{summary.study.name}: scores", f"tab:{summary.study.name}")]
    header, rows = difference_rows(summary)
    if rows:
        caption = f"{summary.study.name}: difference from {summary.baseline.name}"
        tables.append(_latex_table(header, rows, caption, f"tab:{summary.study.name}-difference"))
    return "% \\usepackage{booktabs}\n" + "\n".join(tables)


def scores_csv(summary: Summary) -> str:
    """One line per variant and metric, with numbers in full precision."""
    names = ["variant", "choice", "metric", "mean", "standard_deviation", "n", "baseline", "difference"]
    names += ["difference_low", "difference_high", "p_value", "records", "chance", *FACTS, "seconds"]
    rows = []
    for variant in summary.variants:
        for metric, score in variant.scores.items():
            row: dict[str, Any] = {"variant": variant.name, "choice": short(variant.choice), "metric": metric}
            row |= {"mean": score.mean, "standard_deviation": score.deviation, "n": len(score.values)}
            row |= {"baseline": summary.baseline.name, "seconds": variant.seconds}
            row |= {"chance": variant.chance.get(metric)}
            row |= {name: variant.facts.get(name) for name in FACTS}
            if score.comparison is not None:
                found = score.comparison
                row |= {"difference": found.difference.mean, "difference_low": found.difference.low}
                row |= {"difference_high": found.difference.high, "p_value": found.p_value}
                row |= {"records": found.difference.n}
            rows.append(row)
    return csv_text(names, rows)


def csv_text(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """The text of a CSV file; a column that a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def label(metric: str, metrics: Sequence[str]) -> str:
    """The name of a metric in a table, without the evaluation if all metrics have the same."""
    first = metric.partition("/")[0]
    if "/" in metric and all(other.startswith(f"{first}/") for other in metrics):
        metric = metric.partition("/")[2]
    return metric.replace("/", " ")


def escape_latex(text: str) -> str:
    """Escape the characters that LaTeX reads as commands."""
    return "".join(_LATEX.get(character, character) for character in text)


EXPLAIN_SCORES = "Mean ± standard deviation over n seeds; time is that of one run."
EXPLAIN_DIFFERENCES = (
    "Brackets hold the 95 % interval of a paired bootstrap over the records. The score of a record is its mean over "
    "the seeds. An asterisk marks intervals without 0. A difference without an interval is one of the means, where "
    "the records cannot be paired."
)


def _mean(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.mean:.3f}" + ("" if score.deviation is None else f" ± {score.deviation:.3f}")


def _chance_level(summary: Summary, metric: str) -> str:
    """Chance level of a metric; a range if it differs between variants, "" without one."""
    found = sorted(f"{each.chance[metric]:.3f}" for each in summary.variants if metric in each.chance)
    return " to ".join(dict.fromkeys([found[0], found[-1]])) if found else ""


def _difference(variant: VariantSummary, baseline: VariantSummary, metric: str) -> str:
    score, other = variant.scores.get(metric), baseline.scores.get(metric)
    if score is None or other is None:
        return "-"
    if score.comparison is None:
        return f"{score.mean - other.mean:+.3f}"
    found = score.comparison.difference
    mark = "*" if found.low > 0 or found.high < 0 else ""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{mark}"


def _latex_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, name: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(escape_latex(cell).replace("±", r"$\pm$") for cell in cells) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape_latex(caption)}}}",
            rf"\label{{{''.join(c if c.isalnum() or c in ':-' else '-' for c in name)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            line(header),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
