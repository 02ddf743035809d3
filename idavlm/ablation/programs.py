"""Programs of a study: the command of a run, and the check of its options before anything is run."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from idavlm.ablation.study import TRAIN, Run, Study

_FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w.-]*")
_VALID_FOLDER = "FOLDER"


def command(study: Study, settings: Mapping[str, Any], seed: int, out: str | Path) -> list[str]:
    """The command of a run that writes into the folder ``out``."""
    if study.program != TRAIN:
        options = {**settings, "seed": seed, "out": str(out)}
        return [sys.executable, study.program, *flags(options)]
    # Options first: argparse reads the configuration and its overrides together.
    options = ["--out", str(out), "--evaluate", json.dumps(study.evaluate or {})]
    overridden = overrides(settings, seed)
    return [sys.executable, "-m", "idavlm.cli.ablate_train", *options, study.config, *overridden]


def flags(options: Mapping[str, Any]) -> list[str]:
    """``--key value`` of each option: several values of a list, JSON of a mapping, nothing for None."""
    arguments = []
    for key, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{key}", *(json.dumps(each) if isinstance(each, dict) else str(each) for each in values)]
    return arguments


def overrides(settings: Mapping[str, Any], seed: int) -> list[str]:
    """``key=value`` of each option of an ``idavlm train`` configuration. Values are JSON, which YAML reads."""
    return [f"{key}={json.dumps(value)}" for key, value in {**settings, "seed": seed}.items()]


def check_options(study: Study, runs: Iterable[Run]) -> None:
    """Check the options of all runs against those that the program has.

    A script is asked for ``--help``. The configurations of ``idavlm train`` are read.

    Raises:
        ValueError: an option that the program does not have, with the nearest one; values that do not fit.
    """
    if study.program == TRAIN:
        _check_configurations(study, runs)
        return
    known = program_flags(study.program)
    used = dict.fromkeys(key for run in runs for key in [*run.settings, *(study.resume or {})])
    for key in [*used, "seed", "out"]:
        if f"--{key}" not in known:
            nearest = get_close_matches(f"--{key}", known, n=1, cutoff=0.0)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ValueError(f"{study.program} has no option --{key} (see its --help){hint}")


def program_flags(program: str) -> list[str]:
    """The options in the ``--help`` of a script."""
    found = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(
            f"`python {program} --help` fails with exit status {found.returncode}: {found.stderr.strip()[-500:]}"
        )
    return sorted(set(_FLAG.findall(found.stdout)))


def _check_configurations(study: Study, runs: Iterable[Run]) -> None:
    from idavlm.ablation.record_evaluation import read_evaluations
    from idavlm.training.config import read_config

    read_evaluations(study.evaluate or {})
    for run in runs:
        try:
            read_config(study.config, [*overrides(run.settings, run.seed), f"output_dir={_VALID_FOLDER}"])
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from None
