"""Everything that a few minutes on a GPU can tell about the attention kernels, the most important first.

    python -m benchmarks.gpu --minutes 8 --out runs/gpu
    python -m benchmarks.gpu --dry-run --out runs/gpu     # on a CPU: all stages at tiny sizes, kernels interpreted

Stages: correctness, speed, tiles, training, memory accesses, and speed again with the measured tiles
(``benchmarks/gpu_stages.py``). Each runs in a process of its own and gets a share of the time that is left. It is
printed, and written as Markdown, JSON and a log, as soon as it ends. If it fails, hangs or crashes, what it has
found is kept and the next stage starts. ``report.md`` has all stages. The exit code is 1 if a stage failed.

It needs the repository, torch 2.11, triton 3.6, transformers 5.17, pytest and hypothesis.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from idavlm.utils.markdown import markdown_table

# A forked process imports nothing again. Only the stages use the GPU, never this process.
FORK = multiprocessing.get_context("fork")

# Weights of the stages: a stage gets its share of the time that is left when it starts.
STAGES = {
    "correctness": 36,
    "speed": 24,
    "tiles": 20,
    "training": 10,
    "memory_accesses": 5,
    "speed_with_measured_tiles": 5,
}


class Report:
    """What a stage has found. Every addition is written to its JSON file at once."""

    def __init__(self, name: str, folder: Path, seconds: float, dry_run: bool):
        self.folder, self.dry_run = folder, dry_run
        self.path = folder / f"{name}.json"
        self.deadline = time.monotonic() + seconds
        self.content = {"stage": name, "status": "not finished", "failures": [], "parts": []}
        self._write()

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, text: str) -> None:
        self._add({"note": text})

    def failure(self, text: str) -> None:
        """Something is wrong with the kernels or with the stage. The stage goes on."""
        self.content["failures"].append(text)
        self._write()

    def table(self, title: str, header: list[str], rows: list[list[object]]) -> None:
        self._add({"title": title, "header": header, "rows": rows})

    def data(self, name: str, value: object) -> None:
        """Figures for the JSON file only."""
        self._add({"name": name, "data": value})

    def finish(self, status: str) -> None:
        self.content["status"] = status
        self._write()

    def _add(self, part: dict) -> None:
        self.content["parts"].append(part)
        self._write()

    def _write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1))


def as_markdown(content: dict) -> str:
    """The report of a stage."""
    lines = [f"## {content['stage']}: {content['status']} after {content['seconds']:.0f} s"]
    lines += [f"**Failed:** {failure}" for failure in content["failures"]]
    for part in content["parts"]:
        if "rows" in part:
            lines.append(f"{part['title']}\n\n{markdown_table(part['header'], part['rows'])}")
        elif "note" in part:
            lines.append(part["note"])
    return "\n\n".join(lines) + "\n"


def run_stage(name: str, seconds: float, args: argparse.Namespace) -> dict:
    """Run a stage in a process of its own, and return the content of its JSON file."""
    report = Report(name, args.out, seconds, args.dry_run)
    start = time.monotonic()
    process = FORK.Process(target=_run_in_child, args=(name, report))
    process.start()
    # A stage ends by itself at its deadline. One that hangs is stopped a little later.
    process.join(seconds + (60 if args.dry_run else min(20, 0.2 * seconds)))
    hung = process.is_alive()
    if hung:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    content = json.loads(report.path.read_text())
    if hung:
        content["failures"].append("stopped, because it did not end in time")
    elif process.exitcode:
        content["failures"].append(f"the process ended with exit code {process.exitcode}; see {name}.log")
    if content["failures"]:
        content["status"] = "failed"
    content["seconds"] = time.monotonic() - start
    report.path.write_text(json.dumps(content, indent=1))
    return content


def _run_in_child(name: str, report: Report) -> None:
    os.setsid()  # so that the stage and what it starts can be stopped together
    log = (report.folder / f"{name}.log").open("w", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    from benchmarks import gpu_stages

    try:
        getattr(gpu_stages, name)(report)
    except Exception as error:
        traceback.print_exc()
        report.failure(f"{type(error).__name__}: {error}"[:2000])
        report.finish("failed")
        return
    report.finish("done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="time for all stages (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="folder of the reports (default: %(default)s)"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, interpreted on a CPU; for tests")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set, but this program compiles kernels; unset it, or pass --dry-run.")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    os.chdir(Path(__file__).parent.parent)
    import benchmarks.gpu_stages  # noqa: F401  (imported once; the stages are forks of this process)

    if args.dry_run:  # once for all stages; on a GPU these imports ask whether there is one, after which none can fork
        import hypothesis  # noqa: F401

        import idavlm.training  # noqa: F401
        import tests.conftest  # noqa: F401

    contents = []
    for position, name in enumerate(args.stages):
        weights = [STAGES[stage] for stage in args.stages[position:]]
        seconds = max(0.0, deadline - time.monotonic()) * weights[0] / sum(weights)
        if seconds < 2 and not args.dry_run:
            contents.append(
                {"stage": name, "status": "not run, no time left", "failures": [], "parts": [], "seconds": 0}
            )
        else:
            contents.append(run_stage(name, seconds, args))
        text = as_markdown(contents[-1])
        print(text, flush=True)
        (args.out / f"{name}.md").write_text(text)
        command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
        (args.out / "report.md").write_text(f"# {command}\n\n" + "\n".join(map(as_markdown, contents)))
    sys.exit(any(content["failures"] for content in contents))


if __name__ == "__main__":
    main()
