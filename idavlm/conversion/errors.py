"""The one error of a conversion."""

from collections.abc import Iterable


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the file, what was expected and what was found."""


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def listed(names: Iterable[str], most: int = 6) -> str:
    """``3 (a, b, c)``: how many, and the first of them in order."""
    names = sorted(names)
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} ({shown})" if names else "none"
