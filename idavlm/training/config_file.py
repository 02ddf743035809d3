"""YAML files of options, with the file and line of every value for errors."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

PLACEHOLDER = "???"
"""Value of a key that must be passed on the command line."""


class CoreLoader(yaml.SafeLoader):
    """Reads scalars by the core schema of YAML 1.2.

    PyYAML reads YAML 1.1, in which ``no`` is False, ``1e-5`` is a string and ``010`` is 8.
    """


CoreLoader.yaml_implicit_resolvers = {}
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))

CoreLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


class OptionFile:
    """The options of a YAML file and of overrides such as ``learning_rate=1e-5`` or ``lora.language_model.r=8``.

    Attributes:
        values: the options; nested mappings are dictionaries.

    Args:
        path: the file.
        overrides: ``key=value``, where the key may name an entry of a mapping by dots, and the value is YAML.

    Raises:
        ValueError: the file is not a YAML mapping, has a key twice, or an override has no ``=``; with file and line.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | Path, overrides: Iterable[str] = ()):
        self.path = Path(path)
        self._places: dict[str, str] = {}
        self.values: dict[str, Any] = self._read()
        for override in overrides:
            self._override(override)

    def where(self, *keys: str) -> str:
        """File and line of a key, or the override that set it."""
        for length in range(len(keys), 0, -1):
            place = self._places.get(".".join(keys[:length]))
            if place is not None:
                return place
        return str(self.path)

    def check_keys(self, known: Iterable[str], *outer: str) -> None:
        """Check the keys of the mapping at ``outer``, by default the whole file.

        Raises:
            ValueError: an unknown key, with the nearest known one.
        """
        known, values = list(known), self.values
        for key in outer:
            values = values[key]
        for key in values:
            if key not in known:
                nearest = get_close_matches(str(key), known, n=1, cutoff=0.0)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else "; no key is known here."
                raise ValueError(f"{self.where(*outer, str(key))}: unknown key {'.'.join((*outer, str(key)))!r}{hint}")

    def include(self, key: str, known: Iterable[str]) -> None:
        """Replace a key that names another file by the options of that file, apart from those that are set here.

        The path is relative to the folder of this file; that of an override is relative to the current folder.

        Args:
            key: the key; nothing happens if it is not set.
            known: the keys that the other file may have.

        Raises:
            ValueError: the value is not the path of a file, or the file has an unknown key or is invalid.
        """
        value = self.values.pop(key, None)
        if value is None:
            return
        place = self.where(key)
        if not isinstance(value, str):
            raise ValueError(f"{place}: {key}={value!r} has the wrong type; expected the path of a file.")
        path = Path(value) if place.startswith("override ") else self.path.parent / value
        if not path.is_file():
            raise ValueError(f"{place}: {key}={value!r} is not a file ({path}); correct the path.")
        other = OptionFile(path)
        other.check_keys(known)
        for name, option in other.values.items():
            if name in self.values:
                continue
            self.values[name] = option
            prefix = f"{name}."
            for inner, inner_place in other._places.items():
                if inner == name or inner.startswith(prefix):
                    self._places[inner] = inner_place

    def check_placeholders(self) -> None:
        """Raise ``ValueError`` if a value is still :data:`PLACEHOLDER`."""
        missing = [".".join(keys) for keys, value in _leaves(self.values) if value == PLACEHOLDER]
        if missing:
            raise ValueError(
                f"{self.path} needs {', '.join(missing)}; pass {' '.join(f'{key}=...' for key in missing)} on the "
                "command line."
            )

    def _read(self) -> dict[str, Any]:
        loader = CoreLoader(self.path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return {}
            if not isinstance(node, yaml.MappingNode):
                raise ValueError(f"{self.path} is not a mapping of options; write lines such as 'learning_rate: 1e-5'.")
            self._find_places(node)
            return loader.construct_document(node)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = self.path if mark is None else f"{self.path}:{mark.line + 1}"
            reason = getattr(error, "problem", None) or " ".join(str(error).split())
            raise ValueError(f"{place}: this is not valid YAML ({reason}).") from None
        finally:
            loader.dispose()

    def _find_places(self, node: yaml.MappingNode, *outer: str) -> None:
        for key, value in node.value:
            name = ".".join((*outer, str(key.value)))
            place = f"{self.path}:{key.start_mark.line + 1}"
            if name in self._places:
                raise ValueError(f"{place}: the key {name!r} is already at {self._places[name]}; remove one.")
            self._places[name] = place
            if isinstance(value, yaml.MappingNode):
                self._find_places(value, *outer, str(key.value))

    def _override(self, text: str) -> None:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise ValueError(f"override {text!r} is not key=value; for example learning_rate=1e-5.")
        keys = name.strip().split(".")
        values = self.values
        for key in keys[:-1]:
            if not isinstance(values.get(key), dict):
                values[key] = {}
            values = values[key]
        try:
            values[keys[-1]] = yaml.load(value, CoreLoader)  # a subclass of SafeLoader
        except yaml.YAMLError as error:
            raise ValueError(f"override {text!r}: the value is not valid YAML ({error}).") from None
        # What an override replaces has no place in the file any more.
        prefix = f"{name.strip()}."
        self._places = {key: place for key, place in self._places.items() if not key.startswith(prefix)}
        self._places[name.strip()] = f"override {text}"


def _leaves(values: Any, *keys: str):
    """Keys and value of every entry that is no mapping or list."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, *keys, str(key))
    elif isinstance(values, list):
        for value in values:
            yield from _leaves(value, *keys)
    else:
        yield keys, values
