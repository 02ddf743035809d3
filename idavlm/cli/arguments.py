"""Types of command-line arguments. An empty text or a zero is an error and never stands for "not passed"."""

import argparse
from pathlib import Path


def path(text: str) -> Path:
    """A path. An empty one, for example from a shell variable that is not set, would be the current folder."""
    return Path(name(text))


def name(text: str) -> str:
    """A text that is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; pass a value, or omit the option")
    return text


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return value
