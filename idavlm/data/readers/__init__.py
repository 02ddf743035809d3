"""Readers of common data formats. A reader converts a record to the schema: ``read(record, where) -> dict``.

A reader lists the fields that it does not use in ``unused_fields`` of the result, see
:class:`idavlm.data.readers.turns.Fields`. :func:`idavlm.data.parse_sample` refuses them.
"""

from collections.abc import Callable
from typing import Any

from idavlm.data.readers.conversations import read_alpaca, read_llava, read_sharegpt, read_yi_vl
from idavlm.data.readers.messages import read_messages, read_ms_swift
from idavlm.data.readers.mmid import MMID_TYPES, read_mmid
from idavlm.data.readers.own import read_idavlm
from idavlm.data.readers.qwen_vl import read_qwen_vl

READERS: dict[str, Callable[[Any, str], Any]] = {
    "alpaca": read_alpaca,
    "idavlm": read_idavlm,
    "llava": read_llava,
    "messages": read_messages,
    "mmid": read_mmid,
    "ms_swift": read_ms_swift,
    "qwen_vl": read_qwen_vl,
    "sharegpt": read_sharegpt,
    "yi_vl": read_yi_vl,
}
"""Readers by name, for ``RecordDataset(reader=...)``. To support a new format, add a function and an entry here."""

__all__ = [
    "MMID_TYPES",
    "READERS",
    "read_alpaca",
    "read_idavlm",
    "read_llava",
    "read_messages",
    "read_mmid",
    "read_ms_swift",
    "read_qwen_vl",
    "read_sharegpt",
    "read_yi_vl",
]
