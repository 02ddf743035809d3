"""Backgrounds from the game: grounds of hexagonal tiles, and landscapes of the story images."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

GROUNDS: dict[str, tuple[str, ...]] = {
    "grass": ("grass/green", "grass/semi-dry", "grass/dry"),
    "leaves": ("grass/leaf-litter",),
    "sand": ("sand/desert", "sand/beach"),
    "snow": ("frozen/snow",),
    "ice": ("frozen/ice",),
    "dirt": ("flat/dirt", "flat/dirt-dark", "flat/desert-road"),
    "cobbles": ("flat/road", "flat/road-clean"),
    "mud": ("swamp/mud",),
    "rock": ("cave/earthy-floor", "cave/floor"),
    "stone": ("interior/stone-regular", "cave/flagstones-dark"),
    "wood": ("interior/wood-regular", "interior/wood-tan"),
}
"""Kinds of ground, and their tiles below the game's ``terrain`` folder, without number and ``.png``."""

TILE_COLUMN, TILE_ROW = 54, 72
"""Distance of adjacent hexagons. Tiles are 72 x 72 pixels; every second column is half a row lower."""

_MOSAIC = 256
_STORY_HEIGHT = 320


@dataclass(frozen=True, slots=True)
class Ground:
    """A large image that backgrounds are cropped from.

    Attributes:
        kind: a key of :data:`GROUNDS`, or for a landscape the word in its file name, such as "hills" or "castle".
        image: RGB, larger than any crop.
        landscape: whether the view is from the side and not from above.
    """

    kind: str
    image: Image.Image
    landscape: bool = False


def read_grounds(data: Path, rng: Random) -> list[Ground]:
    """Read all grounds and landscapes below ``data``, the data folder of the game.

    Raises:
        FileNotFoundError: there are none.
    """
    images = data / "core" / "images"
    grounds = []
    for kind, names in GROUNDS.items():
        for name in names:
            tiles = [_read_tile(file) for file in _numbered(images / "terrain" / name)]
            if tiles:
                grounds.append(Ground(kind, _lay(tiles, rng)))
    for file in sorted((images / "story").glob("landscape-*.jpg")):
        with Image.open(file) as image:
            width = round(image.width * _STORY_HEIGHT / image.height)
            image = image.convert("RGB").resize((width, _STORY_HEIGHT), Image.Resampling.BICUBIC)
            grounds.append(Ground(re.split("[-_]", file.stem)[1], image, landscape=True))
    if not grounds:
        raise FileNotFoundError(f"no terrain and no story images below {images}; pass the data folder of Wesnoth.")
    return grounds


def cut(ground: Ground, size: int, rng: Random) -> Image.Image:
    """Random square crop of the ground at a random scale, resized to ``size`` pixels, mirrored with probability 1/2."""
    side = rng.randint(160, min(300, *ground.image.size)) if ground.landscape else rng.randint(96, 160)
    left, top = (rng.randint(0, extent - side) for extent in ground.image.size)
    piece = ground.image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece


def _numbered(stem: Path) -> list[Path]:
    """``stem.png``, ``stem2.png``, ``stem3.png`` ..."""
    files = [stem.parent / f"{stem.name}{number}.png" for number in ("", *range(2, 10))]
    return [file for file in files if file.is_file()]


def _read_tile(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGBA")


def _lay(tiles: Sequence[Image.Image], rng: Random) -> Image.Image:
    mosaic = Image.new("RGB", (_MOSAIC, _MOSAIC))
    for column in range(-1, _MOSAIC // TILE_COLUMN + 1):
        for row in range(-1, _MOSAIC // TILE_ROW + 1):
            # The first tile is the base tile; the others are variations of it.
            tile = tiles[0] if rng.random() < 0.4 else rng.choice(tiles)
            place = (column * TILE_COLUMN, row * TILE_ROW + (TILE_ROW // 2) * (column % 2))
            mosaic.paste(tile, place, tile)
    return mosaic
