"""Weight files of a checkpoint: read safetensors and pickles, write safetensors; one tensor at a time in memory."""

import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from idavlm.conversion.config_files import is_there, read_json
from idavlm.conversion.errors import ConversionError, errors_of, listed, shown
from idavlm.utils import first_line

WHOLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = tuple(f"{name}.index.json" for name in WHOLE)
SAFETENSORS_TYPES = {
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


@dataclass(frozen=True)
class WeightFile:
    """A file of weights.

    Attributes:
        path: a ``.safetensors`` file, or a ``.bin`` file of ``torch.save`` that contains tensors only.
        add_prefix: prefix that is added to every name, to distinguish files of different folders.
        remove_prefix: prefix that is removed from the names that start with it, before ``add_prefix`` is added.
        exclude: names that contain this text are skipped.
        overrides: whether its tensors replace tensors of other files that map to the same name.
        unties: whether embeddings in it do not replace a head that was tied to the embeddings.
    """

    path: Path
    add_prefix: str = ""
    remove_prefix: str = ""
    exclude: str | None = None
    overrides: bool = False
    unties: bool = False

    @contextmanager
    def open(self) -> Iterator[dict[str, Callable[[], Tensor]]]:
        """Mapping of names to functions that read the tensor from disk."""
        if self.path.suffix == ".safetensors":
            with self._safetensors_errors():
                opened = safe_open(self.path, framework="pt")

            def read(name: str) -> Tensor:
                with self._safetensors_errors():
                    return opened.get_tensor(name)

            with opened:
                yield self._renamed(opened.keys(), read)
        else:
            tensors = load_pickle(self.path)
            yield self._renamed(tensors, tensors.__getitem__)

    def header(self) -> dict[str, Tensor]:
        """Names with tensors on device ``meta``, which have shape and type only.

        Raises:
            ConversionError: the file is damaged, or has a tensor of a type that is not supported.
        """
        header = {}
        with self.open() as tensors:
            for name, read in tensors.items():
                tensor = read()
                if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in SAFETENSORS_TYPES:
                    kind = str(tensor.layout if tensor.layout != torch.strided else tensor.dtype)
                    raise ConversionError(
                        f"{self.path}: {name} is a tensor of type {kind}; expected one of "
                        f"{', '.join(str(dtype).removeprefix('torch.') for dtype in SAFETENSORS_TYPES)}."
                    )
                header[name] = torch.empty_like(tensor, device="meta")
        return header

    def _safetensors_errors(self) -> AbstractContextManager[None]:
        problem = "is not a complete safetensors file; it may be truncated"
        return errors_of(self.path, problem, "Download it again.")

    def _renamed(self, names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, Callable[[], Tensor]]:
        kept = (name for name in names if self.exclude is None or self.exclude not in name)
        return {self.add_prefix + name.removeprefix(self.remove_prefix): partial(read, name) for name in kept}


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a ``torch.save`` file with ``weights_only=True``.

    Raises:
        ConversionError: the file is truncated or contains anything but tensors.
    """
    try:
        with open(path, "rb") as opened:
            zipped = opened.read(4) == b"PK\x03\x04"
        # Files written before torch 1.6 cannot be memory-mapped; they are read completely.
        loaded = torch.load(path, mmap=zipped, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} is refused because it contains more than tensors (weights_only=True: {first_line(error)}). "
            "A pickle can run code; obtain the weights as safetensors from a trusted source."
        ) from error
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror or first_line(error)}).") from error
    except Exception as error:  # damaged files raise errors of many kinds
        raise ConversionError(
            f"{path} is not a complete file of torch.save ({first_line(error)}); it may be truncated. Download it "
            "again."
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise ConversionError(f"{path}: expected names and tensors, found {type(loaded).__name__}.")
    other = [str(name) for name, value in loaded.items() if not torch.is_tensor(value)]
    if other:
        raise ConversionError(f"{path}: expected names and tensors, found {listed(other)}.")
    return dict(loaded)


@dataclass
class SourceCheckpoint:
    """Configuration and headers of a checkpoint; no tensor has been read.

    Attributes:
        folder: folder of the checkpoint.
        config: contents of ``config_path``.
        vision_tower, tokenizer: folders of parts that the checkpoint may lack; None: search next to the checkpoint.
        files: weight files.
        headers: :meth:`WeightFile.header` of each file.
        config_path: its ``config.json``, or that of the adapter.
    """

    folder: Path
    config: dict[str, Any]
    vision_tower: Path | None = None
    tokenizer: Path | None = None
    files: list[WeightFile] = field(default_factory=list)
    headers: list[dict[str, Tensor]] = field(default_factory=list)
    config_path: Path = Path()

    def __post_init__(self):
        self.config_path = self.folder / "config.json"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All names with ``meta`` tensors."""
        return {name: tensor for header in self.headers for name, tensor in header.items()}

    def add(self, files: list[WeightFile]) -> None:
        """Add further files, for example of a vision tower or an adapter."""
        for file in files:
            header = file.header()
            repeated = set() if file.overrides else header.keys() & self.tensors.keys()
            if repeated:
                raise ConversionError(
                    f"{file.path}: contains {listed(repeated)}, which another file contains as well; remove one "
                    "of the files."
                )
            self.files.append(file)
            self.headers.append(header)


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a folder; safetensors take precedence over pickles. With an index, the files that it names."""
    for whole, sharded in zip(WHOLE, SHARDED, strict=True):
        if is_there(folder / sharded):
            return _files_of_index(folder / sharded)
        if is_there(folder / whole):
            return [folder / whole]
    if is_there(folder / "adapter_config.json"):
        raise ConversionError(
            f"{folder}: an adapter without its model; pass the folder of the model, and this folder with adapter= "
            "(--adapter)."
        )
    raise ConversionError(f"{folder}: no weight files; expected one of {', '.join(WHOLE + SHARDED)}.")


def _files_of_index(path: Path) -> list[Path]:
    """Files that an index names. They lie below the folder of the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(
            f"{path}: weight_map={shown(weight_map)}; expected an object with a file per tensor. Download it again."
        )
    for tensor, name in weight_map.items():
        # Links are fine: in the cache of the hub, files are links to another folder.
        parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts) if isinstance(name, str) else ()
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
            raise ConversionError(
                f"{path}: weight_map has {shown(name)} for {shown(tensor)}; expected a file in {path.parent}."
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not _is_file(path.parent / name)]
    if missing:
        raise ConversionError(
            f"{path}: names {len(names)} files, of which {listed(missing)} are missing; download them."
        )
    return [path.parent / name for name in names]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that has a null byte
        return False


def size_of(tensors: Iterable[Tensor]) -> int:
    """Size in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_safetensors(path: Path, header: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a safetensors file one tensor at a time; ``safetensors.torch.save_file`` needs all tensors in memory.

    The file is written under a temporary name and renamed when it is complete on disk.

    Args:
        path: the file.
        header: names with (meta) tensors of the expected shapes and types, in the order of ``tensors``.
        tensors: names and values; each is written before the next one is requested.
    """
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in header.items():
        start, end = end, end + size_of([tensor])
        entries[name] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(path.name + ".unfinished")
    remaining = iter(header.items())
    with open(unfinished, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            expected_name, expected_tensor = next(remaining)
            if (name, tensor.shape, tensor.dtype) != (expected_name, expected_tensor.shape, expected_tensor.dtype):
                raise AssertionError(f"{name} {tuple(tensor.shape)} instead of {expected_name}")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
