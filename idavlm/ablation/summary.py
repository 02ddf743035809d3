"""Results of a study: mean and deviation of each metric over the seeds, and differences from the baseline."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from idavlm.ablation.run_folder import RunFolder
from idavlm.ablation.study import Run, Study
from idavlm.evaluation.comparison import Comparison, compare_values, pair_predictions
from idavlm.evaluation.metrics_file import RunMetrics
from idavlm.evaluation.results import EvaluationResult


@dataclass(frozen=True)
class Score:
    """A metric of a variant.

    Attributes:
        values: the metric of each finished seed.
        comparison: with the baseline, on the records that both answered with the same seeds; None for the baseline,
            and where that is impossible, see :attr:`Summary.notes`.
    """

    values: list[float]
    comparison: Comparison | None = None

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the seeds (of a sample: n - 1); None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass
class VariantSummary:
    """A variant of a study.

    Attributes:
        name: name of the variant.
        choice: the chosen values of ``choose``; {} without it.
        runs: seed -> metrics of the finished runs.
        scores: metric -> score.
        seconds: mean duration of a finished run; None without one.
        facts: numbers such as ``parameters`` that all runs agree on.
        chance: metric -> its expected value for random guessing, where the answers say it.
    """

    name: str
    choice: dict[str, Any]
    runs: dict[int, RunMetrics]
    scores: dict[str, Score] = field(default_factory=dict)
    seconds: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)


@dataclass
class Summary:
    """The results of a study.

    Attributes:
        study: the study.
        runs: all runs; with ``choose.seeds``, those of the values that have been chosen so far.
        variants: in the order of the study. A variant without a finished run has no scores.
        metrics: names of the metrics, in order.
        states: state -> names of the runs.
        failures: name of a failed run -> what happened.
        notes: what a reader of the tables must know.
        environments: the records of the finished runs.
        finished: name of a finished run -> its metrics.
    """

    study: Study
    runs: list[Run]
    variants: list[VariantSummary]
    metrics: list[str]
    states: dict[str, list[str]]
    failures: dict[str, str]
    notes: list[str]
    environments: list[dict[str, Any]]
    finished: dict[str, RunMetrics]

    @property
    def baseline(self) -> VariantSummary:
        """The variant that the others are compared with."""
        return next(variant for variant in self.variants if variant.name == self.study.baseline)


def chosen_values(study: Study) -> dict[str, dict[str, Any]]:
    """Variant -> the values of ``choose`` with the highest metric, by the runs that have finished.

    Raises:
        ValueError: a finished run does not have the metric, or its metrics cannot be read.
    """
    if not study.choose:
        return {}
    metric, best = study.choose["by"], {}
    for (variant, _), runs in groupby(study.runs(), key=lambda run: (run.variant, run.choice)):
        values = []
        for run in runs:
            folder = RunFolder(study.folder / run.name)
            if folder.state == "finished":
                metrics = folder.metrics().metrics
                if metric not in metrics:
                    raise ValueError(f"choose: by={metric!r} is no metric of the runs; they have {', '.join(metrics)}.")
                values.append(metrics[metric])
        if values and (variant not in best or statistics.fmean(values) > best[variant][0]):
            best[variant] = (statistics.fmean(values), run.choice)
    return {variant: choice for variant, (_, choice) in best.items()}


def summarize_study(study: Study) -> Summary:
    """Collect the finished runs of a study.

    Raises:
        ValueError: a finished run had other settings, or its metrics cannot be read.
    """
    chosen = chosen_values(study)
    runs = study.runs(chosen)
    folders = {run.name: RunFolder(study.folder / run.name) for run in runs}
    states: dict[str, list[str]] = {}
    for run in runs:
        folders[run.name].check_settings(study.settings_of(run))
        states.setdefault(folders[run.name].state, []).append(run.name)
    finished = {run.name: folders[run.name].metrics() for run in runs if run.name in states.get("finished", ())}
    records = {name: folders[name].record for name in finished}
    metrics = _selected(study.metrics, finished.values())
    notes: list[str] = []
    variants = []
    for name in dict.fromkeys(run.variant for run in runs):
        of_variant = [run for run in runs if run.variant == name]
        if study.choose:
            notes += _missing_choices(of_variant, finished)
        shown = [run for run in of_variant if run.choice == chosen.get(name, of_variant[0].choice)]
        of_seed = {run.seed: finished[run.name] for run in shown if run.name in finished}
        variant = VariantSummary(name, shown[0].choice, of_seed)
        found = [records[run.name] for run in shown if run.name in finished]
        if found:
            variant.seconds = statistics.fmean(record["seconds"] for record in found)
        variant.facts = _common_facts(of_seed.values())
        variant.chance = _chance_levels(of_seed.values(), metrics)
        for metric in metrics:
            values = [run.metrics[metric] for run in of_seed.values() if metric in run.metrics]
            if values:
                variant.scores[metric] = Score(values)
        variants.append(variant)
    failures = {
        name: f"{folders[name].record.get('problem')}\n{folders[name].end_of_log()}"
        for name in states.get("failed", ())
    }
    summary = Summary(study, runs, variants, metrics, states, failures, notes, list(records.values()), finished)
    for variant in variants:
        if variant is not summary.baseline:
            _compare(variant, summary.baseline, metrics, notes)
    revisions = {str(record.get("git")) for record in records.values()}
    if len(revisions) > 1:
        notes.append(f"The runs were made with {len(revisions)} git revisions; see runs.csv.")
    return summary


def _selected(patterns: Sequence[str], runs: Sequence[RunMetrics]) -> list[str]:
    """The metrics of the tables, in the order of the patterns."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    selected = []
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern.replace("[", "[[]"))]
        if names and not found:
            raise ValueError(f"metrics: {pattern!r} is no metric of the runs; they have {', '.join(names)}.")
        selected += [name for name in found if name not in selected]
    return selected


