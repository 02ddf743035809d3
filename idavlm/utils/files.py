"""Files that a killed process cannot leave half written: appended lines, replaced files, JSON objects."""

import json
import os
from pathlib import Path
from typing import Any

from idavlm.utils.locks import wait_for_lock


def append_lines(path: Path, lines: list[str]) -> None:
    """Append lines to a file that other processes may append to; they are on disk when the function returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        wait_for_lock(file.fileno())
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process left; a missing file is left alone."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        wait_for_lock(file.fileno())  # a line that is being appended by another process is not torn
        content = file.read()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            file.truncate(complete)


def write_text(path: str | Path, text: str) -> Path:
    """Write a whole file, and its folder if needed. Readers find the old content or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: with the path, for a file that is not UTF-8, not JSON, holds another type, or escapes half a
            surrogate pair, which is no character and could not be written to another file.
    """
    text = Path(path).read_bytes()
    try:
        content = json.loads(text.decode("utf-8-sig"))
        if b"\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path} holds half a surrogate pair, which is no character; repair or replace it.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); repair or replace it.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object; repair or replace it.")
    return content
