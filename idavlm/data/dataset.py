"""Files and tables of records as torch Datasets of samples, or of encoded samples for the collator."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from idavlm.data.errors import KINDS, DataError, ErrorLog, shorten
from idavlm.data.images import RecordImages
from idavlm.data.json_records import JsonRecords
from idavlm.data.parsing import parse_sample
from idavlm.data.readers import READERS
from idavlm.data.schema import Sample
from idavlm.data.table_records import TableRecords, import_datasets, is_table_path, take_images, without_nulls
from idavlm.utils import IGNORE_INDEX, check_choice

if TYPE_CHECKING:
    import datasets

_MAX_WORKERS = 256
_NOT_PACKED = -1


@dataclass
class _SampleReader:
    """From a record to its samples, and from a sample to what the data set returns."""

    reader: str
    image_root: Path | None
    encode: Callable[[Sample], dict[str, Any]] | None
    on_error: str
    unused_fields: str
    allow_urls: bool
    holds_images: bool
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, ("raise", "skip"))
        check_choice("reader", self.reader, READERS)
        check_choice("unused_fields", self.unused_fields, ("raise", "warn"))

    def places(self, record: Any, where: str) -> list[int]:
        """Places of the samples in a record: one, unless the record is a list of records (packed samples of Qwen)."""
        if not isinstance(record, list):
            return [_NOT_PACKED]
        if not record:
            raise DataError("the record is an empty list; remove it.", where=where)
        return list(range(len(record)))

    def sample(self, record: Any, place: int, where: str, *, count: bool = False) -> Sample:
        """Return the sample at a place of a record; ``count`` counts the fields that its reader does not use."""
        if place != _NOT_PACKED:
            record, where = record[place], f"{where}[{place}]"
        root: Path | RecordImages | None = self.image_root
        images: dict[str, Any] = {}
        if self.holds_images:
            record, images = take_images(record)
        if images or self.allow_urls:
            root = RecordImages(self.image_root, images, self.allow_urls)
        converted = READERS[self.reader](record, where)
        if self.unused_fields == "warn" and isinstance(converted, dict) and "unused_fields" in converted:
            names = {re.sub(r"\[\d+\]", "[]", name) for name in converted.pop("unused_fields")}
            self.counts.update(names if count else ())
        return parse_sample(converted, where=where, image_root=root)

    def load(self, sample: Sample) -> Any:
        """Encode a sample and check that it can be used."""
        if self.encode is None:
            return sample
        try:
            encoded = self.encode(sample)
        except DataError as error:
            raise error.at(sample.where) from error
        except Exception as error:
            # Not the fault of the record, so it is not skipped. The note says which record led to it.
            error.add_note(f"(while {sample.where} was encoded)")
            raise
        labels = encoded.get("labels")
        if not sample.is_evaluation and labels is not None and not (torch.as_tensor(labels) != IGNORE_INDEX).any():
            raise DataError(
                f"training sample {sample.id!r} has no label (all are {IGNORE_INDEX}); check that its answer is not "
                "cut off and that the chat template marks the assistant turns.",
                where=sample.where,
                kind="labels",
            )
        return {"id": sample.id, "source": sample.source, **encoded}

    def describe_counts(self) -> str:
        """The fields that were not used, most frequent first."""
        names = ", ".join(f"{name!r} in {count} records" for name, count in self.counts.most_common(20))
        return f"the reader {self.reader!r} does not use the fields {shorten(names)}"


class RecordDataset(Dataset):
    """Samples of a JSON Lines file, a JSON list, parquet files or a ``datasets.Dataset``, read on access.

    The text of all records is checked when the data set is opened. Only the positions of the records stay in memory:
    a record is read and parsed when it is needed, which takes much less time than its images, and worker processes
    share the file. Images are opened by ``encode`` on access, so a broken image is only found then. A record that is
    a list of records (packed samples of Qwen) becomes one sample for each.

    With ``on_error="skip"``, records that violate the schema are left out, and a sample that
    cannot be encoded is replaced by the next one that can. The replacement depends only on the files, not on what was
    read before, so a resumed run reads the same samples. Both kinds of skips are counted in :attr:`errors`.

    Args:
        path: file of records, a parquet file, a folder of parquet files, or a ``datasets.Dataset``. Columns of images
            hold the bytes of files, as bytes or as the feature ``Image`` of ``datasets``.
        image_root: folder that the image paths are relative to; None for the folder ``images`` next to the file.
        encode: function from :class:`Sample` to a dict of tensors (``encode`` of the processor); None to return
            :class:`Sample`.
        on_error: ``"raise"``, or ``"skip"`` to leave out invalid samples, count them, and warn once per file.
        reader: format of the records, a key of ``idavlm.data.READERS``; ``"idavlm"`` is the schema itself.
        unused_fields: ``"raise"``: a field that the reader does not use is an error of its record, unless it is empty.
            ``"warn"``: such fields are ignored, counted in :attr:`unused_field_counts`, and listed in one warning.
        allow_urls: whether images may be URLs, which are downloaded on every access, or base64 text (``data:``).

    Raises:
        DataError: with ``on_error="raise"``, with file and line: at once if a record violates the schema; on access if
            an image cannot be opened, the sample is longer than ``max_length``, or a training sample has no label.
            With ``on_error="skip"``, only if no sample is left.
        ImportError: a table without the package ``datasets``.
    """

    def __init__(
        self,
        path: "str | Path | datasets.Dataset",
        image_root: str | Path | None = None,
        *,
        encode: Callable[[Sample], dict[str, Any]] | None = None,
        on_error: str = "raise",
        reader: str = "idavlm",
        unused_fields: str = "raise",
        allow_urls: bool = False,
    ) -> None:
        is_file = isinstance(path, (str, Path))
        self.path = Path(path) if is_file else None
        if image_root is None and is_file:
            image_root = self.path.parent / "images"
        self.image_root = Path(image_root) if image_root is not None else None
        is_table = not is_file or is_table_path(self.path)
        self._reader = _SampleReader(
            reader, self.image_root, encode, on_error, unused_fields, allow_urls, holds_images=is_table
        )
        self._records = TableRecords(path) if is_table else JsonRecords(path)
        self._load_errors = ErrorLog()
        # Number of the record of each sample, and its place if the record is a list.
        self._valid = self._check_all()
        # Kind of the error of each sample (index in KINDS + 1), 0 for none. In shared memory, so that errors in the
        # worker processes of a DataLoader are counted here.
        self._failed = torch.zeros(len(self._valid), dtype=torch.uint8).share_memory_()
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self._valid)

    def __getitem__(self, index: int) -> Any:
        """Return sample ``index``: a :class:`Sample`, or the output of ``encode`` plus ``id`` and ``source``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} samples ({self._name}).")
        index %= len(self)
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self._reader.load(self.sample(candidate))
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self._record_failure(candidate, error)
        raise DataError(f"no sample of {self._name} can be used. {self.errors}")

    def sample(self, index: int) -> Sample:
        """Return sample ``index`` without encoding it."""
        number, place = self._valid[index].tolist()
        return self._reader.sample(self._records[number], place, self._records.where(number))

    def token_counts(self) -> list[int]:
        """The number of tokens of each encoded sample. No image is decoded.

        With ``on_error="skip"``, a sample that cannot be encoded counts 0.

        Raises:
            ValueError: ``encode`` is not a method of a processor that counts tokens.
        """
        count = getattr(getattr(self.encode, "__self__", None), "num_tokens", None)
        if count is None:
            raise ValueError(
                f"encode={self.encode!r} is not the method of a processor that counts tokens; pass processor.encode of "
                "an IDAVLMProcessor or IdentityProcessor."
            )
        counts = []
        for index in range(len(self)):
            sample = self.sample(index)
            try:
                counts.append(count(sample))
            except DataError as error:
                if self.on_error == "raise":
                    raise error.at(sample.where) from error
                counts.append(0)
        return counts

    @property
    def encode(self) -> Callable[[Sample], dict[str, Any]] | None:
        """The function that encodes a sample, or None."""
        return self._reader.encode

    @encode.setter
    def encode(self, encode: Callable[[Sample], dict[str, Any]] | None) -> None:
        self._reader.encode = encode

    @property
    def on_error(self) -> str:
        """``"raise"`` or ``"skip"``."""
        return self._reader.on_error

    @property
    def reader(self) -> str:
        """Format of the records."""
        return self._reader.reader

    @property
    def fingerprint(self) -> str:
        """Identifies the content of the file or table; a resumed run compares it."""
        return self._records.fingerprint

    @property
    def unused_field_counts(self) -> Counter:
        """With ``unused_fields="warn"``, the number of records in which each field was ignored."""
        return Counter(self._reader.counts)

    @property
    def errors(self) -> ErrorLog:
        """Log of the samples skipped until now, in this process and in worker processes."""
        log = copy.deepcopy(self._load_errors)
        for index in self._failed.nonzero().flatten().tolist():
            log.counts[KINDS[self._failed[index] - 1]] += 1
            if len(log.messages) < log.MAX_MESSAGES:
                log.messages.append(self._message(index))
        return log

    @property
    def _name(self) -> str:
        return str(self.path or "the data set")

    def _check_all(self) -> np.ndarray:
        """Check all records and return record and place of the valid samples."""
        valid = []
        for number, record in enumerate(self._records.decode_all()):
            where = self._records.where(number)
            try:
                if isinstance(record, DataError):
                    raise record
                places = self._reader.places(record, where)
            except DataError as error:
                self._skip(error)
                continue
            for place in places:
                try:
                    self._reader.sample(record, place, where, count=True)
                    valid.append((number, place))
                except DataError as error:
                    self._skip(error)
        if not valid:
            raise DataError(f"no record of {self._name} can be used. {self._load_errors}")
        if self._load_errors.total:
            warnings.warn(f"{self._name}: {self._load_errors}", stacklevel=4)
        if self._reader.counts:
            warnings.warn(f"{self._name}: {self._reader.describe_counts()}; they are ignored.", stacklevel=4)
        return np.array(valid, np.int64)

    def _skip(self, error: DataError) -> None:
        if self.on_error == "raise":
            raise error
        self._load_errors.add(error.kind, str(error))

    def _record_failure(self, index: int, error: DataError) -> None:
        self._failed[index] = KINDS.index(error.kind) + 1
        cause = error.file or str(error)
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(f"skipped: {error}", stacklevel=4)

    def _message(self, index: int) -> str:
        """Load a failed sample again for its error message, because it may have failed in another process."""
        try:
            self._reader.load(self.sample(index))
        except DataError as error:
            return str(error)
        where = self._records.where(int(self._valid[index, 0]))
        return f"{where}: could not be used before, but can be used now."


