"""The exception for data that cannot be used, how it quotes values, and the log of the samples that were skipped."""

from collections import Counter
from dataclasses import dataclass, field

KINDS = ("json", "record", "image", "placeholders", "template", "length", "labels")
"""Kinds of :class:`DataError`; they are the keys of ``RecordDataset.errors.counts``."""

MAX_QUOTED = 200
"""Number of characters of a value that a message quotes."""


def quote(value: object) -> str:
    """Return ``repr(value)`` for a message, cut after :data:`MAX_QUOTED` characters of the value."""
    if isinstance(value, (str, bytes)):
        return repr(value[:MAX_QUOTED]) + "..." * (len(value) > MAX_QUOTED)
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # integers of thousands of digits, deep nesting
        return f"a {type(value).__name__} that is too long to be shown"


def shorten(text: str) -> str:
    """Return ``text`` for a message, cut after :data:`MAX_QUOTED` characters."""
    return text[:MAX_QUOTED] + "..." * (len(text) > MAX_QUOTED)


class DataError(ValueError):
    """A record, image or conversation that cannot be used.

    Args:
        message: what is wrong (field and value, by :func:`quote`) and the remedy.
        where: file and line, ``"train.jsonl:17"``; it is prepended to the message.
        kind: one of :data:`KINDS`. Skipped samples are counted by kind.
        file: path of the image that caused the error, if any. ``RecordDataset`` warns once per file.
    """

    # The message is the only positional argument: DataLoader re-raises errors of its workers as DataError(message).
    def __init__(self, message: str, *, where: str | None = None, kind: str = "record", file: str | None = None):
        super().__init__(f"{where}: {message}" if where else message)
        self.kind = kind
        self.file = file

    def at(self, where: str) -> "DataError":
        """Return the same error with ``where`` prepended to its message."""
        return DataError(str(self), where=where, kind=self.kind, file=self.file)


@dataclass
class ErrorLog:
    """Counts of skipped samples.

    Attributes:
        counts: number of skipped samples per kind of error (:data:`KINDS`).
        messages: the first :attr:`MAX_MESSAGES` messages, with file and line.
    """

    counts: Counter = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)

    MAX_MESSAGES = 20

    def add(self, kind: str, message: str) -> None:
        """Count one skipped sample. The message is kept if fewer than :attr:`MAX_MESSAGES` are stored."""
        self.counts[kind] += 1
        if len(self.messages) < self.MAX_MESSAGES:
            self.messages.append(message)

    @property
    def total(self) -> int:
        """Number of skipped samples."""
        return self.counts.total()

    def __str__(self) -> str:
        if not self.total:
            return "nothing skipped"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        not_listed = self.total - len(self.messages)
        lines = [f"{self.total} skipped ({kinds})", *self.messages]
        if not_listed:
            lines.append(f"... and {not_listed} more")
        return "\n  ".join(lines)
