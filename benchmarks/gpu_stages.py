"""The stages of ``python -m benchmarks.gpu``. Each takes a ``Report``, and stops at its deadline.

A stage starts without CUDA, so that it can fork.
"""

import argparse
import importlib.util
import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from benchmarks import cross_attention, id_former, measure, tile_search
from benchmarks.measure import copy_rate, matmul_rate
from idavlm.datasets import build_characters
from idavlm.ops.cross_attention.triton.tiling import KERNELS, Tiling, guessed_tiling, padded_width, save_tilings
from idavlm.utils import describe_machine

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).parent.parent
TESTS = "tests/test_triton_attention.py"
WIDTHS = (64, 128)  # of the heads of models


def device_of(report) -> torch.device:
    if not report.dry_run and not torch.cuda.is_available():
        raise RuntimeError("no CUDA GPU is available; pass --dry-run to try the stages on a CPU")
    return torch.device("cpu" if report.dry_run else "cuda")


# --- Correctness ---


def correctness(report) -> None:
    """The tests of the kernels, compiled, in several processes, and the errors relative to SDPA."""
    workers = 1 if report.dry_run else min(12, os.cpu_count())
    outcomes = FORK.Queue()
    processes = [
        FORK.Process(target=_run_tests, args=(worker, workers, report.deadline - 5, report.dry_run, outcomes))
        for worker in range(workers)
    ]
    for process in processes:
        process.start()
    counts, running, finished = defaultdict(Counter), {}, 0
    while finished < workers:
        try:
            worker, test, outcome, text = outcomes.get(timeout=1)
        except multiprocessing.queues.Empty:
            dead = [worker for worker, process in enumerate(processes) if process.exitcode not in (None, 0)]
            if dead and finished + len(dead) >= workers:
                break
            continue
        if test is None:
            finished += 1
        elif outcome == "started":
            running[worker] = test
        else:
            running.pop(worker, None)
            counts[test.partition("[")[0].rpartition("::")[2]][outcome] += 1
            if outcome == "failed":
                report.failure(f"{test}: {text}")
    for worker, process in enumerate(processes):
        process.join()
        if process.exitcode:
            report.failure(f"process {worker} ended with exit code {process.exitcode} in {running.get(worker)}")
    columns = ("passed", "failed", "not run: no time", "skipped")
    rows = [[test, *(count[column] for column in columns)] for test, count in sorted(counts.items())]
    report.table("Tests of the kernels (test_random_cases: 17 cases each)", ["test", *columns], rows)
    if not any(count["passed"] for count in counts.values()):
        report.failure("no test passed")
    _errors(report)


class _Selection:
    """A plugin of pytest: every N-th test, the widths of heads first, until the deadline; outcomes go to a queue."""

    def __init__(self, worker: int, workers: int, deadline: float, outcomes):
        self.worker, self.workers, self.deadline, self.outcomes = worker, workers, deadline, outcomes

    def pytest_collection_modifyitems(self, items: list) -> None:
        items.sort(key=lambda item: "head_dims" not in item.nodeid)
        items[:] = items[self.worker :: self.workers]

    def pytest_runtest_setup(self, item) -> None:
        if time.monotonic() > self.deadline:
            pytest.skip("no time")
        self.outcomes.put((self.worker, item.nodeid, "started", ""))

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome = "not run: no time" if "no time" in str(report.longrepr) and report.skipped else report.outcome
            self.outcomes.put((self.worker, report.nodeid, outcome, str(report.longrepr or "")[-1500:]))


def _run_tests(worker: int, workers: int, deadline: float, dry_run: bool, outcomes) -> None:
    arguments = ["-p", "no:cacheprovider", str(ROOT / TESTS)]
    if dry_run:
        arguments += ["-k", "head_dims and 32 and dtype0"]
    pytest.main(arguments, plugins=[_Selection(worker, workers, deadline, outcomes)])
    outcomes.put((worker, None, "", ""))
    outcomes.close()
    outcomes.join_thread()
    os._exit(0)