def _missing_choices(runs: list[Run], finished: Mapping[str, RunMetrics]) -> list[str]:
    """Notes on values of ``choose`` of which runs of a variant have not finished."""
    missing = Counter(
        ", ".join(f"{key}={value}" for key, value in run.choice.items()) for run in runs if run.name not in finished
    )
    return [f"{runs[0].variant}: {count} runs with {choice} are missing." for choice, count in missing.items()]


def _common_facts(runs: Sequence[RunMetrics]) -> dict[str, Any]:
    runs = list(runs)
    first = runs[0].facts if runs else {}
    return {name: value for name, value in first.items() if all(run.facts.get(name) == value for run in runs)}


def _chance_levels(runs: Iterable[RunMetrics], metrics: Sequence[str]) -> dict[str, float]:
    """Mean over the runs of the chance level of each metric that has one."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for evaluation, results in run.answers.items():
            for result in results:
                for task, row in result.summary.items():
                    for metric, value in row["chance"].items():
                        found.setdefault(f"{evaluation}/{task}/{metric}", []).append(value)
    return {metric: statistics.fmean(found[metric]) for metric in metrics if metric in found}


def _compare(variant: VariantSummary, baseline: VariantSummary, metrics: Sequence[str], notes: list[str]) -> None:
    """Compare a variant with the baseline, record by record. The score of a record is its mean over the seeds."""
    seeds = [seed for seed in variant.runs if seed in baseline.runs]
    evaluations = dict.fromkeys(name for seed in seeds for name in variant.runs[seed].answers)
    for evaluation in evaluations:
        try:
            scores = _paired_scores(evaluation, [(baseline.runs[seed], variant.runs[seed]) for seed in seeds])
        except ValueError as error:
            notes.append(
                f"{variant.name}, {evaluation}: no comparison by record. {str(error)[:1].upper()}{str(error)[1:]}"
            )
            continue
        for (task, metric), pairs in scores.items():
            name = f"{evaluation}/{task}/{metric}"
            if name in metrics and name in variant.scores:
                comparison = compare_values(task, metric, list(pairs.values()))
                variant.scores[name] = Score(variant.scores[name].values, comparison)


def _paired_scores(
    evaluation: str, runs: Sequence[tuple[RunMetrics, RunMetrics]]
) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """(task, metric) -> record -> mean scores of baseline and variant over the seeds."""
    values: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for baseline, variant in runs:
        for first, second in _results(evaluation, baseline, variant):
            for a, b in pair_predictions(first, second):
                for metric in a.scores:
                    if metric in b.scores:
                        of_record = values.setdefault((a.task, metric), {}).setdefault(a.id, [])
                        of_record.append((a.scores[metric], b.scores[metric]))
    return {
        key: {record: tuple(map(statistics.fmean, zip(*found, strict=True))) for record, found in records.items()}
        for key, records in values.items()
    }


def _results(evaluation: str, a: RunMetrics, b: RunMetrics) -> list[tuple[EvaluationResult, EvaluationResult]]:
    """The results of both runs, seed by seed where one run has several."""
    return list(zip(a.answers.get(evaluation, []), b.answers.get(evaluation, []), strict=False))