@dataclass(frozen=True, slots=True)
class ReadRecord:
    """One record of a file, as :func:`read_records` yields it.

    Attributes:
        where: file and line, as in errors.
        line: number of the line in which the record begins, from 1; None for a row of a table.
        record: the record as it is in the file; None if it is not valid JSON.
        sample: the checked record, or the error that says why it cannot be used.
    """

    where: str
    line: int | None
    record: Any
    sample: Sample | DataError


def read_records(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    reader: str = "idavlm",
    unused_fields: str = "raise",
    allow_urls: bool = False,
) -> Iterator[ReadRecord]:
    """Yield every record of a file with its sample or its error, in one pass. Images are not opened.

    Args:
        path, image_root, reader, unused_fields, allow_urls: as in :class:`RecordDataset`.

    Raises:
        DataError: the file does not exist, or cannot be divided into records.
        ImportError: a table without the package ``datasets``.
    """
    path = Path(path)
    root = path.parent / "images" if image_root is None else Path(image_root)
    is_table = is_table_path(path)
    converter = _SampleReader(reader, root, None, "raise", unused_fields, allow_urls, holds_images=is_table)
    records = TableRecords(path) if is_table else JsonRecords(path)
    rows = map(records.__getitem__, range(len(records))) if is_table else records.decode_all()
    lines = [None] * len(records) if is_table else records.line_numbers()
    for number, (record, line) in enumerate(zip(rows, lines, strict=True)):
        where = records.where(number)
        if isinstance(record, DataError):
            yield ReadRecord(where, line, None, record)
            continue
        try:
            places = converter.places(record, where)
        except DataError as error:
            yield ReadRecord(where, line, record, error)
            continue
        for place in places:
            part = record if place == _NOT_PACKED else record[place]
            name = where if place == _NOT_PACKED else f"{where}[{place}]"
            try:
                sample = converter.sample(record, place, where)
            except DataError as error:
                sample = error
            yield ReadRecord(name, line, part, sample)


