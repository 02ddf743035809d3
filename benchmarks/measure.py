"""Measurements that the benchmarks share: time and memory of functions, and rates of the machine."""

import argparse
import statistics
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of the matrix product that stands for the speed of the machine."""


def argument_parser(doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")
    dtype = {"type": lambda name: getattr(torch, name), "default": torch.float32}
    parser.add_argument("--dtype", **dtype, help="for example bfloat16 (default: float32)")
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements per function (default: %(default)s)")
    return parser


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Tolerances for the check that two implementations compute the same before they are measured."""
    return dict.fromkeys(("atol", "rtol"), 1e-4 if dtype == torch.float32 else 3e-2)


def time_side_by_side(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median milliseconds of each function. The functions take turns, so that noise affects all of them equally.

    With one thread on a CPU these are milliseconds of processor time, which other programs do not lengthen.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = _now(device)
            function()
            if round_:  # the first round is a warm-up
                times[name].append(1000 * (_now(device) - start))
    return {name: statistics.median(values) for name, values in times.items()}


def large_matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A function that computes one large matrix product, and its floating-point operations."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large matrix product."""
    matmul, operations = large_matmul(device, dtype)
    return operations / time_side_by_side({"matmul": matmul}, device, rounds=9)["matmul"] * 1000


def copy_rate(device: torch.device) -> float:
    """Bytes per second of one large copy; bytes read and bytes written both count."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    milliseconds = time_side_by_side({"copy": lambda: target.copy_(source)}, device, rounds=9)["copy"]
    return 2 * source.nbytes / milliseconds * 1000


def peak_megabytes(function: Callable[[], object], device: torch.device) -> float:
    """Peak memory of the tensors that ``function`` creates, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with _LiveStorages() as live:
        function()
    return live.peak / 2**20


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


class _LiveStorages(TorchDispatchMode):
    """Tracks the bytes of storages that operators allocate, until the storages are freed."""

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self.tracked: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.tracked and storage._cdata not in inputs:
                    self._enter(storage)
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.tracked.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)

        def leave() -> None:
            self.tracked.discard(key)
            self.current -= size

        weakref.finalize(storage, leave)
