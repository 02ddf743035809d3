"""A file of records as a torch Dataset of samples, or of encoded samples ready for the collator."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from idavlm.data.error_log import ErrorLog
from idavlm.data.errors import KINDS, DataError
from idavlm.data.json_records import JsonRecords
from idavlm.data.parsing import parse_sample
from idavlm.data.readers import READERS
from idavlm.data.schema import Sample
from idavlm.utils import check_choice


class RecordDataset(Dataset):
    """Samples of a JSON Lines file (or JSON list), read on access.

    The text of all records is checked at once. Pictures are opened by ``encode`` on access, so a broken one shows only
    then. With ``on_error="skip"`` a record with bad text is left out; a sample that cannot be encoded is replaced by
    the next one that can, whenever it is asked for: which sample stands at an index depends on the files alone, not on
    what was read before, so that a resumed run sees the same. Either is counted in :attr:`errors`.

    Args:
        path: file of records.
        image_root: folder their image paths stand under; None for the folder ``images`` beside the file.
        encode: ``sample -> dict of tensors`` (the processor's ``encode``); None to get :class:`Sample`.
        on_error: ``"raise"``, or ``"skip"`` to leave bad samples out, counted and with one warning a file.
        reader: format of the records, a key of ``idavlm.data.READERS``; ``"idavlm"`` is the schema itself.

    Raises:
        DataError: with ``on_error="raise"``, naming file and line: at once for bad text, on access where a picture
            cannot be opened, a sample does not fit into the length or none of its labels counts. With
            ``on_error="skip"`` only when no sample is left.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        *,
        encode: Callable[[Sample], dict[str, Any]] | None = None,
        on_error: str = "raise",
        reader: str = "idavlm",
    ) -> None:
        check_choice("on_error", on_error, ("raise", "skip"))
        check_choice("reader", reader, READERS)
        self.path = Path(path)
        self.image_root = Path(image_root) if image_root is not None else self.path.parent / "images"
        self.encode = encode
        self.on_error = on_error
        self.reader = reader
        self._records = JsonRecords(path)
        self._load_errors = ErrorLog()
        self._kept = self._check_all()
        # Kind of the error of each sample, 0 for none. Shared, so that what worker processes meet is counted here.
        self._failed = torch.zeros(len(self._kept), dtype=torch.uint8).share_memory_()
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Any:
        """Sample ``index``: a :class:`Sample`, or what ``encode`` makes of it, with its ``source``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} samples ({self.path}).")
        index %= len(self)
        for step in range(len(self)):
            try:
                return self._load((index + step) % len(self))
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self._note((index + step) % len(self), error)
        raise DataError(f"no sample of {self.path} can be used. {self.errors}")

    def sample(self, index: int) -> Sample:
        """The checked record ``index``, without encoding it."""
        number = int(self._kept[index])
        return self._parse(self._records[number], number)

    @property
    def errors(self) -> ErrorLog:
        """What was left out so far, in this process and in worker processes."""
        log = copy.deepcopy(self._load_errors)
        for index in self._failed.nonzero().flatten().tolist():
            log.counts[KINDS[self._failed[index] - 1]] += 1
            if len(log.messages) < log.MAX_MESSAGES:
                log.messages.append(self._message(index))
        return log

    def _load(self, index: int) -> Any:
        sample = self.sample(index)
        if self.encode is None:
            return sample
        try:
            encoded = self.encode(sample)
        except DataError as error:
            raise error.at(sample.where) from error
        labels = encoded.get("labels")
        if sample.task is None and labels is not None and not (torch.as_tensor(labels) != -100).any():
            raise DataError(
                f"sample {sample.id!r} has no label that counts (all are -100), it would train nothing; has its answer "
                "been cut off, or does the template mark no assistant turn?",
                where=sample.where,
                kind="labels",
            )
        return {"source": sample.source, **encoded}

    def _parse(self, record: Any, number: int) -> Sample:
        where = self._records.where(number)
        return parse_sample(READERS[self.reader](record, where), where=where, image_root=self.image_root)

    def _check_all(self) -> np.ndarray:
        kept = []
        for number, record in enumerate(self._records.decode_all()):
            try:
                if isinstance(record, DataError):
                    raise record
                self._parse(record, number)
                kept.append(number)
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self._load_errors.add(error.kind, str(error))
        if not kept:
            raise DataError(f"no record of {self.path} can be used. {self._load_errors}")
        if self._load_errors.total:
            warnings.warn(f"{self.path}: {self._load_errors}", stacklevel=4)
        return np.array(kept, np.int64)

    def _note(self, index: int, error: DataError) -> None:
        self._failed[index] = KINDS.index(error.kind) + 1
        about = error.file or str(error)
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(f"skipped: {error}", stacklevel=4)

    def _message(self, index: int) -> str:
        """The error of a sample, met anew: the first time may have been in another process."""
        try:
            self._load(index)
        except DataError as error:
            return str(error)
        return f"{self._records.where(int(self._kept[index]))}: could not be used once, but can be now."
