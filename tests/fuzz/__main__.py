"""Run fuzz tests by number of inputs, and print how often each outcome occurred.

    python -m tests.fuzz --records 30000 --configs 2500 --predictions 5000

An outcome is "works" or the error that the documentation names. Any other exception ends the run of its kind with a
traceback and the seed.
"""

import argparse
import time

import torch

from tests.fuzz import test_convert, test_evaluation_files, test_images, test_parsers, test_records, test_text

RUNS = {
    "records": test_records.run,
    "configs": test_convert.run,
    "predictions": test_evaluation_files.run,
    "images": test_images.run,
    "parsers": test_parsers.run,
    "texts": test_text.run,
}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in RUNS:
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N", help="number of inputs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, run in RUNS.items():
        count = getattr(arguments, name)
        if count:
            start = time.perf_counter()
            outcomes = run(count, arguments.seed)
            print(f"{name}: {count} inputs in {time.perf_counter() - start:.0f} s")
            for outcome, number in outcomes.most_common():
                print(f"  {number:7d}  {outcome}")


if __name__ == "__main__":
    main()
