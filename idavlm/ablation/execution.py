"""Run a study: what is left of it, on this machine or on a cluster."""

import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from idavlm.ablation.programs import command
from idavlm.ablation.provenance import describe_environment
from idavlm.ablation.run_folder import RunFolder
from idavlm.ablation.study import Run, Study
from idavlm.evaluation.report import format_seconds


@dataclass(frozen=True)
class Job:
    """A run that is to be executed, as plain values, so that it can be sent to another machine.

    Attributes:
        name: path of the run below the folder of the study.
        folder: folder of the run.
        command: command of the program.
        settings: settings that are stored and compared.
        facts: further entries of the record of the run.
        keep_output: whether the run continues from the files of a killed attempt.
    """

    name: str
    folder: str
    command: list[str]
    settings: dict[str, Any]
    facts: dict[str, Any]
    keep_output: bool

    def execute(self, environment: Mapping[str, str], run_folder: RunFolder | None = None) -> str:
        """Execute the run and return its state, see :meth:`RunFolder.execute`."""
        run_folder = run_folder or RunFolder(self.folder)
        return run_folder.execute(
            self.command,
            settings=self.settings,
            facts=self.facts,
            environment={"PYTHONPATH": _python_path(), **environment},
            keep_output=self.keep_output,
        )


def jobs_of(study: Study, runs: list[Run]) -> list[Job]:
    """The runs that are not finished.

    Raises:
        ValueError: a finished run had other settings.
    """
    jobs, environment = [], describe_environment(study.config or study.program)
    for run in runs:
        folder, settings = RunFolder(study.folder / run.name), study.settings_of(run)
        folder.check_settings(settings)
        state = folder.state
        if state == "finished":
            continue
        # With other settings, the files of a killed attempt are of no use. A program that outlived its study is ended.
        was_killed = state in ("killed", "running")
        continues = was_killed and study.resume is not None and folder.record["settings"] == settings
        options = {**run.settings, **(study.resume if continues else {})}
        jobs.append(
            Job(
                name=run.name,
                folder=str(folder.folder.absolute()),
                command=command(study, options, run.seed, folder.output),
                settings=settings,
                facts={"variant": run.variant, "choice": run.choice, "seed": run.seed, **environment},
                keep_output=continues,
            )
        )
    return jobs


def run_locally(jobs: list[Job], *, num_jobs: int = 1, on_end: Callable[[Job, str], None]) -> None:
    """Execute runs side by side, in processes of this machine.

    With GPUs, each run sees one of them; with more runs than GPUs, several share one. Without GPUs, the runs share the
    cores, unless OMP_NUM_THREADS is set.

    Args:
        jobs: the runs.
        num_jobs: number of runs at a time.
        on_end: called with each run and its state when it has ended.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM; the programs are ended first.
    """
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for number in range(num_jobs):
        free.put(device_environment(number, num_jobs))
    folders = {job.name: RunFolder(job.folder) for job in jobs}

    def execute(job: Job) -> str:
        environment = free.get()
        try:
            return job.execute(environment, folders[job.name])
        finally:
            free.put(environment)

    with ThreadPoolExecutor(num_jobs) as pool, _interrupted_by_sigterm():
        running = {pool.submit(execute, job): job for job in jobs}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    on_end(running.pop(future), future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for folder in folders.values():
                folder.stop()
            raise


def device_environment(number: int, num_jobs: int) -> dict[str, str]:
    """Environment variables of the run with a number among ``num_jobs`` at a time: a GPU, or a share of the cores."""
    gpus = _visible_gpus()
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}
    if num_jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_jobs))}


def describe_end(job: Job, state: str) -> str:
    """What is printed when a run has ended; for a failed run with the end of its log."""
    folder = RunFolder(job.folder)
    record = folder.record
    if state == "finished":
        return f"{job.name}: finished in {format_seconds(record['seconds'])}"
    if state == "killed":
        return f"{job.name}: interrupted"
    log = "\n".join(f"    {line}" for line in folder.end_of_log().splitlines())
    return f"{job.name}: FAILED ({record.get('problem')}). The end of {folder.log}:\n{log}"


def _visible_gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    return [str(gpu) for gpu in range(torch.cuda.device_count())]


def _python_path() -> str:
    """The current folder, where a script finds a package of the user, and what was set before."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([os.getcwd(), *filter(None, before)]))


@contextmanager
def _interrupted_by_sigterm():
    """SIGTERM, which schedulers send, has the effect of Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_):
        raise KeyboardInterrupt("The study was ended by SIGTERM.")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
