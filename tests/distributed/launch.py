"""Start the processes of a distributed run, and start them again after a case that failed or hung."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.distributed.worker import result_file

Case = tuple[str, str, str]
"""Strategy, model and kind of batches."""

ROOT = Path(__file__).parent.parent.parent
PROCESSES = 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, port: int, processes: int = PROCESSES) -> dict[str, str]:
    """The environment that torchrun would set."""
    options = {"WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
    options |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
    options |= {"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **{name: str(value) for name, value in options.items()}}


def start(module: str, *arguments: str, processes: int = PROCESSES, **options) -> list[subprocess.Popen]:
    """Start the processes of ``python -m module``. One process alone is no distributed run."""
    command, port = [sys.executable, "-m", module, *arguments], free_port()
    if processes == 1:
        return [subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)]
    return [
        subprocess.Popen(command, cwd=ROOT, env=environment(rank, port, processes), **options)
        for rank in range(processes)
    ]


def end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def run_cases(folder: Path, cases: Sequence[Case], *, processes: int = PROCESSES) -> dict[Case, dict[str, Any]]:
    """Run cases and return their results; a case that hung or failed has an ``error`` and does not end the others.

    What the processes print is in ``folder/log``.
    """
    results: dict[Case, dict[str, Any]] = {}
    while waiting := [case for case in cases if case not in results]:
        with (folder / "log").open("a") as log:
            arguments = [":".join(case) for case in waiting]
            workers = start(
                "tests.distributed.worker", str(folder), *arguments, processes=processes, stderr=log, stdout=log
            )
            try:
                failed = _wait(workers)
            finally:
                end(workers)
        for case in waiting:
            files = [result_file(folder, case, rank) for rank in range(processes)]
            found = [torch.load(file) for file in files if file.exists()]
            errors = [result["error"] for result in found if "error" in result]
            if errors:
                results[case] = {"error": "; ".join(errors), "seconds": 0.0}
            elif failed and len(found) < processes:
                results[case] = {"error": "hung", "seconds": 0.0}
            else:
                results[case] = found[0]
                continue
            break  # the processes ended with this case
    return results


def _wait(workers: Sequence[subprocess.Popen]) -> bool:
    """Wait until all have ended, or one has failed."""
    while True:
        codes = [worker.poll() for worker in workers]
        if any(codes):  # the others would wait for it
            deadline = time.time() + 5
            while time.time() < deadline and None in [worker.poll() for worker in workers]:
                time.sleep(0.1)
            return True
        if None not in codes:
            return False
        time.sleep(0.05)
