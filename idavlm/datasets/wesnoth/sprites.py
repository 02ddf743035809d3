"""Sprites of Wesnoth characters: the frames of each character and the activity that a frame shows."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from idavlm.datasets.wesnoth.units import Unit

MIN_FRAMES = 8
"""Minimum number of usable frames of a character."""

VISIBLE = 128
"""Minimum alpha of a pixel that belongs to the figure."""

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
"""Activities and the words for them in file names. If a name contains several, the first entry here is used."""

_WORDS = {word: activity for activity, words in _ACTIVITIES.items() for word in words.split()}
_OTHER_WORDS = {"n", "ne", "se", "s", "nw", "sw", "e", "w", "female", "male", "base", "bob", "idle", "stand", "long"}
_GLARE = re.compile("teleport|-halo")
_PRECEDENCE = list(_ACTIVITIES)


@dataclass(frozen=True, slots=True)
class Frame:
    """A sprite: ``pixels`` ``[H, W, 4]`` uint8, cropped to the visible part; ``file`` below the game's image folder."""

    file: str
    activity: str
    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class Character:
    """A character: one unit, or several units that share sprites; name and description are those of the first."""

    key: str
    name: str
    race: str
    description: str
    profiles: tuple[str, ...]
    frames: tuple[Frame, ...]


def read_characters(data: Path, units: Sequence[Unit], *, min_frames: int = MIN_FRAMES) -> list[Character]:
    """Read the characters with at least ``min_frames`` frames, in the order of the units.

    Units become one character if they name the same file or files with equal pixels. A file that no unit names belongs
    to the unit in the same folder whose base image has the same name up to words like "attack".

    Args:
        data: data folder of the game, with ``core/images`` and optionally ``campaigns/*/images``.
        units: result of :func:`read_units`.
        min_frames: minimum number of frames of a character.
    """
    sprites = _read_sprites(data)
    names = _sprites_of_units(units, sprites)
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


def activity_of(file: str, base: str = "", default: str = "standing") -> str:
    """Activity of a frame according to its file name: ``"archer-bow-attack1.png"`` is "shooting".

    Args:
        file: file of the frame.
        base: base image of the unit; its name is not part of the activity.
        default: activity if the name contains none.
    """
    stem, base_stem = Path(file).stem, Path(base).stem
    found = {_WORDS[word] for word in re.findall("[a-z]+", stem.removeprefix(base_stem)) if word in _WORDS}
    return min(found, key=_PRECEDENCE.index, default=default)


def _read_sprites(data: Path) -> dict[str, np.ndarray]:
    """Read all unit sprites, ``[H, W, 4]`` uint8, by file name."""
    sprites = {}
    for images in [data / "core" / "images", *sorted(data.glob("campaigns/*/images"))]:
        for file in sorted(images.glob("units/**/*.png")):
            with Image.open(file) as image:
                sprites.setdefault(file.relative_to(images).as_posix(), np.array(image.convert("RGBA")))
    return sprites


def _sprites_of_units(units: Sequence[Unit], sprites: Mapping[str, np.ndarray]) -> list[set[str]]:
    names = [{name for name in unit.sprites if name in sprites} for unit in units]
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
    """Whether the rest of a file name denotes a frame: "+female-die-2" does, "-bat" (another creature) does not."""
    return rest[:1] in "-+_0123456789" and all(
        word in _WORDS or word in _OTHER_WORDS for word in re.findall("[a-z]+", rest)
    )


def _groups_that_share(
    units: Sequence[Unit], names: Sequence[set[str]], sprites: Mapping[str, np.ndarray]
) -> list[list[int]]:
    """Group the indices of units that share a sprite (union-find)."""
    parent = list(range(len(units)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    owner: dict[bytes, int] = {}
    for index, files in enumerate(names):
        for name in sorted(files):
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
    """Frames that show most of the figure, without duplicates, flames, halos, small companions and remains."""
    areas = {name: int((pixels[..., 3] >= VISIBLE).sum()) for name, pixels in sprites.items()}
    usual = np.median(list(areas.values())) if areas else 0
    default = "flying" if any(unit.flies for unit in units) else "standing"
    frames, seen = [], set()
    for name, pixels in sprites.items():
        if areas[name] < max(0.6 * usual, 100) or _GLARE.search(name) or pixels.tobytes() in seen:
            continue
        seen.add(pixels.tobytes())
        base = max((unit.image for unit in units if _begins(name, unit.image)), key=len, default="")
        frames.append(Frame(name, activity_of(name, base, default), _cut(pixels)))
    return frames


def _begins(name: str, image: str) -> bool:
    return bool(image) and name.startswith(image.removesuffix(".png"))


def _cut(pixels: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero((pixels[..., 3] > 0).any(1))
    columns = np.flatnonzero((pixels[..., 3] > 0).any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
