"""The one exception of data: what is wrong, where it stands, what to do about it."""

KINDS = ("json", "record", "image", "placeholders", "template", "length", "labels")
"""Kinds of :class:`DataError`, the keys of ``RecordDataset.errors.counts``."""


class DataError(ValueError):
    """A record, picture or conversation that cannot be used.

    Args:
        message: what is wrong (field, value) and the remedy.
        where: file and line, ``"train.jsonl:17"``; put before the message.
        kind: one of :data:`KINDS`; skipped samples are counted by it.
        file: the picture at fault, where there is one; warnings are given once a file.
    """

    # Only the message is a positional argument: worker processes of a DataLoader re-raise as DataError(message).
    def __init__(self, message: str, *, where: str | None = None, kind: str = "record", file: str | None = None):
        super().__init__(f"{where}: {message}" if where else message)
        self.kind = kind
        self.file = file

    def at(self, where: str) -> "DataError":
        """The same error, with ``where`` in front."""
        return DataError(str(self), where=where, kind=self.kind, file=self.file)
