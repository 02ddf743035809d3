"""The cast of a film: the people to look for, and their reference photos."""

from pathlib import Path

from idavlm.inference.film.frames import IMAGE_SUFFIXES, image_files


def read_cast(folder: str | Path) -> dict[str, list[Path]]:
    """Return the reference photos of each person by name.

    A sub-folder ``Kate/`` holds photos of Kate, whatever their names. A file ``Kate.jpg`` is a single photo of Kate.

    Raises:
        ValueError: the folder is missing or empty, a sub-folder holds no image, or a person is in it twice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; the cast is a folder with one sub-folder of photos per person.")
    cast: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            name, photos = entry.name, image_files(entry)
            if not photos:
                raise ValueError(f"{entry} holds no image; put reference photos of {name} into it.")
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            name, photos = entry.stem, [entry]
        else:
            continue
        if name in cast:
            raise ValueError(f"{folder} has {name} twice; put all photos of {name} into the folder {folder / name}.")
        cast[name] = photos
    if not cast:
        raise ValueError(f"{folder} holds no photo; put one sub-folder of photos per person into it.")
    return cast
