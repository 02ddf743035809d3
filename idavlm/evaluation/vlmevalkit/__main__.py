"""The command of VLMEvalKit with the model and the data sets of idavlm."""

import importlib.util
import runpy
from pathlib import Path

import vlmeval

from idavlm.evaluation.vlmevalkit.plugin import register


def _runner() -> Path:
    """``run.py``: a module of the package in ``ms-vlmeval``, beside it in a clone of VLMEvalKit."""
    module = importlib.util.find_spec("vlmeval.run")
    if module is not None:
        return Path(module.origin)
    file = Path(vlmeval.__file__).parent.parent / "run.py"
    if not file.is_file():
        raise ImportError(
            f"{file} does not exist; install VLMEvalKit from its repository (pip install -e .), or ms-vlmeval."
        )
    return file


register()
runpy.run_path(str(_runner()), run_name="__main__")
