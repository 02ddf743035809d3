"""Draw docs/figures/characters.jpg: two rows of scenes, and three reference photos each of two characters.

python docs/figures/characters.py FOLDER        # FOLDER: a data set of build_characters
"""

import sys
from pathlib import Path

from PIL import Image

COLUMNS, SIDE, GAP = 6, 128, 4


def main(folder: Path) -> None:
    scenes = sorted((folder / "images/train/scenes").glob("*.jpg"))[: 2 * COLUMNS]
    photos = [
        folder / f"images/train/photos/{character:04d}-{number}.jpg" for character in (0, 1) for number in range(3)
    ]
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) - GAP, 3 * (SIDE + GAP) - GAP), "white")
    for number, path in enumerate(scenes + photos):
        row, column = divmod(number, COLUMNS)
        with Image.open(path) as image:
            sheet.paste(image.resize((SIDE, SIDE)), (column * (SIDE + GAP), row * (SIDE + GAP)))
    sheet.save(Path(__file__).with_suffix(".jpg"), quality=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
