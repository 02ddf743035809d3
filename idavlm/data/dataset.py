"""Files of records as torch Datasets of samples, or of encoded samples for the collator."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from idavlm.data.errors import KINDS, DataError, ErrorLog
from idavlm.data.json_records import JsonRecords
from idavlm.data.parsing import parse_sample
from idavlm.data.readers import READERS
from idavlm.data.schema import Sample
from idavlm.utils import IGNORE_INDEX, check_choice


class RecordDataset(Dataset):
    """Samples of a JSON Lines file (or of a JSON list), read on access.

    The text of all records is checked when the file is opened. Images are opened by ``encode`` on access, so a broken
    image is only found then. With ``on_error="skip"``, records that violate the schema are left out, and a sample that
    cannot be encoded is replaced by the next one that can. The replacement depends only on the files, not on what was
    read before, so a resumed run reads the same samples. Both kinds of skips are counted in :attr:`errors`.

    Args:
        path: file of records.
        image_root: folder that the image paths are relative to; None for the folder ``images`` next to the file.
        encode: function from :class:`Sample` to a dict of tensors (``encode`` of the processor); None to return
            :class:`Sample`.
        on_error: ``"raise"``, or ``"skip"`` to leave out invalid samples, count them, and warn once per file.
        reader: format of the records, a key of ``idavlm.data.READERS``; ``"idavlm"`` is the schema itself.

    Raises:
        DataError: with ``on_error="raise"``, with file and line: at once if a record violates the schema; on access if
            an image cannot be opened, the sample is longer than ``max_length``, or a training sample has no label.
            With ``on_error="skip"``, only if no sample is left.
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
            raise IndexError(f"index {index} of a data set of {len(self)} samples ({self.path}).")
        index %= len(self)
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self._load(candidate)
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self._record_failure(candidate, error)
        raise DataError(f"no sample of {self.path} can be used. {self.errors}")

    def sample(self, index: int) -> Sample:
        """Return sample ``index`` without encoding it."""
        number = int(self._valid[index])
        return self._parse(self._records[number], number)

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
    def errors(self) -> ErrorLog:
        """Log of the samples skipped until now, in this process and in worker processes."""
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

    def _parse(self, record: Any, number: int) -> Sample:
        where = self._records.where(number)
        return parse_sample(READERS[self.reader](record, where), where=where, image_root=self.image_root)

    def _check_all(self) -> np.ndarray:
        """Check all records and return the indices of the valid ones."""
        valid = []
        for number, record in enumerate(self._records.decode_all()):
            try:
                if isinstance(record, DataError):
                    raise record
                self._parse(record, number)
                valid.append(number)
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self._load_errors.add(error.kind, str(error))
        if not valid:
            raise DataError(f"no record of {self.path} can be used. {self._load_errors}")
        if self._load_errors.total:
            warnings.warn(f"{self.path}: {self._load_errors}", stacklevel=4)
        return np.array(valid, np.int64)

    def _record_failure(self, index: int, error: DataError) -> None:
        self._failed[index] = KINDS.index(error.kind) + 1
        cause = error.file or str(error)
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(f"skipped: {error}", stacklevel=4)

    def _message(self, index: int) -> str:
        """Load a failed sample again for its error message, because it may have failed in another process."""
        try:
            self._load(index)
        except DataError as error:
            return str(error)
        return f"{self._records.where(int(self._valid[index]))}: could not be used before, but can be used now."
