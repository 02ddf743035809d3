"""``idavlm ablate STUDY.yaml``: run the variants of a program over seeds, and write tables of the results."""

import argparse
import shlex
import sys

from idavlm.cli.arguments import path, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("study", type=path, help="YAML file of a study, for example one of recipes/ablations/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the study that replaces that of the file, for example 'seeds=[0]' or base.num_queries=8",
    )
    parser.add_argument("--jobs", type=positive_int, help="number of runs at a time; by default 1, with ray any number")
    parser.add_argument("--dry-run", action="store_true", help="check all options and print the runs")
    parser.add_argument("--report-only", action="store_true", help="write the tables of the runs that have finished")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine, or a cluster of Ray")
    parser.add_argument("--cpus", type=float, default=1, metavar="N", help="with ray: cores of a run")
    parser.add_argument("--gpus", type=float, default=0, metavar="N", help="with ray: GPUs of a run")


def run(arguments: argparse.Namespace) -> int:
    """Run what is left of the study. Returns 1 if a run has failed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:  # before the runs, because the report comes last
        raise ValueError(
            "idavlm ablate draws figures by matplotlib; install it by pip install 'idavlm[eval]'."
        ) from error
    # After the arguments were parsed, because these imports take seconds.
    from idavlm.ablation.programs import check_options, command
    from idavlm.ablation.run_folder import RunFolder
    from idavlm.ablation.study import read_study
    from idavlm.ablation.summary import chosen_values
    from idavlm.utils import lock_folder

    study = read_study(arguments.study, arguments.set)
    runs = study.runs()
    if arguments.report_only:
        return _report(study)
    check_options(study, runs)
    if arguments.dry_run:
        for each in runs:
            folder = RunFolder(study.folder / each.name)
            folder.check_settings(study.settings_of(each))
            print(f"{each.name} ({folder.state})")
            print(f"    {shlex.join(command(study, each.settings, each.seed, folder.output))}")
        print(f"{len(runs)} runs in {study.folder}")
        left = [seed for seed in study.seeds if seed not in study.choice_seeds]
        if left:
            print(f"Then each variant runs with its chosen values and the seeds {', '.join(map(str, left))}.")
        return 0
    with lock_folder(study.folder):
        try:
            _execute(study, runs, arguments, text="runs")
            runs = [each for each in study.runs(chosen_values(study)) if each.seed not in study.choice_seeds]
            if runs:
                _execute(study, runs, arguments, text="runs with the chosen values")
        except KeyboardInterrupt:
            kept = f"Finished runs are kept in {study.folder}. Repeat the command to continue."
            raise KeyboardInterrupt(kept) from None
        return _report(study)


def _execute(study, runs: list, arguments: argparse.Namespace, *, text: str) -> None:
    """Execute the runs that are not finished. ``text`` says what they are."""
    from idavlm.ablation.execution import describe_end, jobs_of, run_locally

    jobs = jobs_of(study, runs)
    ended = len(runs) - len(jobs)
    print(f"{study.name}: {len(runs)} {text}, {ended} of them are finished ({study.folder})", flush=True)

    def on_end(job, state: str) -> None:
        nonlocal ended
        ended += 1
        print(f"[{ended}/{len(runs)}] {describe_end(job, state)}", flush=True)

    if arguments.engine == "ray":
        from idavlm.ablation.ray_engine import run_with_ray

        resources = {"cpus": arguments.cpus, "gpus": arguments.gpus}
        run_with_ray(jobs, num_jobs=arguments.jobs, **resources, on_end=on_end)
    else:
        run_locally(jobs, num_jobs=arguments.jobs or 1, on_end=on_end)


def _report(study) -> int:
    """Write the report, print the tables and the failed runs; 1 if a run has failed."""
    from idavlm.ablation.report import write_study_report
    from idavlm.ablation.tables import markdown_tables

    repeated = [word for word in sys.argv[1:] if word != "--report-only"]
    summary = write_study_report(study, command=shlex.join(["idavlm", *repeated]))
    print("\n" + "\n\n".join(markdown_tables(summary)))
    failed = summary.states.get("failed", [])
    missing = [name for state in ("new", "running", "killed") for name in summary.states.get(state, [])]
    for kind, names in (("failed", failed), ("have not finished", missing)):
        if names:
            print(f"\n{len(names)} runs {kind}: {', '.join(names)}")
    print(f"\n{study.folder / 'report.html'}")
    return 1 if failed else 0
