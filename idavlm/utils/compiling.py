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


def mark_length_dynamic(x: torch.Tensor) -> torch.Tensor:
    """Tell ``torch.compile``, if it is used, that the first size of ``x`` varies, so that it compiles for any."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return x
