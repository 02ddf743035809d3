"""Small packages with the interfaces of lmms-eval and VLMEvalKit, for tests on machines without the real ones.

They hold the classes and functions that idavlm uses, with the same names, arguments and file formats, and a runner.
:func:`use` makes them importable.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def is_real(package: str) -> bool:
    """Whether the real package is installed."""
    return importlib.util.find_spec(package) is not None


@contextmanager
def use(package: str, plugin: str) -> Iterator[None]:
    """Make ``package`` importable: the real one if it is installed, else the small one.

    Args:
        package: ``"lmms_eval"`` or ``"vlmeval"``.
        plugin: package of idavlm that imports it, which is imported anew.
    """
    if is_real(package):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        try:
            yield
        finally:
            for name in list(sys.modules):
                if name.partition(".")[0] == package or name.startswith(f"{plugin}."):
                    del sys.modules[name]
