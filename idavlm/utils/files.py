"""Append-only JSONL files that survive a killed process."""

from pathlib import Path


def drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process left; a missing file is left alone."""
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        with path.open("r+b") as file:
            file.truncate(complete)
