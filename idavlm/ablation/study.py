"""Study files: which runs an ablation study consists of."""

import hashlib
import itertools
import re
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from idavlm.data.errors import quote
from idavlm.training.config_file import OptionFile
from idavlm.utils import check_type

TRAIN = "train"
"""Value of ``program`` for studies of ``idavlm train`` configurations."""

SET_BY_STUDY = ("seed", "out")
"""Options of a program that each run gets from the study."""


@dataclass(frozen=True)
class Run:
    """One run of a study: a variant and a seed.

    Attributes:
        variant: name of the variant.
        choice: values of ``choose`` that the run has; {} without ``choose``.
        seed: the seed.
        settings: options of the program, without the seed.
        name: path of the run below the folder of the study.
    """

    variant: str
    choice: dict[str, Any]
    seed: int
    settings: dict[str, Any]
    name: str


@dataclass
class Study:
    """An ablation study.

    Attributes:
        program: a Python script that takes ``--seed N --out FOLDER`` and its options as ``--key value``, and writes
            ``metrics.json`` (:func:`idavlm.evaluation.write_metrics`) into the folder; or ``"train"``.
        name: name of the study; by default that of the file.
        description: text at the top of the report.
        config: with ``program: train``, the configuration that all runs share.
        evaluate: with ``program: train``, evaluation -> file of records that the trained model answers, or a mapping
            with ``data`` and options, see :class:`idavlm.ablation.record_evaluation.RecordEvaluation`.
        base: options of all runs.
        grid: option -> list of values. The variants are all combinations.
        variants: name -> options. With ``grid``, each variant is combined with all values.
        choose: ``{"values": {option: [...]}, "by": metric}``: each variant is run with each of these values, and the
            tables show the value with the highest metric. With ``"seeds": [0]`` as well, only these seeds are run with
            all values, and the others with the chosen value.
        seeds: each variant is run with each seed.
        baseline: name of the variant that the others are compared with; by default the first one.
        metrics: names of the metrics of the tables, in order; ``*`` stands for any characters. By default all.
        out: folder of the runs and the report; by default ``runs/ablations/<name>``.
        resume: options that are added when a run starts again that was killed, for programs that continue from
            checkpoints. Its files are then kept. By default a run starts in an empty folder.

    Raises:
        ValueError: an option is missing, of another type, or does not fit the others.
    """

    program: str
    name: str
    description: str = ""
    config: str | None = None
    evaluate: dict | None = None
    base: dict = field(default_factory=dict)
    grid: dict = field(default_factory=dict)
    variants: dict = field(default_factory=dict)
    choose: dict | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    baseline: str | None = None
    metrics: list[str] = field(default_factory=lambda: ["*"])
    out: str = ""
    resume: dict | None = None

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Study)
        for each in fields(Study):
            check_type(each.name, getattr(self, each.name), hints[each.name])
        self.out = self.out or f"runs/ablations/{self.name}"
        if self.program == TRAIN and not self.config:
            raise ValueError("program='train' needs config, the file of an `idavlm train` configuration.")
        for name in ("config", "evaluate"):
            if self.program != TRAIN and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with program={self.program!r}; it is for program: train.")
        if self.program != TRAIN and not Path(self.program).is_file():
            raise ValueError(f"program={self.program!r} is no file in the current folder; pass a script, or 'train'.")
        if self.config is not None and not Path(self.config).is_file():
            raise ValueError(f"config={self.config!r} is no file in the current folder.")
        _check_lists("grid", self.grid)
        _check_list("seeds", self.seeds)
        if self.choose is not None:
            values = self.choose.get("values")
            if set(self.choose) - {"seeds"} != {"values", "by"} or not isinstance(values, dict) or not values:
                raise ValueError(
                    f"choose={self.choose} must have the keys 'values' (option: [...]) and 'by' (a metric); 'seeds' is "
                    "optional."
                )
            _check_lists("choose.values", values)
            _check_list("choose.seeds", self.choice_seeds)
            if not set(self.choice_seeds) <= set(self.seeds):
                raise ValueError(f"choose.seeds={self.choice_seeds} must be some of seeds={self.seeds}.")
        for name, options in self.variants.items():
            if not isinstance(options, dict):
                raise ValueError(
                    f"variants: {name!r} is {quote(options)}, not a mapping of options; write {{}} for none."
                )
        self._check_options()
        names = list(self._variants())
        if self.baseline is None:
            self.baseline = names[0]
        elif self.baseline not in names:
            raise ValueError(
                f"baseline={self.baseline!r} is no variant; the variants are {', '.join(map(repr, names))}."
            )

    def _check_options(self) -> None:
        choices = dict(self.choose["values"]) if self.choose else {}
        groups = [self.grid, choices, *(dict.fromkeys(options) for options in self.variants.values())]
        for number, group in enumerate(groups):
            for option in group:
                if option in SET_BY_STUDY:
                    raise ValueError(f"the study sets {option} of each run; leave it out (see 'seeds' and 'out').")
                if any(option in other for other in groups[: min(number, 2)]):
                    raise ValueError(f"{option} is varied in two places; keep one of grid, variants and choose.")
        for option in SET_BY_STUDY:
            if option in self.base:
                raise ValueError(f"base: the study sets {option} of each run; leave it out (see 'seeds' and 'out').")

    def _variants(self) -> dict[str, dict[str, Any]]:
        """Name -> options that differ from the base."""
        found = {}
        for name, options in (self.variants or {"": {}}).items():
            for values in itertools.product(*self.grid.values()):
                combined = dict(zip(self.grid, values, strict=True))
                parts = [name, *(f"{option}={short(value)}" for option, value in combined.items())]
                label = ", ".join(filter(None, parts)) or "base"
                if label in found:
                    raise ValueError(f"two variants are called {label!r}; the values of the grid must differ.")
                found[label] = {**options, **combined}
        return found

    @property
    def choice_seeds(self) -> list[int]:
        """The seeds that are run with all values of ``choose``."""
        return (self.choose or {}).get("seeds", self.seeds)

    def runs(self, chosen: Mapping[str, dict[str, Any]] | None = None) -> list[Run]:
        """All runs, variant by variant.

        Args:
            chosen: variant -> chosen values, see :func:`idavlm.ablation.summary.chosen_values`. Seeds that are not in
                :attr:`choice_seeds` are run with these values alone, and not at all before values are chosen.
        """
        chosen = chosen or {}
        choices = [{}]
        if self.choose:
            values = self.choose["values"]
            choices = [dict(zip(values, found, strict=True)) for found in itertools.product(*values.values())]
        runs = []
        for variant, options in self._variants().items():
            for choice in choices:
                label = ", ".join([variant, *(f"{option}={short(value)}" for option, value in choice.items())])
                for seed in self.seeds:
                    if seed not in self.choice_seeds and chosen.get(variant) != choice:
                        continue
                    settings = {**self.base, **choice, **options}
                    runs.append(Run(variant, choice, seed, settings, f"{folder_name(label)}/seed-{seed}"))
        repeated = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
        if repeated:
            raise ValueError(f"two variants have the folder {repeated[0]!r}; give them names that differ in letters.")
        return runs

    def settings_of(self, run: Run) -> dict[str, Any]:
        """What the result of a run depends on, as far as the study says it."""
        program = {"program": self.program}
        if self.program == TRAIN:
            program |= {"config": self.config, "config_text": Path(self.config).read_text(encoding="utf-8")}
            program |= {"evaluate": self.evaluate or {}}
        return {**program, "options": run.settings, "seed": run.seed}

    @property
    def folder(self) -> Path:
        """Folder of the runs and the report."""
        return Path(self.out)


