"""The program of studies with ``program: train``: train as a configuration says, then answer files of records."""

import argparse
import json
import time
from pathlib import Path

from idavlm.ablation.record_evaluation import read_evaluations
from idavlm.cli import merge, train
from idavlm.evaluation import load_checkpoint, write_metrics
from idavlm.models.attach import CONFIG as ATTACHED
from idavlm.training.build import build
from idavlm.training.config import TrainConfig, read_config
from idavlm.training.lora import ADAPTER_CONFIG
from idavlm.training.trainer import freeze_modules


def main() -> None:
    """Train, evaluate, and write ``metrics.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--evaluate", type=json.loads, required=True)
    arguments = parser.parse_args()
    start = time.time()
    folder = arguments.out / "model"
    overrides = [*arguments.overrides, f"output_dir={json.dumps(str(folder))}"]
    evaluations = read_evaluations(arguments.evaluate)
    train.run(argparse.Namespace(config=arguments.config, overrides=overrides, dry_run=False))
    if (folder / ADAPTER_CONFIG).exists():
        merged = arguments.out / "merged"
        merge.run(argparse.Namespace(adapter=folder, out=merged, model=None, dtype=None))
        folder = merged
    id_former = folder if (folder / ATTACHED).exists() else None
    config = read_config(arguments.config, overrides)
    source = config.model.model if id_former is not None and not (folder / "config.json").exists() else folder
    model, processor = load_checkpoint(source, id_former=id_former)
    parameters, trained = count_parameters(config)
    write_metrics(
        arguments.out,
        {name: [evaluation.run(model, processor)] for name, evaluation in evaluations.items()},
        records={name: evaluation.data for name, evaluation in evaluations.items()},
        parameters=parameters,
        trained_parameters=trained,
        seconds=time.time() - start,
    )


def count_parameters(config: TrainConfig) -> tuple[int, int]:
    """Number of all parameters of a run, and of those that it trains."""
    model = build(config, empty=True).model
    freeze_modules(model, config.training)
    all_parameters = list(model.parameters())
    return (
        sum(parameter.numel() for parameter in all_parameters),
        sum(parameter.numel() for parameter in all_parameters if parameter.requires_grad),
    )


if __name__ == "__main__":
    main()
