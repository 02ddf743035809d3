"""Run a study on a cluster: each run is a trial of Ray Tune.

All machines need the same paths: the folder of the study, the program and its data are on a shared file system, and
idavlm is installed in the same place.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from idavlm.ablation.execution import Job
from idavlm.ablation.run_folder import RunFolder


def run_with_ray(
    jobs: list[Job],
    *,
    num_jobs: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
    on_end: Callable[[Job, str], None],
) -> None:
    """Execute runs as trials of Ray Tune, on the cluster of ``RAY_ADDRESS``, or on this machine without one.

    Args:
        jobs: the runs.
        num_jobs: maximum number of runs at a time; by default what the resources allow.
        cpus: cores that each run occupies.
        gpus: GPUs that each run occupies. Ray sets CUDA_VISIBLE_DEVICES.
        on_end: called with each run and its state, after all have ended.

    Raises:
        ImportError: ray is not installed.
    """
    if not jobs:
        return
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise ImportError("--engine ray needs Ray Tune; install it with: pip install 'idavlm[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    by_name = {job.name: job for job in jobs}
    working_folder = os.getcwd()

    def trial(config: dict[str, Any]) -> None:
        os.chdir(working_folder)  # Tune runs each trial in a folder of its own
        job = by_name[config["run"]]
        state = job.execute({"OMP_NUM_THREADS": str(max(1, int(cpus)))} if not gpus else {})
        metrics = RunFolder(job.folder).metrics().metrics if state == "finished" else {}
        tune.report({"is_finished": int(state == "finished"), **metrics})

    try:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": cpus, "gpu": gpus}),
            param_space={"run": tune.grid_search(list(by_name))},
            tune_config=tune.TuneConfig(max_concurrent_trials=num_jobs, metric="is_finished", mode="max"),
            run_config=tune.RunConfig(
                name="ray", storage_path=str(Path(jobs[0].folder).parents[1] / ".ray"), verbose=0
            ),
        )
        tuner.fit()
    finally:
        if started:
            ray.shutdown()
    for job in jobs:
        on_end(job, RunFolder(job.folder).state)
