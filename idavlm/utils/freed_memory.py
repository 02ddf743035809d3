"""Memory that a process has freed and the C library keeps for itself."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Return memory that was freed to the system.

    glibc keeps it, because tensors of many different sizes leave gaps between memory that is in use. Other C libraries
    have no such function, and nothing happens.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
