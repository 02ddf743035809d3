"""Records of a JSON Lines file or of a JSON list, one at a time and each with its place."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from idavlm.data.errors import DataError


class JsonRecords:
    """The records of a file, read on access.

    Of JSON Lines only the places of the lines are kept in memory; blank lines are no records. A file that begins with
    ``[`` is a JSON list, as LLaVA's; its records are kept as text.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(
                f"{self.path} does not exist or is no file; give a .jsonl or .json file of records.", kind="json"
            )
        with self.path.open("rb") as file:
            first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        self._texts = self._read_list() if first == b"[" else None
        self._offsets, self._lines = self._find_lines() if self._texts is None else (np.zeros(0, np.int64),) * 2

    def __len__(self) -> int:
        return len(self._offsets) if self._texts is None else len(self._texts)

    def where(self, index: int) -> str:
        """File and line (or number in the list, from 0) of a record."""
        return f"{self.path}:{self._lines[index]}" if self._texts is None else f"{self.path}[{index}]"

    def __getitem__(self, index: int) -> Any:
        """The decoded record; DataError of kind ``"json"`` where the line is no JSON."""
        if self._texts is not None:
            return json.loads(self._texts[index])
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        return self._decode(line, index)

    def decode_all(self):
        """Yield every record in one pass through the file, or the DataError of one that is no JSON."""
        if self._texts is not None:
            yield from map(json.loads, self._texts)
            return
        with self.path.open("rb") as file:
            for index, offset in enumerate(self._offsets.tolist()):
                file.seek(offset)
                try:
                    yield self._decode(file.readline(), index)
                except DataError as error:
                    yield error

    def _decode(self, line: bytes, index: int) -> Any:
        try:
            return json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"not a line of JSON ({error}): {line[:60]!r}; repair or remove it.",
                where=self.where(index),
                kind="json",
            ) from None

    def _find_lines(self) -> tuple[np.ndarray, np.ndarray]:
        offsets, lines, offset = [], [], 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    offsets.append(offset)
                    lines.append(number)
                offset += len(line)
        return np.array(offsets, np.int64), np.array(lines, np.int64)

    def _read_list(self) -> list[bytes]:
        try:
            with self.path.open("rb") as file:
                records = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a JSON list ({error}); repair it.", where=str(self.path), kind="json") from None
        return [json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") for record in records]
