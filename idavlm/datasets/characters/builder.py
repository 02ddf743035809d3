"""Builder of the characters data set."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from idavlm.datasets.album import Album, AlbumImage
from idavlm.datasets.characters.drawing import draw_all
from idavlm.datasets.characters.general import GeneralImage, general_records, plan_general
from idavlm.datasets.characters.planning import SPLITS, plan_photos, plan_scenes
from idavlm.datasets.dataset_folder import build_once, write_records
from idavlm.datasets.record_composer import FIRST_NAMES, RecordComposer, RecordOptions, drawn_names
from idavlm.utils.checks import check_positive

NAME = "characters"
VERSION = 11

SCENE_SIZES = {"train": (2, 3, 4), "test": (3, 4)}
"""Numbers of identities in the scenes of each split, in turn."""

MINIMUM = {
    "num_train": 5,
    "num_test": 5,
    "num_photos": 4,
    "num_train_scenes": 4,
    "num_test_scenes": 4,
    "num_test_records": 2,
    "size": 48,
    "seed": 0,
}
"""Minimum values of options, if they are not 1."""


def build_characters(
    root: str | Path,
    *,
    num_train: int = 1500,
    num_test: int = 100,
    num_photos: int = 4,
    num_train_scenes: int = 6000,
    num_test_scenes: int = 200,
    num_general: int = 800,
    num_train_records: int = 16_000,
    num_test_records: int = 200,
    num_general_records: int = 4000,
    size: int = 128,
    seed: int = 0,
    records: RecordOptions = RecordOptions(),  # noqa: B008 - it is frozen
    num_workers: int = 2,
) -> Path:
    """Build the characters data set: drawn characters with many visual attributes. Nothing is downloaded.

    Writes ``images/``, ``train.jsonl`` (training identities), ``general.jsonl`` (no identities), ``test.jsonl``
    (held-out identities) and ``dataset.json``. The same options produce the same bytes. If ``root`` already contains
    the data set with these options, nothing is done.

    Args:
        root: folder of the data set; see :func:`build_once` for its requirements.
        num_train: number of training identities, at least 5.
        num_test: number of held-out identities, at least 5.
        num_photos: images of each identity alone, at least 4: two references and two for questions.
        num_train_scenes: training images of two to four identities.
        num_test_scenes: test images of three or four identities.
        num_general: general images (objects without characters).
        num_train_records: training records. They recombine the images.
        num_test_records: evaluation records of matching and of location; the other tasks have half as many each.
        num_general_records: records about general images.
        size: width and height of the images in pixels.
        seed: seed of all random choices.
        records: photos per identity, number of choices, absent identities.
        num_workers: processes that draw. The result does not depend on it.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: an option is out of range.
        FileExistsError: ``root`` contains something other than a data set.
    """
    options = {name: value for name, value in locals().items() if name not in ("root", "num_workers", "records")}
    check_positive(num_workers=num_workers, **{name: value for name, value in options.items() if name != "seed"})
    for name, minimum in MINIMUM.items():
        if options[name] < minimum:
            raise ValueError(f"{name}={options[name]} must be at least {minimum}.")
    records.check_photos(num_photos)
    options["records"] = asdict(records)
    return build_once(root, NAME, VERSION, options, lambda folder: _build(folder, options, num_workers))


def _build(folder: Path, options: Mapping[str, Any], num_workers: int) -> Mapping[str, Any]:
    seed = options["seed"]
    general = plan_general(options["num_general"], Random(f"{seed} general"))
    plan: dict[str, Sequence[AlbumImage | GeneralImage]] = {"general": general}
    for split in SPLITS:
        rng, identities, scenes = Random(f"{seed} {split}"), options[f"num_{split}"], options[f"num_{split}_scenes"]
        sizes = [SCENE_SIZES[split][i % len(SCENE_SIZES[split])] for i in range(scenes)]
        photos = plan_photos(split, identities, options["num_photos"], rng)
        plan[split] = photos + plan_scenes(split, identities, sizes, rng)
    drawn = draw_all(
        [image for images in plan.values() for image in images],
        folder / "images",
        size=options["size"],
        seed=seed,
        num_workers=num_workers,
    )
    albums = {split: Album([image for image in drawn if image.path.startswith(f"{split}/")]) for split in SPLITS}
    train, test = (
        RecordComposer(
            albums[split],
            Random(f"{seed} {split} records"),
            drawn_names(FIRST_NAMES),
            options=RecordOptions(**options["records"]),
        )
        for split in SPLITS
    )
    records = {
        "train": train.training(options["num_train_records"]),
        "test": test.evaluation(options["num_test_records"]),
        "general": general_records(general, options["num_general_records"], Random(f"{seed} general records")),
    }
    counts = {name: write_records(folder / f"{name}.jsonl", rows) for name, rows in records.items()}
    counts |= {f"{part}_images": len(images) for part, images in plan.items()}
    return {"splits": {split: list(album.photos) for split, album in albums.items()}, "counts": counts}
