"""Speed and memory of building tuning data: records of VCR with 640 x 480 JPEGs, which are made here.

    python -m benchmarks.data_build                                   # 20,000 records with one and with two workers
    python -m benchmarks.data_build --records 2000 --workers 1        # memory: compare with 20,000 records
    python -m benchmarks.data_build --records 20000 --kills 5         # killed and resumed: the same bytes

The annotations have three questions per frame, as VCR does on average. Each build runs in a process of its own. Memory
is the largest resident set of the parent and the largest of a worker, without the libraries that are loaded before the
build. Builds with two workers need two free cores.
"""

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.forked import run_forked
from idavlm.datasets.tuning import VCR, Splits, build_tuning_data
from idavlm.utils import describe_machine, markdown_table

SIZE = (640, 480)
QUESTIONS_PER_FRAME = 3
FRAMES_PER_FILM = 50
_DIFFERENT_IMAGES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000, help="lines of train.jsonl (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--kills", type=int, default=0, help="kill and resume a build this number of times")
    parser.add_argument("--folder", type=Path, help="folder for the data, which is kept; by default a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        annotations = folder / f"vcr_{arguments.records}"
        # In a process of its own: builds would use again what it has freed, which would not be measured.
        run_forked(partial(write_vcr, annotations, arguments.records))
        print(describe_machine())
        rows, digests = [], set()
        for workers in arguments.workers:
            out = folder / f"out_{arguments.records}_{workers}"
            shutil.rmtree(out, ignore_errors=True)
            seconds, parent, worker = measure(annotations, out, workers)
            digests.add(digest(out))
            rows.append(
                [workers, f"{seconds:.1f}", f"{arguments.records / seconds:.0f}", f"{parent:.0f}", f"{worker:.0f}"]
            )
        print(f"{arguments.records} records\n")
        print(markdown_table(["workers", "seconds", "records per second", "MB, parent", "MB, worker"], rows))
        if arguments.kills:
            out = folder / f"out_{arguments.records}_killed"
            shutil.rmtree(out, ignore_errors=True)
            kill_and_resume(annotations, out, arguments.kills, arguments.workers[-1])
            digests.add(digest(out))
            print(f"\nkilled {arguments.kills} times and resumed")
        print(f"\nall builds have the same bytes: {'yes' if len(digests) == 1 else 'NO'}")
        if len(digests) != 1:
            raise SystemExit(1)


def source(annotations: Path) -> VCR:
    return VCR(annotations, annotations / "vcr1images", splits=Splits(val=0.01, test=0.01))


def build(annotations: Path, out: Path, workers: int) -> None:
    build_tuning_data(source(annotations), out, workers=workers)


def measure(annotations: Path, out: Path, workers: int) -> tuple[float, float, float]:
    """Seconds, and MB that the parent and the largest worker need beyond what they begin with."""

    def run() -> tuple[float, float, float]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        build(annotations, out, workers)
        seconds = time.perf_counter() - start
        sizes = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        parent, worker = ((size - before) / 1024 for size in sizes)
        return seconds, parent, max(0.0, worker) if workers > 1 else 0.0

    return tuple(run_forked(run))


def kill_and_resume(annotations: Path, out: Path, kills: int, workers: int) -> None:
    """Kill a build with all its workers after a random number of parts, ``kills`` times, and then let it end."""
    rng = random.Random(0)
    total = -(-len(source(annotations)) // VCR.units_per_part)
    for kill in range(kills):
        target = max(1, int(total * (kill + rng.random()) / (kills + 1)))
        process = os.fork()
        if process == 0:
            try:
                build(annotations, out, workers)
            finally:
                os._exit(0)
        os.setpgid(process, process)  # the workers, which it forks later, belong to the group
        while len(list(out.glob("parts/0*.jsonl"))) < target:
            if os.waitpid(process, os.WNOHANG)[0]:
                raise SystemExit("the build ended before it was killed; pass more --records.")
            time.sleep(0.01)
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        time.sleep(0.2)  # for the workers
    build(annotations, out, workers)


def digest(folder: Path) -> str:
    """Hash of all files of a data set."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(path.relative_to(folder).as_posix().encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def write_vcr(folder: Path, count: int) -> None:
    """Write ``count`` lines of VCR and their frames, unless they are there."""
    if (folder / "train.jsonl").is_file():
        return
    images = [_image(seed) for seed in range(_DIFFERENT_IMAGES)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.part").open("w") as file:
        for number in range(count):
            frame = number // QUESTIONS_PER_FRAME
            film = f"lsmdc_{frame // FRAMES_PER_FILM:04d}_Film_{frame // FRAMES_PER_FILM}"
            name = f"{film}/{frame}@0.jpg"
            if number % QUESTIONS_PER_FRAME == 0:
                path = folder / "vcr1images" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(images[frame % _DIFFERENT_IMAGES])
                path.with_suffix(".json").write_text(json.dumps(_metadata(frame)))
            file.write(json.dumps(_line(number, film, name)) + "\n")
    (folder / "train.part").replace(folder / "train.jsonl")


def _image(seed: int) -> bytes:
    """A JPEG of a photograph's size and detail: smooth noise at several scales."""
    rng = np.random.default_rng(seed)
    total = np.zeros((SIZE[1], SIZE[0], 3))
    for cells, weight in ((8, 0.6), (40, 0.3), (160, 0.1)):
        noise = rng.integers(0, 255, (cells, cells * 4 // 3, 3), dtype=np.uint8)
        total += weight * np.asarray(Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC), dtype=float)
    stream = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _metadata(frame: int) -> dict:
    rng = random.Random(frame)
    people = [[60 + 190 * n + rng.randint(0, 30), 40, 220 + 190 * n + rng.randint(0, 30), 460, 0.99] for n in range(3)]
    return {"boxes": [*people, [300, 300, 360, 380, 0.9]], "segms": [], "width": SIZE[0], "height": SIZE[1]}


def _line(number: int, film: str, name: str) -> dict:
    first, second = random.Random(number).sample(range(3), 2)
    return {
        "movie": film,
        "objects": ["person", "person", "person", "cup"],
        "img_fn": name,
        "metadata_fn": name.replace(".jpg", ".json"),
        "question": ["Why", "does", [first], "look", "at", [second], "?"],
        "answer_choices": [
            [[second], "holds", [3], "."],
            [[first], "is", "tired", "of", "waiting", "."],
            [[first, second], "are", "friends", "."],
            ["They", "hear", "a", "noise", "."],
        ],
        "rationale_choices": [
            [[second], "has", [3], "in", "the", "hand", "."],
            ["No", "."],
            ["Yes", "."],
            ["Maybe", "."],
        ],
        "answer_label": 0,
        "rationale_label": 0,
        "annot_id": f"train-{number}",
    }


if __name__ == "__main__":
    main()