class RecordStream(IterableDataset):
    """Samples of a ``datasets.IterableDataset``, read one after the other (``load_dataset(..., streaming=True)``).

    Records are read and checked as they come. The workers of a ``DataLoader`` divide the shards of the stream.
    Training needs ``max_steps`` and ``accelerator_config={"dispatch_batches": False}``, and a resumed run reads the
    skipped samples again. Use :class:`RecordDataset` for data that fits on the disk: it is checked as a whole, shuffled
    as a whole, and mixed with general data.

    Args:
        records: the stream. Shuffle it with ``records.shuffle(seed=..., buffer_size=...)``; :meth:`set_epoch` gives
            every epoch another order.
        image_root, encode, on_error, reader, unused_fields, allow_urls: as in :class:`RecordDataset`. Skipped samples
            are left out, not replaced. Each process warns of a field that is not used when it first occurs.

    Raises:
        DataError: while it is read, as :class:`RecordDataset` does; records are counted in each worker.
        ImportError: the package ``datasets`` is not installed.
        ValueError: ``records`` is no ``datasets.IterableDataset``.
    """

    def __init__(
        self,
        records: "datasets.IterableDataset",
        image_root: str | Path | None = None,
        *,
        encode: Callable[[Sample], dict[str, Any]] | None = None,
        on_error: str = "raise",
        reader: str = "idavlm",
        unused_fields: str = "raise",
        allow_urls: bool = False,
    ) -> None:
        if not isinstance(records, import_datasets("streams of records").IterableDataset):
            raise ValueError(
                f"records is {type(records).__name__}; pass a datasets.IterableDataset, or use RecordDataset."
            )
        self.records = records if records.features is None else records.decode(False)
        self.image_root = Path(image_root) if image_root is not None else None
        self._reader = _SampleReader(
            reader, self.image_root, encode, on_error, unused_fields, allow_urls, holds_images=True
        )
        # One row per worker process, so that no two processes write to one place.
        self._failed = torch.zeros(_MAX_WORKERS, len(KINDS), dtype=torch.long).share_memory_()

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        row = 0 if worker is None else worker.id % _MAX_WORKERS
        name = "stream" if worker is None else f"stream, worker {worker.id}"
        for number, record in enumerate(self.records):
            where = f"{name}[{number}]"
            record = without_nulls(record)
            try:
                places = self._reader.places(record, where)
            except DataError as error:
                self._skip(error, row)
                continue
            for place in places:
                known = len(self._reader.counts)
                try:
                    yield self._reader.load(self._reader.sample(record, place, where, count=True))
                except DataError as error:
                    self._skip(error, row)
                if len(self._reader.counts) > known:
                    warnings.warn(f"{where}: {self._reader.describe_counts()}; they are ignored.", stacklevel=2)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of a shuffled stream."""
        self.records.set_epoch(epoch)

    @property
    def fingerprint(self) -> str:
        """Describes the stream; its content is not compared."""
        info = self.records.info
        return (
            f"stream of {self.records.num_shards} shards, {info.builder_name} {info.config_name} {self.records.split}"
        )

    @property
    def error_counts(self) -> Counter:
        """Number of skipped samples per kind of error, in this process and in worker processes."""
        counts = self._failed.sum(0).tolist()
        return Counter({kind: count for kind, count in zip(KINDS, counts, strict=True) if count})

    def _skip(self, error: DataError, row: int) -> None:
        if self._reader.on_error == "raise":
            raise error
        self._failed[row, KINDS.index(error.kind)] += 1
        warnings.warn(f"skipped: {error}", stacklevel=3)
