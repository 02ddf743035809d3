"""A one-line description of the machine, for reports and benchmarks."""

import os
import platform
from pathlib import Path

import torch


def describe_machine(device: torch.device | None = None) -> str:
    """Describe the processor or GPU (default: the GPU if there is one), and the versions of torch and Python."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {versions}"
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {threads}; {versions}"
