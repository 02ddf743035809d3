"""Sprites of Wesnoth characters: which frames show whom, and what they do in them."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from idavlm.datasets.wesnoth.units import Unit

MIN_FRAMES = 8
"""Characters with fewer usable frames are left out."""

VISIBLE = 128
"""Alpha from which a pixel counts as part of the figure."""

_ACTIVITIES: dict[str, str] = {
    "falling": "die death dying dead fall decay",
    "defending": "defend defence defense block",
    "casting a spell": "magic cast casting heal healing halo lightning curse summon faerie entangle wail",
    "shooting": "bow ranged range throw throwing crossbow shoot fire launch sling thunderstick jarid longbow gaze web",
    "fighting": "attack charge sting melee sword blade spear axe claws claw bite kick slash hammer pierce impact "
    "dagger staff mace morningstar fist punch tail trident flail lance pincer kill strike scimitar torch",
    "flying": "fly flying soar takeoff upstroke",
    "running": "run running move moving walk swim jump",
    "leading": "lead leading leadership",
}
"""What characters do and the words for it in file names; the first of several in a name counts."""

_WORDS = {word: activity for activity, words in _ACTIVITIES.items() for word in words.split()}
_OTHER_WORDS = {"n", "ne", "se", "s", "nw", "sw", "e", "w", "female", "male", "base", "bob", "idle", "stand", "long"}
_GLARE = re.compile("teleport|-halo")
_PRECEDENCE = list(_ACTIVITIES)


@dataclass(frozen=True, slots=True)
class Frame:
    """A sprite: ``pixels`` ``[H, W, 4]`` uint8, cut to what is visible; ``file`` below the game's image folder."""

    file: str
    activity: str
    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class Character:
    """Somebody with a look of their own: a unit, or several units that share pictures (the first one's name)."""

    key: str
    name: str
    race: str
    description: str
    profiles: tuple[str, ...]
    frames: tuple[Frame, ...]


def read_characters(data: Path, units: Sequence[Unit], *, min_frames: int = MIN_FRAMES) -> list[Character]:
    """Characters with at least ``min_frames`` frames, in the order of the units.

    Units become one character when they name the same file or files of equal pixels. Files that no unit names belong
    to the unit in whose folder they lie and with whose image's name they begin, followed by words like "attack".

    Args:
        data: the game's data folder, with ``core/images`` and perhaps ``campaigns/*/images``.
        units: of :func:`read_units`.
        min_frames: see above.
    """
    sprites = _read_sprites(data)
    names = _pictures_of_units(units, sprites)
    characters = []
    for group in _groups_that_share(units, names, sprites):
        files = {file: units[index] for index in group for file in names[index]}
        frames = _usable_frames({file: sprites[file] for file in sorted(files)}, [units[index] for index in group])
        if len(frames) >= min_frames:
            first = units[group[0]]
            characters.append(
                Character(
                    key=re.sub(r"\W+", "-", first.id.lower()),
                    name=first.name,
                    race=first.race,
                    description=first.description,
                    profiles=tuple(dict.fromkeys(units[index].profile for index in group if units[index].profile)),
                    frames=tuple(frames),
                )
            )
    return characters


def activity_of(file: str, base: str = "", at_rest: str = "standing") -> str:
    """What a frame shows, as far as its file name tells: ``"archer-bow-attack1.png"`` is "shooting".

    Args:
        file: the frame's file.
        base: file of the unit at rest, whose name is no part of what the frame shows.
        at_rest: what the unit does when the name tells nothing.
    """
    stem, base_stem = Path(file).stem, Path(base).stem
    found = {_WORDS[word] for word in re.findall("[a-z]+", stem.removeprefix(base_stem)) if word in _WORDS}
    return min(found, key=_PRECEDENCE.index, default=at_rest)


def _read_sprites(data: Path) -> dict[str, np.ndarray]:
    """All unit sprites as ``[H, W, 4]`` uint8, by the game's name of the file."""
    sprites = {}
    for images in [data / "core" / "images", *sorted(data.glob("campaigns/*/images"))]:
        for file in sorted(images.glob("units/**/*.png")):
            with Image.open(file) as image:
                sprites.setdefault(file.relative_to(images).as_posix(), np.array(image.convert("RGBA")))
    return sprites


def _pictures_of_units(units: Sequence[Unit], sprites: Mapping[str, np.ndarray]) -> list[set[str]]:
    names = [{name for name in unit.pictures if name in sprites} for unit in units]
    bases: dict[Path, list[tuple[str, int]]] = defaultdict(list)
    for index, unit in enumerate(units):
        if unit.image:
            bases[Path(unit.image).parent].append((Path(unit.image).stem, index))
    for name in sorted(set(sprites).difference(*names)):
        path = Path(name)
        fitting = [
            (len(stem), -index)
            for stem, index in bases[path.parent]
            if path.stem.startswith(stem) and _is_about_a_frame(path.stem.removeprefix(stem))
        ]
        if fitting:
            names[-max(fitting)[1]].add(name)
    return names


def _is_about_a_frame(rest: str) -> bool:
    """Whether what follows a unit's name tells frames apart: "+female-die-2" does, "-bat" (a bat) does not."""
    return rest[:1] in "-+_0123456789" and all(
        word in _WORDS or word in _OTHER_WORDS for word in re.findall("[a-z]+", rest)
    )


def _groups_that_share(
    units: Sequence[Unit], names: Sequence[set[str]], sprites: Mapping[str, np.ndarray]
) -> list[list[int]]:
    """Indices of units, joined where they have a picture in common."""
    parent = list(range(len(units)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    owner: dict[bytes, int] = {}
    for index, pictures in enumerate(names):
        for name in sorted(pictures):
            pixels = sprites[name]
            if (pixels[..., 3] >= VISIBLE).any():
                other = owner.setdefault(str(pixels.shape).encode() + pixels.tobytes(), index)
                low, high = sorted((root(other), root(index)))
                parent[high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(units)):
        groups[root(index)].append(index)
    return list(groups.values())


def _usable_frames(sprites: Mapping[str, np.ndarray], units: Sequence[Unit]) -> list[Frame]:
    """Frames that show most of the figure, each picture once: no flames, glare, falcons, or what the dead leave."""
    areas = {name: int((pixels[..., 3] >= VISIBLE).sum()) for name, pixels in sprites.items()}
    usual = np.median(list(areas.values())) if areas else 0
    at_rest = "flying" if any(unit.flies for unit in units) else "standing"
    frames, seen = [], set()
    for name, pixels in sprites.items():
        if areas[name] < max(0.6 * usual, 100) or _GLARE.search(name) or pixels.tobytes() in seen:
            continue
        seen.add(pixels.tobytes())
        base = max((unit.image for unit in units if _begins(name, unit.image)), key=len, default="")
        frames.append(Frame(name, activity_of(name, base, at_rest), _cut(pixels)))
    return frames


def _begins(name: str, image: str) -> bool:
    return bool(image) and name.startswith(image.removesuffix(".png"))


def _cut(pixels: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero((pixels[..., 3] > 0).any(1))
    columns = np.flatnonzero((pixels[..., 3] > 0).any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
