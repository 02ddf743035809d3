"""A checkpoint's folder: its configuration and its weight files, read one tensor at a time."""

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from idavlm.conversion.errors import ConversionError, first_line, listed

WHOLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = tuple(f"{name}.index.json" for name in WHOLE)


@dataclass(frozen=True)
class WeightFile:
    """One file of weights.

    Attributes:
        path: ``.safetensors``, or a ``.bin`` of ``torch.save``, of which nothing but tensors is read.
        prefix: put before every name, to tell parts apart that lie in different folders.
        infix: taken off the names, where they begin with it, before ``prefix`` is put on.
        without: names that hold this are not read.
        overrides: its tensors come in the place of others of the same name in the model.
    """

    path: Path
    prefix: str = ""
    infix: str = ""
    without: str | None = None
    overrides: bool = False

    @contextmanager
    def open(self) -> Iterator[Mapping[str, Tensor]]:
        """Names to tensors that are read from disk when they are asked for."""
        try:
            if self.path.suffix == ".safetensors":
                with safe_open(self.path, framework="pt") as opened:
                    yield _Renamed(self._names(opened.keys()), opened.get_tensor)
            else:
                tensors = load_pickle(self.path)
                yield _Renamed(self._names(tensors), tensors.__getitem__)
        except SafetensorError as error:
            raise ConversionError(
                f"{self.path}: no whole safetensors file ({error}); it may be cut off. Fetch it again."
            ) from error

    def header(self) -> dict[str, Tensor]:
        """Every name with an empty tensor (device ``meta``) of its shape and type."""
        with self.open() as tensors:
            return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}

    def _names(self, names: Iterable[str]) -> dict[str, str]:
        kept = (name for name in names if self.without is None or self.without not in name)
        return {self.prefix + name.removeprefix(self.infix): name for name in kept}


class _Renamed(Mapping):
    def __init__(self, names: dict[str, str], get):
        self._names, self._get = names, get

    def __getitem__(self, name: str) -> Tensor:
        return self._get(self._names[name])

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_pickle(path: Path) -> dict[str, Tensor]:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with open(path, "rb") as opened:
            zipped = opened.read(4) == b"PK\x03\x04"
        # The old format of torch.save, before 1.6, cannot be mapped and is read whole.
        loaded = torch.load(path, mmap=zipped, **options)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path}: refused, for it holds more than tensors (weights_only=True: {first_line(error)}). A "
            "pickle can run code; get the weights as safetensors from somebody you trust."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ConversionError(
            f"{path}: no whole file of torch.save ({first_line(error)}); it may be cut off. Fetch it again."
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    strange = loaded if not isinstance(loaded, Mapping) else {k: v for k, v in loaded.items() if not torch.is_tensor(v)}
    if strange or not isinstance(loaded, Mapping):
        found = type(loaded).__name__ if not isinstance(loaded, Mapping) else listed(map(str, strange))
        raise ConversionError(f"{path}: expected names and tensors, found {found}.")
    return dict(loaded)


@dataclass
class Source:
    """What is known of a checkpoint before a tensor is read.

    Attributes:
        folder: where it lies.
        config: its ``config.json``.
        files: its weight files.
        headers: of each file, names and empty tensors; in the order of ``files``.
    """

    folder: Path
    config: dict[str, Any]
    files: list[WeightFile]
    headers: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for header in self.headers for name, tensor in header.items()}

    def add(self, files: list[WeightFile]) -> None:
        """Take further files in: a vision tower's, an adapter's."""
        for file in files:
            header = file.header()
            twice = set() if file.overrides else header.keys() & self.tensors.keys()
            if twice:
                raise ConversionError(f"{file.path}: holds {listed(twice)} that another file holds as well.")
            self.files.append(file)
            self.headers.append(header)


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder}: no config.json; give the folder of a checkpoint.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConversionError(f"{path}: no JSON ({error}).") from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before pickles; those an index names, if there is one."""
    for whole, sharded in zip(WHOLE, SHARDED, strict=True):
        if (folder / sharded).is_file():
            named = sorted(set(json.loads((folder / sharded).read_text())["weight_map"].values()))
            lacking = [name for name in named if not (folder / name).is_file()]
            if lacking:
                raise ConversionError(
                    f"{folder / sharded}: names {len(named)} files, of which {listed(lacking)} are not there; fetch "
                    "them."
                )
            return [folder / name for name in named]
        if (folder / whole).is_file():
            return [folder / whole]
    if (folder / "adapter_config.json").is_file():
        raise ConversionError(
            f"{folder}: an adapter without its model; give the model's folder, and this one with adapter= (--adapter)."
        )
    raise ConversionError(f"{folder}: no weights; expected one of {', '.join(WHOLE + SHARDED)}.")


def read_source(folder: Path) -> Source:
    """Configuration and headers of the checkpoint in ``folder``."""
    if not folder.is_dir():
        raise ConversionError(f"{folder}: no such folder.")
    source = Source(folder, read_config(folder), [])
    source.add([WeightFile(path) for path in weight_files(folder)])
    return source