def _errors(report) -> None:
    """Errors of the kernels against float64, relative to those of SDPA in the same dtype; the bound is 1.5."""
    device_of(report)
    from tests import test_triton_attention as tests

    rows = []
    for width in (32,) if report.dry_run else (32, 64, 80, 128, 256):
        for dtype in tests.HALVES:
            if report.seconds_left() < 1 and not report.dry_run:
                break
            lengths = ([9, 7], [19, 5]) if report.dry_run else ([150, 70], [190, 333])
            inputs, options = tests.case(*lengths, dim=width, dtype=dtype, bias=60)
            kernels, sdpa = tests.squared_errors(inputs, options).sqrt()
            rows.append([width, str(dtype), *(f"{ratio:.2f}" for ratio in (kernels / sdpa).tolist())])
    header = ["head width", "dtype", "output", "grad of q", "of k", "of v", "of key_bias"]
    report.table("Error against float64, relative to that of SDPA", header, rows)


# --- Speed ---


def _sizes(report, head_dim: int) -> argparse.Namespace:
    """Sizes of the batches of ``benchmarks/cross_attention.py``, with a hidden size of 4096."""
    device = device_of(report)
    if report.dry_run:
        sizes = {"samples": 1, "queries": 4, "patches": 9, "num_heads": 1, "head_dim": 16}
    else:
        sizes = {"samples": 8, "queries": 256, "patches": 1024, "num_heads": 4096 // head_dim, "head_dim": head_dim}
    return argparse.Namespace(**sizes, device=device, dtype=_dtype(report), rounds=1 if report.dry_run else 10)


def _dtype(report) -> torch.dtype:
    return torch.float32 if report.dry_run else torch.bfloat16


def speed(report) -> None:
    """Cross-attention against every other implementation, and the whole IDFormer against the released computation."""
    if report.dry_run:
        measure.MATMUL_SIZE["cpu"] = 64
    args = _sizes(report, 128)
    torch.manual_seed(0)
    rates = matmul_rate(args.device, args.dtype), copy_rate(args.device)
    report.note(
        f"{describe_machine(args.device)}; {args.dtype}; matrix product {rates[0] / 1e12:.3g} TFLOP/s, copy "
        f"{rates[1] / 1e9:.3g} GB/s"
    )
    best = []
    for case in ("recognise",) if report.dry_run else ("pool", "recognise", "long", "small"):
        if report.seconds_left() < 5 and not report.dry_run:
            report.note(f"{case}: not measured, no time left")
            continue
        rows = cross_attention.measure_case(case, args, rates)
        report.table(f"Cross-attention, {case}; heads of {args.head_dim}", cross_attention.HEADER, rows)
        best += [[*row[:3], row[3]] for row in rows if row[1] == "triton"]
    report.table("Kernels against the fastest other", ["case", "backend", "ms", "ratio"], best)
    for sizes, patches in ((id_former.SMALL, 256), (id_former.RELEASED, 1024)):
        if report.dry_run:
            sizes, patches = {"hidden_size": 16, "num_heads": 1, "num_queries": 4, "vision_hidden_size": 12}, 9
        for implementation in ("triton", "sdpa"):
            if report.seconds_left() < 5 and not report.dry_run:
                report.note(f"IDFormer, {implementation}: not measured, no time left")
                continue
            args.attn_implementation = implementation
            samples = [(1, 1)] if report.dry_run else id_former.ragged(4)
            rows = id_former.measure_case(f"C {sizes['hidden_size']}", sizes, patches, samples, args)
            report.table(f"IDFormer with {implementation}", id_former.HEADER, rows)
        if report.dry_run:
            break


def speed_with_measured_tiles(report) -> None:
    """The same with the tiles that the stage before wrote."""
    file = report.folder / "tiles.json"
    if not file.exists():
        report.note("no tiles were measured")
        return
    if report.dry_run:
        measure.MATMUL_SIZE["cpu"] = 64
    os.environ["IDAVLM_ATTENTION_TILES"] = str(file)
    args = _sizes(report, 128)
    rates = matmul_rate(args.device, args.dtype), copy_rate(args.device)
    for case in ("small",) if report.dry_run else ("recognise", "pool", "long", "small"):
        if report.seconds_left() < 3 and not report.dry_run:
            report.note(f"{case}: not measured, no time left")
            continue
        rows = cross_attention.measure_case(case, args, rates)
        report.table(f"Cross-attention, {case}", cross_attention.HEADER, rows)


# --- Tiles ---


def _candidates_that_run(report, width: int) -> tuple[Tiling, list[tuple[str, Tiling]], Counter]:
    """Compile and check the candidates in several processes, then measure those that run, one after the other."""
    workers = 1 if report.dry_run else min(12, os.cpu_count())
    capability, itemsize = (8, 0), 4
    todo = []
    with FORK.Pool(workers, initializer=_make_problems, initargs=(_forked_sizes(report, width),)) as pool:
        if not report.dry_run:  # asked in a process of the pool, because this one has to stay without CUDA
            capability, itemsize = pool.apply(torch.cuda.get_device_capability), 2
        start = guessed_tiling(capability, itemsize, padded_width(width))
        candidates = list(tile_search.candidates(start))
        if report.dry_run:  # the guess of each kernel, and one other tile
            other = start._replace(bwd_dkdv=tile_search.Tile(*tile_search.CANDIDATES["bwd_dkdv"][0]))
            candidates = [*dict.fromkeys([*((kernel, start) for kernel in KERNELS), ("bwd_dkdv", other)])]
        skipped = Counter()
        results = pool.imap(_reason_to_skip, candidates)
        for candidate in candidates:
            left = max(0.1, report.seconds_left() - 15) if not report.dry_run else None
            try:
                reason = results.next(timeout=left)
            except multiprocessing.TimeoutError:
                report.note(f"heads of {width}: no time left for candidates after {len(todo) + skipped.total()}")
                pool.terminate()
                break
            if reason is None:
                todo.append(candidate)
            else:
                skipped[f"{candidate[0]}: {reason}"] += 1
    return start, todo, skipped


def _forked_sizes(report, width: int) -> argparse.Namespace:
    sizes = {"samples": 4, "queries": 256, "patches": 1024, "num_heads": 4096 // width, "head_dim": width}
    if report.dry_run:
        sizes = {"samples": 1, "queries": 4, "patches": 9, "num_heads": 1, "head_dim": 16}
    device = torch.device("cpu" if report.dry_run else "cuda")
    return argparse.Namespace(**sizes, device=device, dtype=_dtype(report))


_problems: list = []


def _make_problems(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _problems[:] = [cross_attention.make_problem(case, args) for case in ("pool", "recognise")]


def _reason_to_skip(candidate) -> str | None:
    try:
        return tile_search.reason_to_skip(*candidate, _problems)
    except Exception as error:  # this tile is not used, and the others are tried
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error)[:100]}"


def tiles(report) -> None:
    tilings = {}
    checked = {width: _candidates_that_run(report, width) for width in (WIDTHS[:1] if report.dry_run else WIDTHS)}
    device = device_of(report)
    name = "interpreter" if report.dry_run else torch.cuda.get_device_name(device)
    for position, (width, (start, todo, skipped)) in enumerate(checked.items()):
        _make_problems(_forked_sizes(report, width))
        deadline = time.monotonic() + report.seconds_left() / (len(checked) - position)
        if report.dry_run:
            todo, deadline = todo[:2], float("inf")
        rounds = 1 if report.dry_run else 7
        best, records = tile_search.fastest_tiling(start, todo, _problems, rounds, deadline)
        tilings[name, _problems[0].q.element_size(), padded_width(width)] = best
        save_tilings(report.folder / "tiles.json", tilings)
        report.data(f"heads of {width}", {"measurements": records, "not used": skipped})
        rows = []
        for kernel in KERNELS:
            times = {tuple(record["tile"]): record["ms"] for record in records if record["kernel"] == kernel}
            guess, tile = times.get(getattr(start, kernel)), getattr(best, kernel)
            fastest = times.get(tile)
            ratio = f"{guess / fastest:.2f}x" if guess and fastest else ""
            rows.append([kernel, len(times), tuple(getattr(start, kernel)), guess, tuple(tile), fastest, ratio])
        ways = {record["fuse_dq"]: record["ms"] for record in records if record["kernel"] == "backward"}
        rows.append(["backward", 2, "fused", ways[True], "separate", ways[False], f"{ways[True] / ways[False]:.2f}x"])
        header = ["kernel", "measured", "guess", "its ms", "fastest", "its ms", "speed-up"]
        report.table(f"Tiles (queries, keys, warps, stages) for heads of {width}", header, _rounded(rows))
        report.note(f"{name}, {padded_width(width)}: `{best}`")


def _rounded(rows: list[list[object]]) -> list[list[object]]:
    return [
        [f"{cell:.3f}" if isinstance(cell, float) else "" if cell is None else cell for cell in row] for row in rows
    ]


# --- Training ---


def training(report) -> None:
    """Loss curves of examples/train_idformer.py in bfloat16: SDPA twice, which shows the variance, and the kernels."""
    device = device_of(report)
    spec = importlib.util.spec_from_file_location("train_idformer", ROOT / "examples" / "train_idformer.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sizes = {"num_test": 5, "num_test_scenes": 4, "num_general": 4, "num_general_records": 4, "num_test_records": 2}
    if report.dry_run:
        sizes |= {"num_train": 5, "num_train_scenes": 4, "num_train_records": 8}
        example.BATCH_SIZE, steps = 1, 1
    else:
        sizes |= {"num_train": 200, "num_train_scenes": 200, "num_train_records": 1600}
        steps = 200
    data = build_characters(report.folder / "data", **sizes)
    curves: dict[str, list[float]] = {}
    for run, implementation in {"sdpa": "sdpa", "triton": "triton", "sdpa again": "sdpa"}.items():
        if report.dry_run and run == "sdpa again":
            continue
        if report.seconds_left() < 3 and not report.dry_run:
            report.note(f"{run}: not run, no time left")
            continue
        start = time.monotonic()
        log = example.pretrain_identities(
            data,
            report.folder / "checkpoints" / run.replace(" ", "-"),
            seed=0,
            steps=steps,
            attn_implementation=implementation,
            bf16=not report.dry_run,
        )
        curves[run] = [entry["loss"] for entry in log if "loss" in entry] or [
            entry["train_loss"] for entry in log if "train_loss" in entry
        ]
        report.note(f"{run}: {steps} steps on {device} in {time.monotonic() - start:.0f} s, with data and features")
    first = curves["sdpa"]
    rows = [
        [number, *(f"{loss:.4f}" for loss in losses)]
        for number, losses in enumerate(zip(*curves.values(), strict=True), 1)
    ]
    distances = [statistics.mean(abs(a - b) for a, b in zip(first, curve, strict=True)) for curve in curves.values()]
    rows.append(["mean distance to the first", *(f"{distance:.4f}" for distance in distances)])
    report.table("Losses (every 20 steps)", ["", *curves], rows)
    if not all(loss == loss and loss < float("inf") for curve in curves.values() for loss in curve):
        report.failure("a loss is not finite")


# --- Memory accesses ---


def memory_accesses(report) -> None:
    """The smallest tests under compute-sanitizer, which is part of the CUDA toolkit."""
    tests = "not_repeated" if report.dry_run else "(head_dims and 32) or leak or shared_queries"
    arguments = ["-p", "no:cacheprovider", str(ROOT / TESTS), "-k", tests]
    if report.dry_run:  # in this process, which has imported everything
        with redirect_stdout(io.StringIO()) as stream:
            exit_code = int(pytest.main(arguments))
        output = stream.getvalue()
    else:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(tool).exists():
            report.note("compute-sanitizer is not installed (it is part of the CUDA toolkit); not run")
            return
        command = [tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *arguments]
        limit = max(report.seconds_left(), 60)
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit)
        except subprocess.TimeoutExpired:
            report.note(f"no time left: {' '.join(command)}")
            return
        exit_code, output = done.returncode, done.stdout + done.stderr
    print(output)
    summary = [line for line in output.splitlines() if "ERROR SUMMARY" in line or " passed" in line]
    report.note("; ".join(summary) or "no summary, see the log")
    if exit_code:
        report.failure(f"exit code {exit_code}: {output[-1500:]}")
