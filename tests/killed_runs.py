"""Kill training runs at random moments and resume them: ``python -m tests.killed_runs --kills 20``.

Each tower trains once without interruption. Then runs are killed by SIGKILL, in turn at a random time and while they
write a checkpoint, and resumed from their last complete checkpoint, until the number of kills is reached. Losses of all
steps, weights and optimizer states must equal those of the uninterrupted run bit for bit.
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
from tests.interrupted_run import STEPS, build_trainer, write_data
from tests.small_models import TOWERS


class Run:
    """A child process that trains from the last complete checkpoint in ``folder``, or from the start.

    It is a copy of this process, which saves the time of all imports. This process has no threads, which a copy would
    lack.
    """

    def __init__(self, data: Path, folder: Path, tower: str) -> None:
        self.folder = folder
        self.start = time.time()
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            self._train(data, tower)

    def _train(self, data: Path, tower: str) -> None:
        status = 1
        try:
            torch.set_num_threads(1)
            resume = None
            with contextlib.suppress(ValueError):
                resume = last_complete_checkpoint(self.folder)
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                build_trainer(data, self.folder, tower=tower).train(resume_from_checkpoint=resume)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait(self, until: float = float("inf"), *, for_checkpoint: bool = False) -> bool:
        """Wait until the run has ended; return False at the time ``until``, or as soon as a checkpoint is written."""
        while time.time() < until:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                if status:
                    raise RuntimeError(f"the run in {self.folder} failed; its traceback is above.")
                return True
            if for_checkpoint and self.is_writing():
                return False
            time.sleep(0.001)
        return False

    def is_writing(self) -> bool:
        """Whether the run has begun a checkpoint and not ended it."""
        for begun in self.folder.glob("checkpoint-*/run_state.json"):
            with contextlib.suppress(FileNotFoundError):
                if begun.stat().st_mtime > self.start and not (begun.parent / "trainer_state.json").exists():
                    return True
        return False

    def kill(self) -> str:
        """Kill the run, and return what it was doing."""
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        return "checkpoint" if self.is_writing() else "step"


def losses(folder: Path) -> dict[int, dict]:
    """Losses by step. A step that was repeated has several lines, and the last of these counts."""
    lines = []
    for line in (folder / "losses.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # the process was killed while it wrote the line
            lines.append(json.loads(line))
    return {line["step"]: line for line in lines}


def check_equal(folder: Path, whole: Path) -> None:
    """Check that two runs have the same losses, weights and optimizer states."""
    assert set(losses(whole)) == set(range(1, STEPS + 1))
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


def kill_and_resume(data: Path, folder: Path, tower: str, kills: int, rng: random.Random) -> Counter:
    """Kill runs of a tower ``kills`` times. Return how often they were doing what."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    run = Run(data, whole, tower)
    run.wait()
    duration, seen, number = time.time() - run.start, Counter(), 0
    while seen.total() < kills:
        number += 1
        part = folder / str(number)
        part.mkdir()
        has_ended = False
        while not has_ended:
            run = Run(data, part, tower)
            if seen.total() == kills:
                has_ended = run.wait()
                continue
            has_ended = run.wait(run.start + rng.uniform(0, duration))
            if not has_ended and seen.total() % 2:
                has_ended = run.wait(for_checkpoint=True) or run.wait(time.time() + rng.uniform(0, 0.02))
            if not has_ended:
                seen[run.kill()] += 1
        check_equal(part, whole)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--towers", nargs="+", default=["vit", "siglip", "resnet"], choices=list(TOWERS))
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_data(data)
        for number, tower in enumerate(options.towers):
            kills = options.kills // len(options.towers) + (number < options.kills % len(options.towers))
            seen = kill_and_resume(data, Path(folder) / tower, tower, kills, rng)
            print(
                f"{tower}: killed {seen['step']} times in a step, {seen['checkpoint']} times in a checkpoint",
                flush=True,
            )
    print(f"{options.kills} kills: losses, weights and optimizer states are bit-equal to those of uninterrupted runs.")


if __name__ == "__main__":
    main()
