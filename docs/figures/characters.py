"""Draws docs/figures/characters.jpg:  python docs/figures/characters.py FOLDER  (a data set of build_characters)."""

import sys
from pathlib import Path

from PIL import Image

COLUMNS, SIDE, GAP = 6, 128, 4


def main(folder: Path) -> None:
    """Two rows of scenes, and one of photos: three of each of two characters."""
    scenes = sorted((folder / "images/train/scenes").glob("*.jpg"))[: 2 * COLUMNS]
    photos = [folder / f"images/train/photos/{one:04d}-{number}.jpg" for one in (0, 1) for number in range(3)]
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) - GAP, 3 * (SIDE + GAP) - GAP), "white")
    for number, path in enumerate(scenes + photos):
        row, column = divmod(number, COLUMNS)
        with Image.open(path) as picture:
            sheet.paste(picture.resize((SIDE, SIDE)), (column * (SIDE + GAP), row * (SIDE + GAP)))
    sheet.save(Path(__file__).with_suffix(".jpg"), quality=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
