"""Processor seconds and memory of `idavlm data validate`: records of two identities and a scene, which are made here.

    python -m benchmarks.data_validation --no-crops             # 2,000 and 20,000 records
    python -m benchmarks.data_validation --records 2000         # references are searched for in the scenes

Each record has three images of its own of 96 x 72 pixels: a photo of each identity, and a scene with their boxes.
Memory is the largest resident set beyond the libraries that are loaded before. Each size runs in a process of its own,
with one worker, so that the seconds and the memory are those of this process.
"""

import argparse
import json
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.forked import run_forked
from idavlm.data.validation import RecordSource, validate_records
from idavlm.utils import describe_machine, markdown_table

SIZE = (96, 72)
_CELLS = (32, 24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[2000, 20_000], help="numbers of records")
    parser.add_argument("--no-crops", action="store_true", help="do not search for references in the scenes")
    arguments = parser.parse_args()
    print(describe_machine())
    rows = []
    for count in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            run_forked(partial(write_records, Path(folder), count))  # its memory is not that of the validation
            seconds, megabytes, images = run_forked(partial(measure, Path(folder), count, not arguments.no_crops))
            rows.append([count, images, f"{seconds:.1f}", f"{1000 * seconds / count:.1f}", f"{megabytes:.1f}"])
            print(*rows[-1], sep="\t", flush=True)
    print(markdown_table(["records", "images", "processor seconds", "ms per record", "MB"], rows))


def measure(folder: Path, count: int, crops: bool) -> tuple[float, float, int]:
    """Validate the records of a folder."""
    before, start = _peak(), time.process_time()
    report = validate_records([RecordSource(str(folder / "train.jsonl"))], crops=crops, num_workers=1)
    seconds = time.process_time() - start
    assert not report.counts, report.describe()
    assert sum(report.files.values()) == count
    return seconds, _peak() - before, report.num_images


def write_records(folder: Path, count: int) -> None:
    """Write records without faults, and their images."""
    rng = np.random.default_rng(0)
    with (folder / "train.jsonl").open("w") as file:
        for number in range(count):
            place = f"{number // 500}"
            (folder / "images" / place).mkdir(parents=True, exist_ok=True)
            kate, tom, scene = (f"{place}/{number}_{name}.jpg" for name in ("kate", "tom", "scene"))
            for path in (kate, tom, scene):
                noise = rng.integers(0, 255, (*_CELLS[::-1], 3), dtype=np.uint8)
                Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC).save(folder / "images" / path)
            file.write(json.dumps(_record(number, kate, tom, scene)) + "\n")


def _record(number: int, kate: str, tom: str, scene: str) -> dict:
    return {
        "id": str(number),
        "identities": [{"name": "Kate", "images": [kate]}, {"name": "Tom", "images": [tom]}],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": scene}, {"type": "text", "text": "\nWhere is Kate?"}],
            },
            {"role": "assistant", "content": [{"type": "box", "name": "Kate"}]},
            {"role": "user", "content": "What is Tom doing?"},
            {"role": "assistant", "content": "Tom is reading."},
        ],
        "boxes": [
            {"name": "Kate", "image": scene, "box": [12, 15, 42, 60]},
            {"name": "Tom", "image": scene, "box": [54, 18, 84, 66]},
        ],
        "meta": {"people": {"Kate": f"{number} kate", "Tom": f"{number} tom"}},
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
