"""A file of records and how it is read."""

from collections.abc import Iterator
from dataclasses import dataclass

from idavlm.data.dataset import ReadRecord, read_records


@dataclass(frozen=True)
class RecordSource:
    """A file of records.

    Attributes:
        path: JSON Lines file, JSON list, parquet file, or folder of parquet files.
        image_root: folder that image paths are relative to; None for ``images`` next to the file.
        reader: format of the records, a key of ``idavlm.data.READERS``.
        unused_fields: ``"raise"``, or ``"warn"`` to accept fields that the reader does not use.
        allow_urls: whether images may be URLs.
    """

    path: str
    image_root: str | None = None
    reader: str = "idavlm"
    unused_fields: str = "raise"
    allow_urls: bool = False

    def __iter__(self) -> Iterator[ReadRecord]:
        return read_records(
            self.path,
            self.image_root,
            reader=self.reader,
            unused_fields=self.unused_fields,
            allow_urls=self.allow_urls,
        )
