"""All models, kinds of batches and ways of distributed training: ``python -m tests.distributed``.

Two processes on the CPU. ``--write`` writes the table of docs/howto/distributed.md. A case that fails ends
the program with an error.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from idavlm.utils import describe_machine, markdown_table
from tests.distributed import cases
from tests.distributed.compare import differences, fault
from tests.distributed.launch import ROOT, Case, run_cases
from tests.distributed.runs import STRATEGIES

PAGE = ROOT / "docs" / "howto" / "distributed.md"
BEGIN, END = "<!-- table of make test-distributed -->\n", "<!-- end of the table -->\n"


def table(results: dict[Case, dict], strategies: list[str], pairs: list[tuple[str, str]]) -> str:
    rows = []
    for pair in pairs:
        expected, cells = results[("one process", *pair)], []
        for strategy in strategies:
            found = results[(strategy, *pair)]
            wrong = fault(strategy, found, expected)
            cells.append("fails" if wrong else f"{differences(found, expected)['losses']:.0e}")
        rows.append([*pair, *cells])
    return markdown_table(["model", "batches", *strategies], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES[1:]), choices=STRATEGIES[1:])
    parser.add_argument("--models", nargs="+", default=[*cases.MODELS, *cases.MORE_MODELS])
    parser.add_argument("--kinds", nargs="+", default=list(cases.KINDS), choices=list(cases.KINDS))
    parser.add_argument("--write", action="store_true", help=f"write the table to {PAGE.relative_to(ROOT)}")
    parser.add_argument("--folder", type=Path, help="keep results and logs here")
    options = parser.parse_args()
    pairs = [
        (name, kind)
        for name in options.models
        for kind in options.kinds
        if name in cases.MODELS or kind == "mixed"  # the other models with batches that differ between the processes
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cases.draw(folder / "images")
        start, faults = time.time(), []
        results = run_cases(folder, [("one process", *pair) for pair in pairs], processes=1)
        chosen = [(strategy, *pair) for strategy in options.strategies for pair in pairs]
        results |= run_cases(folder, chosen)
        print(f"{len(results)} runs, {time.time() - start:.0f} s", flush=True)
        for case in chosen:
            wrong = fault(case[0], results[case], results[("one process", *case[1:])])
            if wrong:
                faults.append(f"{', '.join(case)}: {wrong}")
                print(faults[-1], flush=True)
        text = table(results, options.strategies, pairs)
        print(text)
    if options.write:
        page = PAGE.read_text()
        before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
        PAGE.write_text(f"{before}\n{text}\n\nMeasured by `make test-distributed` on {describe_machine()}.\n\n{after}")
    if faults:
        sys.exit(f"{len(faults)} of {len(pairs) * len(options.strategies)} cases failed.")


if __name__ == "__main__":
    main()
