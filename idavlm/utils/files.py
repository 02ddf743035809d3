"""Files of lines that are appended to by runs that may be killed."""

from pathlib import Path


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without an end, which a killed run left half written; no file is no line."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