def read_study(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """Read a study.

    Args:
        path: YAML file. Its keys are the attributes of :class:`Study`.
        overrides: ``key=value``, for example ``seeds=[0]`` or ``base.steps=[100, 200]``. Values are YAML.

    Raises:
        ValueError: an unknown key, with the nearest known one; values of the wrong type, or that do not fit each other.
        OSError: the file cannot be read.
    """
    file = OptionFile(path, overrides)
    file.check_keys([each.name for each in fields(Study)])
    file.check_placeholders()
    if "program" not in file.values:
        raise ValueError(f"{path}: program is missing; name a script, or write 'program: train'.")
    values = {"name": Path(path).stem, **file.values}
    try:
        return Study(**values)
    except ValueError as error:
        named = next((key for key in file.values if re.match(rf"{key}\b", str(error))), None)
        raise ValueError(f"{file.where(named) if named else path}: {error}") from None


def short(value: Any) -> str:
    """A value as it stands in names and tables."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(short, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {short(entry)}" for key, entry in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def folder_name(label: str) -> str:
    """The folder of a variant: its name, in characters that every file system takes."""
    name = re.sub(r"[^\w.=+-]+", "_", label).strip("_.")
    if name == label and len(name) <= 100:
        return name
    return f"{name[:100]}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def _check_lists(name: str, values: Mapping[str, Any]) -> None:
    for option, found in values.items():
        _check_list(f"{name}: {option}", found)


def _check_list(name: str, values: Any) -> None:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name}={quote(values)} is not a list of values; write for example [1, 2].")
    repeated = next((value for number, value in enumerate(values) if value in values[:number]), None)
    if repeated is not None:
        raise ValueError(f"{name}={values} has {repeated!r} twice; keep one.")
