"""Time, memory and multiplications of several functions, side by side in one run."""

import argparse
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def argument_parser(doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """How far results of two designs may lie apart before they are measured."""
    return dict.fromkeys(("atol", "rtol"), 1e-4 if dtype == torch.float32 else 3e-2)


def describe_machine(device: torch.device) -> str:
    """The processor, threads and versions that figures belong to."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if "model name" in line), platform.processor())
        name += f", {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def time_side_by_side(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median milliseconds of each function; the functions take turns, so that noise falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = _now(device)
            function()
            if round_:  # the first round warms up
                times[name].append(1000 * (_now(device) - start))
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large matrix product on random numbers."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    milliseconds = time_side_by_side({"matmul": lambda: a @ b}, device, rounds=9)["matmul"]
    return 2 * size**3 / milliseconds * 1000


def copy_rate(device: torch.device) -> float:
    """Bytes a second of one large copy, read and written counted."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    milliseconds = time_side_by_side({"copy": lambda: target.copy_(source)}, device, rounds=9)["copy"]
    return 2 * source.nbytes / milliseconds * 1000


def peak_megabytes(function: Callable[[], object], device: torch.device) -> float:
    """Most memory that tensors made inside ``function`` held at one time."""
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


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Left-aligned first column, right-aligned figures."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]

    def line(row: list[str]) -> str:
        first, *figures = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        aligned = [first.strip().ljust(widths[0]), *figures]
        return f"| {' | '.join(aligned)} |"

    rule = [("-" * (width - 1) + ":") if i else "-" * width for i, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operators return, for as long as they live."""

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in given:
                    self._enter(storage)
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)

        def leave() -> None:
            self.known.discard(key)
            self.current -= size

        weakref.finalize(storage, leave)
