"""Checks of arguments. Their errors name the argument, its value and the remedy."""

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def check_positive(**sizes: int | None) -> None:
    """Raise ``ValueError`` for the first keyword that is neither an integer >= 1 nor None."""
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def check_type(name: str, value: object, expected: Any) -> None:
    """Raise ``ValueError`` unless ``value`` has the annotated type. ``True`` is no number; an integer is a float."""
    if not _has_type(value, expected):
        text = repr(value)
        shown = text if len(text) <= 200 else text[:200] + "..."
        wanted = expected.__name__ if isinstance(expected, type) else str(expected)
        raise ValueError(f"{name}={shown} has the wrong type; expected {wanted.replace('NoneType', 'None')}.")


def check_arguments(name: str, arguments: dict, function: Callable, *, exclude: Iterable[str] = ()) -> None:
    """Raise ``ValueError`` unless ``arguments`` are keyword arguments of ``function`` and have the annotated types.

    Args:
        name: what contains the arguments, for messages.
        arguments: argument -> value.
        function: a function, or a class whose constructor takes the arguments. A constructor that takes ``**options``
            also takes the arguments of its base class.
        exclude: arguments of ``function`` that must not be among them.
    """
    annotations = _constructor_arguments(function) if inspect.isclass(function) else _annotated_arguments(function)
    known = [argument for argument in annotations if argument not in set(exclude)]
    for argument, value in arguments.items():
        if argument not in known:
            raise ValueError(
                f"{name}: {argument!r} is not an argument of {function.__name__}; known: {', '.join(known)}."
            )
        check_type(f"{name}: {argument}", value, annotations[argument])


def _annotated_arguments(function: Callable) -> dict[str, Any]:
    """Arguments of a function and their annotated types."""
    annotations = typing.get_type_hints(function)
    return {name: annotations.get(name, Any) for name in inspect.signature(function).parameters}


def _constructor_arguments(cls: type) -> dict[str, Any]:
    """Arguments of a constructor and their annotated types, with those that ``**options`` passes to base classes."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        passes_on = [parameter.name for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
        own = {k: v for k, v in _annotated_arguments(base.__init__).items() if k not in ("self", *passes_on)}
        found = {**own, **found}
        if not passes_on:
            break
    return found


def _has_type(value: object, expected: Any) -> bool:
    origin, parts = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin in (Sequence, list):
        kinds = list if origin is list else (list, tuple)
        return isinstance(value, kinds) and all(_has_type(entry, parts[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(_has_type(entry, parts[1]) for entry in value.values())
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)
