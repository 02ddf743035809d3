"""Files of JSON records: JSON Lines or a JSON list, decoded one record at a time."""

import hashlib
import json
import mmap
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from idavlm.data.errors import DataError, quote

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# Text up to the next bracket (or comma) that is not part of a string. A string that is not closed extends to the end.
_STRING = rb'"(?:[^"\\]++|\\(?:.|\Z))*+(?:"|\Z)'
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+([\[\]{}])", re.DOTALL)
_TO_BRACKET_OR_COMMA = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb")*+([\[\]{},])", re.DOTALL)


class JsonRecords:
    """The records of a JSON Lines file or JSON list, decoded on access.

    Only the positions of the records are kept in memory. Blank lines are ignored. A file that begins with ``[`` is a
    JSON list (LLaVA's format), unless the list ends with its line and another line follows: each line is then a record,
    which is a list (packed samples of Qwen). A record that is not valid JSON does not affect the other records.

    Args:
        path: the file.

    Raises:
        DataError: of kind ``"json"``, if the file does not exist or begins as a JSON list but does not end as one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(
                f"{self.path} does not exist or is not a file; pass a .jsonl or .json file of records.", kind="json"
            )
        with self.path.open("rb") as file:
            # Start, end and line number of each record; the line number is not used in a JSON list.
            spans = None
            if file.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"[":
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                    spans = self._find_elements(text)
            self._is_list = spans is not None
            if spans is None:
                file.seek(0)
                spans = _find_lines(file)
        self._spans = np.array(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def where(self, index: int) -> str:
        """File and line of a record; file and index if the file is a JSON list."""
        return f"{self.path}[{index}]" if self._is_list else f"{self.path}:{self._spans[index, 2]}"

    def line_numbers(self) -> list[int]:
        """The line, from 1, in which each record begins."""
        if not self._is_list:
            return self._spans[:, 2].tolist()
        numbers, line, position = [], 1, 0
        with self.path.open("rb") as file:
            for start, end, _ in self._spans.tolist():
                file.seek(position)
                line += file.read(start - position).count(b"\n")
                text = file.read(end - start)
                numbers.append(line + text[: len(text) - len(text.lstrip())].count(b"\n"))
                line, position = line + text.count(b"\n"), end
        return numbers

    def __getitem__(self, index: int) -> Any:
        """Decode a record.

        Raises:
            DataError: of kind ``"json"``, if the record is not valid JSON or an object in it has a key twice.
        """
        with self.path.open("rb") as file:
            return self._read(file, index)

    def decode_all(self) -> Iterator[Any]:
        """Yield every record in one pass through the file; a DataError in place of a record that is not valid JSON."""
        with self.path.open("rb") as file:
            for index in range(len(self)):
                try:
                    yield self._read(file, index)
                except DataError as error:
                    yield error

    @property
    def fingerprint(self) -> str:
        """Hash of the file."""
        with self.path.open("rb") as file:
            return f"file hash {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

    def _read(self, file: BinaryIO, index: int) -> Any:
        start, end, _ = self._spans[index].tolist()
        file.seek(start)
        text = file.read(end - start)
        try:
            return json.loads(text.removeprefix(_BYTE_ORDER_MARK).decode(), object_pairs_hook=_unique_keys)
        except RecursionError:
            problem = "it is nested too deeply"
        except ValueError as error:  # JSON syntax, UTF-8, a key that occurs twice, an integer of thousands of digits
            problem = str(error)
        raise DataError(
            f"invalid JSON ({problem}): {quote(text)}; repair or remove the record.",
            where=self.where(index),
            kind="json",
        )

    def _find_elements(self, text: mmap.mmap) -> array | None:
        """Split a JSON list by its brackets and commas, in one pass, without decoding its elements.

        Returns None if the list is only the first of several lines.
        """
        spans = array("q")
        position = start = text.find(b"[") + 1
        depth = 1
        while depth:
            match = (_TO_BRACKET_OR_COMMA if depth == 1 else _TO_BRACKET).match(text, position)
            if match is None:
                raise self._no_list("it is not closed")
            position = match.end()
            if match[1] in b"[{":
                depth += 1
            elif match[1] in b"]}":
                depth -= 1
            if match[1] == b"," or not depth:
                spans.extend((start, match.start(1), 0))
                start = position
        end_of_line = text.find(b"\n", position)
        follows = text[end_of_line : end_of_line + 4096].lstrip()[:1] if end_of_line >= 0 else b""
        if follows in (b"[", b"{") and not text[position:end_of_line].strip():
            return None
        rest = text[position : position + 4096].strip()
        if rest or text[position:].strip():
            raise self._no_list(f"{quote(rest)} follows its end")
        is_empty = len(spans) == 3 and not text[spans[0] : spans[1]].strip()
        return array("q") if is_empty else spans

    def _no_list(self, problem: str) -> DataError:
        return DataError(f"invalid JSON list ({problem}); repair it.", where=str(self.path), kind="json")


def _find_lines(file: BinaryIO) -> array:
    """Start, end and number (from 1) of each line that is not blank."""
    spans, offset = array("q"), 0
    for number, line in enumerate(file, 1):
        if line.strip():
            spans.extend((offset, offset + len(line), number))
        offset += len(line)
    return spans


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. Python's decoder would keep the last of two values with the same key."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quote(key)} occurs {count} times in one object")
    return entry
