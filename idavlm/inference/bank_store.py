"""Named banks of one model, in memory and, where their owner asks for it, in a folder."""

import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idavlm.inference.batching import BatchingEngine
from idavlm.models import IdentityBank
from idavlm.utils import check_positive

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_UNFINISHED = ".unfinished-"


class TooManyBanks(RuntimeError):
    """A store that is full."""


@dataclass(frozen=True, eq=False)
class StoredBank:
    """A named bank.

    Attributes:
        name: its name.
        bank: the encoded photos.
        is_kept: whether it is also in the folder of the store.
        created: when it was created, in seconds since 1970.
    """

    name: str
    bank: IdentityBank
    is_kept: bool
    created: int


class BankStore:
    """Named banks of the model of an engine. Threads may share it.

    A bank holds features of photos, from which a person can be recognised as from the photos. The store holds banks in
    memory. It writes a bank to its folder only if :meth:`create` is called with ``keep=True``. It never writes the
    photos themselves.

    Args:
        engine: runs the model.
        folder: where kept banks are, one folder per bank; they are loaded. None: no bank can be kept.
        max_banks: largest number of banks.

    Raises:
        ValueError: the folder holds a bank of another model.
    """

    def __init__(self, engine: BatchingEngine, *, folder: str | Path | None = None, max_banks: int = 100) -> None:
        check_positive(max_banks=max_banks)
        self.engine = engine
        self.folder = None if folder is None else Path(folder)
        self.max_banks = max_banks
        self._banks: dict[str, StoredBank] = {}
        self._lock = threading.Lock()
        self._reserved: set[str] = set()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for entry in sorted(self.folder.iterdir()):
                if entry.name.startswith(_UNFINISHED):
                    shutil.rmtree(entry)  # of a process that ended while it wrote or deleted the bank
                elif entry.is_dir():
                    self._banks[entry.name] = self._load(entry)

    def __contains__(self, name: object) -> bool:
        return name in self._banks

    def names(self) -> list[str]:
        """Names of all banks, in the order of their creation."""
        with self._lock:
            return list(self._banks)

    def get(self, name: str) -> StoredBank:
        """The bank of this name. Raises KeyError if there is none."""
        with self._lock:
            if name not in self._banks:
                raise KeyError(f"there is no bank {name!r}.")
            return self._banks[name]

    def create(self, name: str, identities: Mapping[str, Sequence[Any]], *, keep: bool = False) -> StoredBank:
        """Encode photos and store them under a name.

        Args:
            name: 1 to 64 letters, digits, ``_``, ``.`` and ``-``; not in use.
            identities: photos of each identity by name.
            keep: also write the bank to the folder of the store.

        Raises:
            FileExistsError: there is a bank of this name.
            PermissionError: ``keep`` without a folder.
            TooManyBanks: there are ``max_banks`` banks already.
            ValueError: a name or photos that cannot be used.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"name={name!r} must be 1 to 64 letters, digits, '_', '.' and '-', and begin with a letter or digit."
            )
        if not identities:
            raise ValueError("identities is empty; pass the photos of at least one identity.")
        if keep and self.folder is None:
            raise PermissionError("no bank can be kept, because the store has no folder; leave keep out.")
        with self._lock:
            if name in self._banks or name in self._reserved:
                raise FileExistsError(f"there is a bank {name!r} already; delete it first, or use another name.")
            if len(self._banks) + len(self._reserved) >= self.max_banks:
                raise TooManyBanks(f"there are {self.max_banks} banks already; delete one first.")
            self._reserved.add(name)
        try:
            bank = IdentityBank(self.engine.model, self.engine.processor)
            for identity, images in identities.items():  # one job per identity: answers run in between
                self.engine.run(lambda identity=identity, images=images: bank.add(identity, images)).result()
            stored = StoredBank(name, bank, keep, int(time.time()))
            if keep:
                self._write(stored)
            with self._lock:
                self._banks[name] = stored
        finally:
            with self._lock:
                self._reserved.discard(name)
        return stored

    def delete(self, name: str) -> None:
        """Delete a bank for good: from memory, and from the folder. Raises KeyError if there is none.

        An answer that uses the bank at this moment is completed.
        """
        with self._lock:
            if name not in self._banks:
                raise KeyError(f"there is no bank {name!r}.")
            stored = self._banks[name]
            if stored.is_kept:
                doomed = self.folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
                (self.folder / name).rename(doomed)  # at once: a process that ends now does not leave half a bank
                _sync(self.folder)
                shutil.rmtree(doomed)
                _sync(self.folder)
            del self._banks[name]

    def _write(self, stored: StoredBank) -> None:
        part = self.folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
        part.mkdir(mode=0o700)
        try:
            stored.bank.save(part)
            part.rename(self.folder / stored.name)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _sync(self.folder)

    def _load(self, folder: Path) -> StoredBank:
        bank = IdentityBank.load(folder, self.engine.model, self.engine.processor)
        return StoredBank(folder.name, bank, True, int(folder.stat().st_mtime))


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
