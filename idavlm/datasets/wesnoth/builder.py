"""Builder of the Wesnoth data set."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

from idavlm.datasets.album import Album, AlbumImage
from idavlm.datasets.dataset_folder import build_once, save_jpeg, write_records
from idavlm.datasets.record_composer import RecordComposer, RecordOptions, drawn_names, own_names
from idavlm.datasets.wesnoth.backgrounds import Ground, cut, read_grounds
from idavlm.datasets.wesnoth.general import general_records
from idavlm.datasets.wesnoth.package import find_data
from idavlm.datasets.wesnoth.painting import paint
from idavlm.datasets.wesnoth.planning import (
    Variant,
    make_variants,
    plan_photos,
    plan_scenes,
    split_characters,
    variant_sampler,
)
from idavlm.datasets.wesnoth.sprites import Character, read_characters
from idavlm.datasets.wesnoth.units import read_units
from idavlm.utils.checks import check_positive

NAME = "wesnoth"
VERSION = 10
SCENE_SIZES = {"train": (2, 3, 4), "test": (3, 4), "validation": (3, 4)}
"""Numbers of identities in the scenes of each split, in turn."""

MINIMUM = {"num_photos": 4, "num_train_scenes": 3, "num_test_scenes": 2, "num_test_records": 2, "size": 48}
"""Minimum values of options, if they are not 1. Photos: two references and two for questions."""

MIN_CHARACTERS = 4
"""Minimum number of characters per split, because a matching record shows four identities."""


def build_wesnoth(
    root: str | Path,
    *,
    package: str | Path | None = None,
    num_palettes: int = 12,
    num_photos: int = 8,
    num_train_scenes: int = 4000,
    num_test_scenes: int = 240,
    num_general: int = 800,
    num_train_records: int = 24_000,
    num_test_records: int = 200,
    size: int = 128,
    seed: int = 0,
    records: RecordOptions = RecordOptions(),  # noqa: B008 - it is frozen
) -> Path:
    """Build the Wesnoth data set: images of the unit sprites of the game, and records about them.

    Writes ``images/``, ``train.jsonl``, ``test.jsonl`` and ``validation.jsonl`` (with different characters),
    ``general.jsonl`` (no identities), ``characters.jsonl`` (a list of the characters) and ``dataset.json``. The same
    options and package produce the same bytes. If ``root`` already contains the data set with these options, nothing
    is done. About 195 characters are split 3 : 1 : 1. The levels of a unit (an elvish archer and the ranger it
    becomes) are different characters and may be in different splits.

    Each training character also appears in other colour palettes, and each palette is an identity of its own. Training
    names are drawn again for every record, from the names of all units, so that test names are not new words. In test
    and validation, each character has its own name and the original palette, in which all team colours are red, so
    characters differ by their shape and colours and not by team.

    Args:
        root: folder of the data set; see :func:`build_once` for its requirements.
        package: a ``.deb`` file of wesnoth-1.16-data or a folder with its unpacked contents; None to download it with
            apt-get into the cache (``$IDAVLM_CACHE`` or ``~/.cache/idavlm``).
        num_palettes: identities per training character, including the one in the original palette.
        num_photos: images of each identity alone, at least 4; twice as many for identities in the original palette.
        num_train_scenes: training images of two to four identities.
        num_test_scenes: images of three or four identities, for test and for validation each.
        num_general: general images (grounds, landscapes and portraits), with one record each.
        num_train_records: training records. They recombine the images.
        num_test_records: evaluation records of matching and of location; the other tasks have half as many each.
        size: width and height of the images in pixels.
        seed: seed of all random choices.
        records: photos per identity, number of choices, absent identities.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: an option is out of range, or the package has too few characters.
        FileNotFoundError: ``package`` does not exist or contains no data of Wesnoth.
        RuntimeError: the package could not be downloaded or unpacked; the message describes the manual steps.
        FileExistsError: ``root`` contains something other than a data set.
    """
    options = {name: value for name, value in locals().items() if name not in ("root", "package", "records")}
    check_positive(**{name: value for name, value in options.items() if name != "seed"})
    for name, minimum in MINIMUM.items():
        if options[name] < minimum:
            raise ValueError(f"{name}={options[name]} must be at least {minimum}.")
    records.check_photos(num_photos)
    options["records"] = asdict(records)
    return build_once(root, NAME, VERSION, options, lambda folder: _build(folder, package, options))


def _build(folder: Path, package: str | Path | None, options: Mapping[str, Any]) -> Mapping[str, Any]:
    seed, size = options["seed"], options["size"]
    data = find_data(package)
    splits = split_characters(read_characters(data, read_units(data)), Random(f"{seed} splits"))
    for split, characters in splits.items():
        if len(characters) < MIN_CHARACTERS:
            raise ValueError(
                f"{data} has {len(characters)} characters for {split}, at least {MIN_CHARACTERS} are needed."
            )
    grounds = read_grounds(data, Random(f"{seed} grounds"))
    counts: dict[str, int] = {}
    all_names = drawn_names([character.name for characters in splits.values() for character in characters])
    for split, characters in splits.items():
        rng, training = Random(f"{seed} {split}"), split == "train"
        variants = make_variants(characters, options["num_palettes"] if training else 1, rng)
        num_scenes = options["num_train_scenes" if training else "num_test_scenes"]
        sizes = [SCENE_SIZES[split][i % len(SCENE_SIZES[split])] for i in range(num_scenes)]
        plan = plan_photos(split, variants, options["num_photos"], rng) + plan_scenes(split, variants, sizes, rng)
        images = _paint_all(plan, variants, grounds, folder / "images", size, rng)
        album = Album(images, variant_sampler(variants))
        naming = all_names if training else own_names({variant.key: variant.character.name for variant in variants})
        composer = RecordComposer(album, rng, naming, options=RecordOptions(**options["records"]))
        records = (
            composer.training(options["num_train_records"])
            if training
            else composer.evaluation(options["num_test_records"])
        )
        counts |= {f"{split}_images": len(plan), split: write_records(folder / f"{split}.jsonl", records)}
    general = general_records(
        splits,
        data,
        grounds,
        folder / "images",
        count=options["num_general"],
        size=size,
        rng=Random(f"{seed} general"),
    )
    counts["general"] = write_records(folder / "general.jsonl", general)
    _write_catalogue(folder, splits)
    return {
        "splits": {split: [character.key for character in members] for split, members in splits.items()},
        "counts": counts,
    }


def _paint_all(
    plan: Sequence[AlbumImage],
    variants: Sequence[Variant],
    grounds: Sequence[Ground],
    image_root: Path,
    size: int,
    rng: Random,
) -> list[AlbumImage]:
    """Paint the planned images, write them below ``image_root``, and return the plan with boxes."""
    for parent in {(image_root / image.path).parent for image in plan}:
        parent.mkdir(parents=True, exist_ok=True)
    by_key = {variant.key: variant for variant in variants}
    painted = []
    for planned in plan:
        shown = [by_key[appearance.identity] for appearance in planned.appearances]
        figures = [
            variant.sprite(appearance.shot) for variant, appearance in zip(shown, planned.appearances, strict=True)
        ]
        stretches = [variant.recolouring.stretch for variant in shown]
        image, boxes = paint(figures, stretches, cut(rng.choice(grounds), size, rng), rng)
        save_jpeg(image, image_root / planned.path)
        appearances = tuple(
            replace(appearance, box=box) for appearance, box in zip(planned.appearances, boxes, strict=True)
        )
        painted.append(replace(planned, appearances=appearances))
    return painted


def _write_catalogue(folder: Path, splits: Mapping[str, Sequence[Character]]) -> None:
    """Write ``characters.jsonl``: names, races, descriptions and frames of all characters, for inspection."""
    rows = [
        {
            "key": character.key,
            "split": split,
            "name": character.name,
            "race": character.race,
            "description": character.description,
            "frames": {frame.file: frame.activity for frame in character.frames},
        }
        for split, characters in splits.items()
        for character in characters
    ]
    write_records(folder / "characters.jsonl", rows)
