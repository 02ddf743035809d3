"""Unit types of Battle for Wesnoth: names, descriptions and sprites, read from their ``.cfg`` files (WML)."""

import re
from dataclasses import dataclass
from pathlib import Path

_COMMENT = re.compile(r"^[ \t]*#(?!define\b|enddef\b|undef\b).*$", re.MULTILINE)
_DEFINE = re.compile(r"#define[ \t]+(\w+)([^\n]*)\n(.*?)#enddef|#undef[ \t]+(\w+)", re.DOTALL)
_CALL = re.compile(r"\{(\w+)((?:[^{}]|\{\w+\})*)\}")
_ARGUMENT = re.compile(r'_?\s*"([^"]*)"|\(([^()]*)\)|(\S+)')
_UNIT_TYPE = re.compile(r"\[unit_type\](.*?)\[/unit_type\]", re.DOTALL)
_FLAPPING = ("smallfly",)
_VARIATION = re.compile(r"\[variation\].*?\[/variation\]", re.DOTALL)
_BLOCK = re.compile(r"\[(?!/)(\+?\w+)\](?:(?!\[\1\]).)*?\[/\1\]", re.DOTALL)
_KEY = re.compile(r'^\s*(\w+)\s*=\s*(?:_\s*)?(?:"([^"]*)"|([^\n]*?))\s*(?:#.*)?$', re.MULTILINE)
_SPRITE = re.compile(r"units/[\w+/\-.!]*(?:\[[\d~,*]+\][\w+/\-.!]*)*?\.png")
_RANGE = re.compile(r"\[([\d~,*]+)\]")


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit type. File names are those of the game, such as ``"units/elves-wood/ranger.png"``.

    Attributes:
        id: identifier of the unit type.
        name: displayed name.
        race: such as "elf"; empty if not specified.
        flies: whether the unit flies in its base image.
        description: displayed description.
        image: base image of the unit; empty if not specified.
        profile: portrait, such as ``"portraits/elves/ranger.png"``; empty if not specified.
        sprites: all sprites named in the file: female and male, every frame of every animation. Variations (a walking
            corpse of a bat) are excluded, because they look like other characters.
    """

    id: str
    name: str
    race: str
    flies: bool
    description: str
    image: str
    profile: str
    sprites: tuple[str, ...]


def read_units(data: Path) -> list[Unit]:
    """Read all unit types below ``data``, the folder with ``core/`` and ``campaigns/``, in the order of file names."""
    units = []
    for folder in sorted({data / "core" / "units", *data.glob("campaigns/*/units")}):
        for file in sorted(folder.rglob("*.cfg")):
            units += parse_units(file.read_text(encoding="utf-8", errors="replace"))
    return units


def parse_units(text: str) -> list[Unit]:
    """Parse the unit types of one file. Macros that are defined in the file are expanded, others are left unchanged."""
    units = []
    for body in _UNIT_TYPE.findall(_expand(text)):
        body = _VARIATION.sub("", body)
        keys = _own_keys(body)
        if "id" not in keys:
            continue
        sprites = {name for found in _SPRITE.findall(body) for name in expand_frames(found)}
        image = _SPRITE.match(keys.get("image", ""))
        units.append(
            Unit(
                id=keys["id"],
                # "female^Dune Harrier": the part before ^ is a context for translators.
                name=keys.get("name", keys["id"]).split("^")[-1],
                race=keys.get("race", ""),
                flies=keys.get("movement_type", "") in _FLAPPING,
                description=keys.get("description", ""),
                image=image.group() if image else "",
                profile=keys.get("profile", "").split("~")[0],
                sprites=tuple(sorted(sprites)),
            )
        )
    return units


def expand_frames(name: str) -> list[str]:
    """Expand a frame sequence to file names: ``"bow-[1~3,2].png"`` is bow-1, bow-2, bow-3, without duplicates."""
    match = _RANGE.search(name)
    if match is None:
        return [name]
    numbers: dict[str, None] = {}
    for item in match.group(1).split(","):
        first, _, last = item.split("*")[0].partition("~")
        low, high = sorted((int(first), int(last or first)))
        # Leading zeros are part of file names: [01~12].
        numbers.update((str(number).zfill(len(first)), None) for number in range(low, high + 1))
    return [full for number in numbers for full in expand_frames(name[: match.start()] + number + name[match.end() :])]


def _own_keys(body: str) -> dict[str, str]:
    """``key=value`` lines of a block, without those of nested blocks. The first line of a key is used."""
    while True:
        outer, inner_blocks = _BLOCK.subn("", body)
        if not inner_blocks:
            break
        body = outer
    keys: dict[str, str] = {}
    for key, quoted, bare in _KEY.findall(body):
        keys.setdefault(key, quoted or bare)
    return keys


def _expand(text: str) -> str:
    """Expand the macros that the file defines, each between its ``#define`` and its ``#undef``."""
    text = _COMMENT.sub("", text)
    macros: dict[str, tuple[list[str], str]] = {}
    expanded, position = [], 0
    for definition in _DEFINE.finditer(text):
        expanded.append(_fill(text[position : definition.start()], macros))
        position = definition.end()
        name, parameters, body, undefined = definition.groups()
        if undefined:
            macros.pop(undefined, None)
        else:
            macros[name] = (parameters.split("#")[0].split(), body.strip("\n"))
    expanded.append(_fill(text[position:], macros))
    return "".join(expanded)


def _fill(text: str, macros: dict[str, tuple[list[str], str]], depth: int = 0) -> str:
    def replacement(call: re.Match) -> str:
        if call.group(1) not in macros:
            return call.group()
        parameters, body = macros[call.group(1)]
        arguments = ["".join(groups) for groups in _ARGUMENT.findall(call.group(2))]
        for parameter, argument in zip(parameters, arguments, strict=False):
            body = body.replace("{" + parameter + "}", argument)
        return body

    filled = _CALL.sub(replacement, text)
    # Bodies may contain macros. The depth limit ends macros that contain themselves.
    return filled if filled == text or depth > 8 else _fill(filled, macros, depth + 1)
