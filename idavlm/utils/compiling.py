"""Host-side functions and ``torch.compile``."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_compile(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Like ``torch.compiler.disable``, but does not import the compiler, which takes two seconds, unless it is used."""
    disabled: Callable[_P, _R] | None = None

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            torch.compiler.disable(call, recursive=False)  # marks this wrapper's code
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    # All wrappers share their code, but the compiler marks code objects, and prints their names.
    call.__code__ = call.__code__.replace(co_name=function.__name__)
    # The compiler then calls the wrapper and does not trace it, already at the first time.
    call._torchdynamo_disable = True
    return call


def compile_callees_only(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let ``torch.compile`` run this function as it is and compile the functions that it calls.

    For a wrapper that every combination of arguments would compile again. ``torch.compiler.disable(recursive=False)``
    does the same, but imports the compiler.
    """
    frames = torch._C._dynamo.eval_frame
    only_this_frame = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(function.__code__, only_this_frame)
    function._torchdynamo_disable = True  # a caller that is compiled does not trace it
    return function


def mark_length_dynamic(x: torch.Tensor) -> torch.Tensor:
    """Tell ``torch.compile``, if it is used, that the first size of ``x`` varies, so that it compiles for any."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return x
