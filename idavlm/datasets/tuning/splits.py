"""Splits by image and by person: one rule for all sources, and the check that proves it."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from idavlm.data.errors import DataError, quote
from idavlm.data.json_records import JsonRecords

SPLITS = ("train", "val", "test")
"""Splits, from the least to the most strictly held out."""

HELD_OUT = "held_out.json"
"""File of a built data set that lists the keys of its splits ``val`` and ``test``."""

_PREFIX = re.compile(r"lsmdc_\d+_|movieclips_")
_YEAR = re.compile(r"\(\d{4}\)\s*$")


def strictest(splits: Iterable[str]) -> str:
    """The most strictly held out of some splits; ``"train"`` of none."""
    return max(splits, key=SPLITS.index, default="train")


def film_key(title: str) -> str:
    """Key of a film: the same for ``"lsmdc_3008_FIGHT_CLUB"`` (VCR) and ``"Fight Club (1999)"`` (MovieNet).

    A film is in VCR and in MovieNet under different names. One key keeps it in one split of both.
    """
    title = _YEAR.sub("", _PREFIX.sub("", title))
    return "film:" + "".join(character for character in title.casefold() if character.isalnum())


class Splits:
    """Assigns keys of images and persons to splits.

    A key is held out if the source itself holds it out, if another build does, or if its hash falls into the share of
    ``val`` or ``test``. The hash depends on the key only. Data sets that are built at different times, from different
    sources, with different seeds, therefore put an image that they share into the same split.

    Args:
        val: share of the keys for validation, besides those that the source holds out.
        test: share of the keys for the test.
        held_out: split of keys that other builds hold out, see :func:`read_held_out`.
    """

    def __init__(self, val: float = 0.01, test: float = 0.01, held_out: Mapping[str, str] | None = None) -> None:
        for name, share in (("val", val), ("test", test)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share} must be a share of at least 0 and less than 1.")
        if val + test >= 1:
            raise ValueError(f"val={val} and test={test} leave nothing for training; pass smaller shares.")
        self.val = val
        self.test = test
        self.held_out = dict(held_out or {})

    def of(self, *keys: str, own: str = "train") -> str:
        """Split of what has some keys: the strictest of them and of ``own``, the split that the source assigns."""
        return strictest([own, *(self.held_out.get(key, "train") for key in keys), *map(self._by_hash, keys)])

    def _by_hash(self, key: str) -> str:
        share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
        return "test" if share < self.test else "val" if share < self.test + self.val else "train"


def read_held_out(folders: Sequence[str | Path]) -> dict[str, str]:
    """Read the keys that built data sets hold out: split by key.

    Raises:
        ValueError: a folder holds no complete data set.
    """
    found: dict[str, str] = {}
    for folder in folders:
        path = Path(folder) / HELD_OUT
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; pass the folder of a data set that `idavlm data build` completed."
            )
        for split, keys in json.loads(path.read_text()).items():
            for key in keys:
                found[key] = strictest([split, found.get(key, "train")])
    return found


def record_keys(record: Mapping) -> list[str]:
    """Keys of the images and of the introduced persons of a record that a builder wrote."""
    meta = record["meta"]
    return [*meta["images"], *dict.fromkeys(meta["people"].values())]


def check_splits(folders: Sequence[str | Path]) -> dict[str, Counter]:
    """Prove that no image and no person is in two splits of some built data sets.

    Args:
        folders: folders of built data sets.

    Returns:
        For each split, the number of its ``"records"`` and ``"keys"``.

    Raises:
        DataError: with file and line, for the first key that another split has as well.
    """
    first: dict[str, tuple[str, str]] = {}
    counts = {split: Counter() for split in SPLITS}
    for folder in folders:
        for split in SPLITS:
            path = Path(folder) / f"{split}.jsonl"
            if not path.is_file():
                continue
            records = JsonRecords(path)
            for number, record in enumerate(records.decode_all()):
                if isinstance(record, DataError):
                    raise record
                counts[split]["records"] += 1
                for key in record_keys(record):
                    other, where = first.setdefault(key, (split, records.where(number)))
                    if other != split:
                        raise DataError(
                            f"{quote(key)} is in {split!r} here and in {other!r} in {where}; build both data sets with "
                            "the same shares, the later one with held_out= the folder of the earlier one.",
                            where=records.where(number),
                        )
    counts_of_keys = Counter(split for split, _ in first.values())
    for split in SPLITS:
        counts[split]["keys"] = counts_of_keys[split]
    return counts
