"""Kill training runs at random moments and resume them: ``python -m tests.killed_runs --kills 20``.

Each tower trains once without interruption, in one process and in two. Then runs are killed by SIGKILL, in turn at a
random time, while they write a checkpoint and while they evaluate, and resumed from their last complete checkpoint,
until the number of kills is reached. Of two processes one is killed at first, as by the kernel when memory is short.
Losses of all steps and evaluations, weights and optimizer states must equal those of the uninterrupted run bit for bit.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from idavlm.training import last_complete_checkpoint
from tests.distributed.launch import environment, free_port
from tests.interrupted_run import STEPS, build_trainer, write_data
from tests.small_models import TOWERS


class Run:
    """Child processes that train from the last complete checkpoint in ``folder``, or from the start.

    They are copies of this process, which saves the time of all imports. This process has no threads, which a copy
    would lack.
    """

    def __init__(self, data: Path, folder: Path, tower: str, processes: int) -> None:
        self.folder = folder
        self.start = time.time()
        resume, port = None, free_port()
        with contextlib.suppress(ValueError):
            resume = last_complete_checkpoint(folder)
        sys.stdout.flush()
        self.processes: list[int] = []
        for rank in range(processes):
            process = os.fork()
            if process == 0:
                if processes > 1:
                    os.environ.update(environment(rank, port, processes))
                self._train(data, tower, resume)
            self.processes.append(process)

    def _train(self, data: Path, tower: str, resume: str | None) -> None:
        status = 1
        try:
            torch.set_num_threads(1)
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                trainer = build_trainer(data, self.folder, tower=tower, eval_strategy="steps", eval_steps=3)
                trainer.train(resume_from_checkpoint=resume)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait(self, until: float = float("inf"), *, for_moment: str | None = None) -> bool:
        """Wait until the run has ended; return False at the time ``until``, or as soon as ``for_moment`` has come."""
        ended: set[int] = set()
        while time.time() < until:
            for number in set(self.processes) - ended:
                process, status = os.waitpid(number, os.WNOHANG)
                if process and status:
                    self.processes.remove(process)
                    self.kill()
                    raise RuntimeError(f"the run in {self.folder} failed; its traceback is above.")
                if process:
                    ended.add(process)
            if len(ended) == len(self.processes):
                return True
            if for_moment is not None and not ended and self.moment() == for_moment:
                return False
            time.sleep(0.001)
        if ended:  # too late to kill it
            return self.wait()
        return False

    def moment(self) -> str:
        """What the run is doing: ``"checkpoint"`` if one has begun and not ended, ``"evaluation"`` or ``"step"``."""
        for begun in self.folder.glob("checkpoint-*/run_state.json"):
            with contextlib.suppress(FileNotFoundError):
                if begun.stat().st_mtime > self.start and not (begun.parent / "trainer_state.json").exists():
                    return "checkpoint"
        with contextlib.suppress(FileNotFoundError):
            if (self.folder / "evaluating").stat().st_mtime > self.start:
                return "evaluation"
        return "step"

    def kill(self, first: int = 0) -> str:
        """Kill process ``first`` and then, as a launcher does, all others; return what the run was doing."""
        moment = None
        for process in self.processes[first:] + self.processes[:first]:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            moment = moment or self.moment()
        return moment or "step"


def losses(folder: Path) -> dict[tuple[int, bool], dict]:
    """Losses by step, and those of evaluations. A step that was repeated has several lines; the last one counts."""
    lines = []
    for line in (folder / "losses.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # the process was killed while it wrote the line
            lines.append(json.loads(line))
    return {(line["step"], "eval_loss" in line): line for line in lines}


def check_equal(folder: Path, whole: Path) -> None:
    """Check that two runs have the same losses, weights and optimizer states."""
    steps, evaluations = ({step for step, kind in losses(whole) if kind == is_evaluation} for is_evaluation in (0, 1))
    assert steps == set(range(1, STEPS + 1))
    assert evaluations >= set(range(3, STEPS + 1, 3))
    assert losses(folder) == losses(whole), f"losses in {folder}"
    last = f"checkpoint-{STEPS}"
    weights, expected = (load_file(path / last / "model.safetensors") for path in (folder, whole))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    states, expected = (torch.load(path / last / "optimizer.pt")["state"] for path in (folder, whole))
    assert states.keys() == expected.keys()
    for number, state in expected.items():
        assert all(torch.equal(states[number][name], tensor) for name, tensor in state.items()), number


_ARTICLES = {"step": "a step", "checkpoint": "a checkpoint", "evaluation": "an evaluation"}
MOMENTS = (None, "checkpoint", "evaluation")
"""Runs are killed in turn at any time, and at these moments."""


def kill_and_resume(data: Path, folder: Path, tower: str, processes: int, kills: int, rng: random.Random) -> Counter:
    """Kill runs of a tower ``kills`` times. Return how often they were doing what."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    run = Run(data, whole, tower, processes)
    run.wait()
    duration, seen, number = time.time() - run.start, Counter(), 0
    while seen.total() < kills:
        number += 1
        part = folder / str(number)
        part.mkdir()
        has_ended = False
        while not has_ended:
            run = Run(data, part, tower, processes)
            if seen.total() == kills:
                has_ended = run.wait()
                continue
            has_ended = run.wait(run.start + rng.uniform(0, duration))
            moment = MOMENTS[seen.total() % len(MOMENTS)]
            if not has_ended and moment is not None:
                has_ended = run.wait(for_moment=moment) or run.wait(time.time() + rng.uniform(0, 0.02))
            if not has_ended:
                seen[run.kill(rng.randrange(processes))] += 1
        check_equal(part, whole)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--towers", nargs="+", default=["vit", "siglip", "resnet"], choices=list(TOWERS))
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_data(data)
        runs = [(tower, processes) for tower in options.towers for processes in options.processes]
        for number, (tower, processes) in enumerate(runs):
            kills = options.kills // len(runs) + (number < options.kills % len(runs))
            seen = kill_and_resume(data, Path(folder) / f"{tower}-{processes}", tower, processes, kills, rng)
            counts = ", ".join(f"{seen[moment]} times in {article}" for moment, article in _ARTICLES.items())
            print(f"{tower}, {processes} {'process' if processes == 1 else 'processes'}: killed {counts}", flush=True)
    print(f"{options.kills} kills: losses, weights and optimizer states are bit-equal to those of uninterrupted runs.")


if __name__ == "__main__":
    main()
