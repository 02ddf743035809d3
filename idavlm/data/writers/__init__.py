"""Writers: a sample becomes a record of another format. They are the inverse of the readers, as far as a format allows.

A writer has the name of the reader that reads its records, see :data:`idavlm.data.READERS`.
"""

from collections.abc import Callable
from typing import Any

from idavlm.data.schema import Sample
from idavlm.data.writers.conversations import write_llava, write_qwen_vl, write_sharegpt
from idavlm.data.writers.losses import Losses
from idavlm.data.writers.messages import write_messages, write_ms_swift
from idavlm.data.writers.own import write_idavlm
from idavlm.data.writers.turns import BoxText

WRITERS: dict[str, Callable[[Sample, Losses, BoxText | None], dict[str, Any]]] = {
    "idavlm": write_idavlm,
    "llava": write_llava,
    "messages": write_messages,
    "ms_swift": write_ms_swift,
    "qwen_vl": write_qwen_vl,
    "sharegpt": write_sharegpt,
}
"""Writers by name: ``write(sample, losses, box_text) -> record``."""

__all__ = [
    "WRITERS",
    "BoxText",
    "Losses",
    "write_idavlm",
    "write_llava",
    "write_messages",
    "write_ms_swift",
    "write_qwen_vl",
    "write_sharegpt",
]
