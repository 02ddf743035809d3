"""Replies of a judge on disk, one line each, written as they come."""

import json
import threading
from pathlib import Path

from idavlm.utils import drop_torn_line


class ReplyCache:
    """Replies by key. A line that a killed run left half written is dropped.

    Args:
        path: a ``.jsonl`` file; None to keep replies in memory alone.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path is not None else None
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        if self.path is not None and self.path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> str | None:
        return self._replies.get(key)

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; it is in the file when this returns."""
        with self._lock:
            self._replies[key] = reply
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n")

    def _read(self) -> None:
        drop_torn_line(self.path)
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line)
                self._replies[entry["key"]] = entry["reply"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}:{number} is no reply of a judge; repair or remove the file.") from None
