"""Lock files: one process at a time works on a path. A lock ends with its process, also if that is killed.

Locks need a POSIX system. ``fcntl`` is imported on first use, so that other parts of idavlm import without it.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock_file(path: str | Path, used: str | Path) -> Iterator[None]:
    """Hold the lock file ``path`` within the context, and remove it afterwards.

    The operating system drops the lock when the process ends, so the file of a killed process blocks nothing. It holds
    the id of the process. Child processes that are forked within the context share the lock.

    Args:
        path: the lock file; its folder must exist.
        used: what the lock protects, for the message.

    Raises:
        ValueError: another process, or this one, holds the lock; the message names the process.
    """
    import fcntl

    path = Path(path)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = os.read(descriptor, 32).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"{used} is in use by process {process or '(unknown)'}; wait until it ends, or choose another path."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        # The previous owner may have removed the file after it was opened here.
        if _is_same(descriptor, path):
            break
        os.close(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Create a folder and hold its lock file ``.lock``. A new folder that stays empty is removed afterwards.

    Raises:
        ValueError: another process uses the folder, or the path is not a folder.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    if not is_new and not folder.is_dir():
        raise ValueError(f"{folder} is a file; pass a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(folder / ".lock", folder):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def lock_beside(folder: Path) -> Iterator[None]:
    """Wait until no other process builds ``folder``. The lock file lies beside it, as ``.NAME.lock``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        wait_for_lock(lock.fileno())
        yield


def wait_for_lock(descriptor: int) -> None:
    """Lock an open file as soon as no other process holds it; closing the file unlocks it."""
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
