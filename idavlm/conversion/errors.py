"""The error of conversions, and how values and errors of other libraries appear in its message."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from idavlm.utils import first_line

SHOWN = 200
"""Characters of a value that a message quotes."""


class ConversionError(ValueError):
    """A checkpoint cannot be converted. The message names the file, what was expected and what was found."""


def shown(value: Any) -> str:
    """``repr`` of a value, cut after :data:`SHOWN` characters."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def listed(names: Iterable[str], limit: int = 6) -> str:
    """Count and first names in sorted order: ``3 (a, b, c)``."""
    names = sorted(names)
    kept = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"{len(names)} ({kept[: 5 * SHOWN]})" if names else "none"


@contextmanager
def errors_of(path: Path, problem: str, remedy: str) -> Iterator[None]:
    """Turn what another library raises because of the contents of ``path`` into a ConversionError.

    Use it around calls of that library only, so that errors of our own code keep their traceback.

    Args:
        path: file or folder that the library reads, or whose contents it gets.
        problem: what is wrong, a predicate of ``path`` such as ``"describes no model"``.
        remedy: what to do.
    """
    try:
        yield
    except (ConversionError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the Rust library tokenizers is no Exception
        raise ConversionError(f"{path} {problem} ({type(error).__name__}: {first_line(error)}). {remedy}") from error
