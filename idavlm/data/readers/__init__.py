"""Readers of common data formats. A reader converts a record to the schema: ``read(record, where) -> dict``."""

from collections.abc import Callable
from typing import Any

from idavlm.data.readers.conversations import read_llava, read_sharegpt, read_yi_vl
from idavlm.data.readers.mmid import MMID_TYPES, read_mmid
from idavlm.data.readers.openai import read_openai
from idavlm.data.readers.qwen_vl import read_qwen_vl


def read_idavlm(record: Any, where: str) -> Any:
    """Return a record of the schema unchanged."""
    return record


READERS: dict[str, Callable[[Any, str], Any]] = {
    "idavlm": read_idavlm,
    "llava": read_llava,
    "mmid": read_mmid,
    "openai": read_openai,
    "qwen_vl": read_qwen_vl,
    "sharegpt": read_sharegpt,
    "yi_vl": read_yi_vl,
}
"""Readers by name, for ``RecordDataset(reader=...)``. To support a new format, add a function and an entry here."""

__all__ = [
    "MMID_TYPES",
    "READERS",
    "read_idavlm",
    "read_llava",
    "read_mmid",
    "read_openai",
    "read_qwen_vl",
    "read_sharegpt",
    "read_yi_vl",
]
