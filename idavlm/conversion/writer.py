"""Safetensors files written one tensor at a time: the library's own writer holds all tensors of a file at once."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_safetensors(path: Path, header: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write ``path``; it appears under its name when it is whole and on the disk, and not before.

    Args:
        path: the file.
        header: names with (meta) tensors of the shapes and types to come, in the order of ``tensors``.
        tensors: names and values; each is written before the next is asked for.
    """
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in header.items():
        start, end = end, end + size_of([tensor])
        entries[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(path.name + ".unfinished")
    expected = iter(header.items())
    with open(unfinished, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            promised_name, promised = next(expected)
            if (name, tensor.shape, tensor.dtype) != (promised_name, promised.shape, promised.dtype):
                raise AssertionError(f"{name} {tuple(tensor.shape)} comes in the place of {promised_name}")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
