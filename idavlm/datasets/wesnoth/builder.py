"""Real art: characters of Battle for Wesnoth, their pictures and records, in one folder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from idavlm.datasets.album import Album, Picture
from idavlm.datasets.dataset_folder import build_once, write_records
from idavlm.datasets.jpeg import save_jpeg
from idavlm.datasets.record_composer import RecordComposer, drawn_names, own_names
from idavlm.datasets.wesnoth.backgrounds import Ground, cut, read_grounds
from idavlm.datasets.wesnoth.general import general_records
from idavlm.datasets.wesnoth.package import find_data
from idavlm.datasets.wesnoth.painting import paint
from idavlm.datasets.wesnoth.planning import Role, cast_of, cast_roles, plan_photos, plan_scenes, split_characters
from idavlm.datasets.wesnoth.sprites import Character, read_characters
from idavlm.datasets.wesnoth.units import read_units
from idavlm.utils.checks import check_positive

NAME = "wesnoth"
VERSION = 7
SCENE_SIZES = {"train": (2, 3, 4), "test": (3, 4), "validation": (3, 4)}
"""Numbers of people in the scenes of each split, in turn."""

LEAST = {"num_photos": 4, "num_train_scenes": 3, "num_test_scenes": 2, "num_test_records": 2, "size": 48}
"""Options that must not be smaller; photos: two references and two to ask about."""

MIN_CHARACTERS = 4
"""Characters that every split needs: matching shows four."""


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
) -> Path:
    """Cut out characters of Wesnoth and write records about them; returns at once where ``root`` holds just that.

    Writes ``images/``, ``train.jsonl``, ``test.jsonl`` and ``validation.jsonl`` (of different characters),
    ``general.jsonl`` (no identities), ``characters.jsonl`` (who they are) and ``dataset.json``. The same options and
    package give the same bytes. About 195 characters come to three fifths, one fifth and one fifth; units of one line
    (an elvish archer and the ranger it becomes) are different characters and may fall into different splits.

    Training characters also come in other palettes, each an identity of its own. In training names are drawn anew for
    every record, from the names of all units, so that no name of the test is a new word; in test and validation
    everybody has their own. In the game's own palette everybody's team is red: what tells test characters apart is
    what they look like.

    Args:
        root: folder of the data set; see :func:`build_once` for what it may hold.
        package: a ``.deb`` of wesnoth-1.16-data or the folder of an unpacked one; None fetches it with apt-get into
            the cache (``~/.cache/idavlm``, or ``$IDAVLM_CACHE``).
        num_palettes: identities made of each training character, the plain one among them.
        num_photos: pictures of each identity alone, at least 4; twice as many of the plain ones.
        num_train_scenes: pictures of two to four training identities; ``num_test_scenes``: of three or four
            characters, for the test and for validation each.
        num_general: pictures of grounds, landscapes and portraits, with a record each.
        num_train_records: records recombine pictures, so they cost nothing but reading.
        num_test_records: evaluation records of matching and of location; half as many of each other task.
        size: width and height of the pictures in pixels.

    Raises:
        ValueError: an option out of its range, or a package of too few characters.
        FileNotFoundError: ``package`` is not there, or holds no data of Wesnoth.
        RuntimeError: the package could not be fetched or unpacked; the message says what to do by hand.
        FileExistsError: ``root`` holds something that is no data set.
    """
    options = {name: value for name, value in locals().items() if name not in ("root", "package")}
    check_positive(**{name: value for name, value in options.items() if name != "seed"})
    for name, least in LEAST.items():
        if options[name] < least:
            raise ValueError(f"{name}={options[name]} must be at least {least}.")
    return build_once(root, NAME, VERSION, options, lambda folder: _build(folder, package, options))


def _build(folder: Path, package: str | Path | None, options: Mapping[str, int]) -> Mapping[str, Any]:
    seed, size = options["seed"], options["size"]
    data = find_data(package)
    splits = split_characters(read_characters(data, read_units(data)), Random(f"{seed} splits"))
    for split, characters in splits.items():
        if len(characters) < MIN_CHARACTERS:
            raise ValueError(f"{data} has {len(characters)} characters for {split}, at least {MIN_CHARACTERS} needed.")
    grounds = read_grounds(data, Random(f"{seed} grounds"))
    counts: dict[str, int] = {}
    all_names = drawn_names([one.name for characters in splits.values() for one in characters])
    for split, characters in splits.items():
        rng, training = Random(f"{seed} {split}"), split == "train"
        roles = cast_roles(characters, options["num_palettes"] if training else 1, rng)
        num_scenes = options["num_train_scenes" if training else "num_test_scenes"]
        sizes = [SCENE_SIZES[split][i % len(SCENE_SIZES[split])] for i in range(num_scenes)]
        plan = plan_photos(split, roles, options["num_photos"], rng) + plan_scenes(split, roles, sizes, rng)
        album = Album(_paint_all(plan, roles, grounds, folder / "images", size, rng), cast_of(roles))
        naming = all_names if training else own_names({role.key: role.character.name for role in roles})
        composer = RecordComposer(album, rng, naming)
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
    return {"splits": {split: [one.key for one in members] for split, members in splits.items()}, "counts": counts}


def _paint_all(
    plan: Sequence[Picture], roles: Sequence[Role], grounds: Sequence[Ground], image_root: Path, size: int, rng: Random
) -> list[Picture]:
    """Paint the pictures, write them below ``image_root`` and return them with the boxes of their people."""
    for parent in {(image_root / picture.path).parent for picture in plan}:
        parent.mkdir(parents=True, exist_ok=True)
    by_key = {role.key: role for role in roles}
    painted = []
    for picture in plan:
        cast = [by_key[person.identity] for person in picture.people]
        figures = [role.sprite(person.shot) for role, person in zip(cast, picture.people, strict=True)]
        stretches = [role.recolouring.stretch for role in cast]
        image, boxes = paint(figures, stretches, cut(rng.choice(grounds), size, rng), rng)
        save_jpeg(image, image_root / picture.path)
        people = tuple(replace(person, box=box) for person, box in zip(picture.people, boxes, strict=True))
        painted.append(replace(picture, people=people))
    return painted


def _write_catalogue(folder: Path, splits: Mapping[str, Sequence[Character]]) -> None:
    """Who the characters are, as the game tells it, for people who look at the data set."""
    rows = [
        {
            "key": one.key,
            "split": split,
            "name": one.name,
            "race": one.race,
            "description": one.description,
            "frames": {frame.file: frame.activity for frame in one.frames},
        }
        for split, characters in splits.items()
        for one in characters
    ]
    write_records(folder / "characters.jsonl", rows)
