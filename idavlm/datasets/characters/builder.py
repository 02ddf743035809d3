"""The embedded default data set: drawn characters, their pictures and records, in one folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from idavlm.datasets.album import Album, Picture
from idavlm.datasets.characters.drawing import draw_all
from idavlm.datasets.characters.general import Still, general_records, plan_stills
from idavlm.datasets.characters.planning import SPLITS, plan_photos, plan_scenes
from idavlm.datasets.dataset_folder import build_once, write_records
from idavlm.datasets.first_names import NAMES
from idavlm.datasets.record_composer import RecordComposer, drawn_names
from idavlm.utils.checks import check_positive

NAME = "characters"
VERSION = 8

SCENE_SIZES = {"train": (2, 3, 4), "test": (3, 4)}
"""People in the scenes of each split, in turn."""

LEAST = {
    "num_train": 5,
    "num_test": 5,
    "num_photos": 4,
    "num_train_scenes": 4,
    "num_test_scenes": 4,
    "num_test_records": 2,
    "size": 48,
    "seed": 0,
}
"""Smallest values of options that need more than 1 (and of the seed)."""


def build_characters(
    root: str | Path,
    *,
    num_train: int = 1500,
    num_test: int = 100,
    num_photos: int = 4,
    num_train_scenes: int = 2500,
    num_test_scenes: int = 200,
    num_general: int = 800,
    num_train_records: int = 24_000,
    num_test_records: int = 200,
    num_general_records: int = 4000,
    size: int = 128,
    seed: int = 0,
    num_workers: int = 2,
) -> Path:
    """Draw characters and write records about them; returns at once where ``root`` already holds just that.

    Writes ``images/``, ``train.jsonl`` (training identities), ``general.jsonl`` (no identities), ``test.jsonl``
    (held-out identities) and ``dataset.json``. The same options give the same bytes.

    Args:
        root: folder of the data set; see :func:`build_once` for what it may hold.
        num_train: identities of ``train.jsonl``, at least 5; ``num_test`` those of ``test.jsonl``.
        num_photos: pictures of each identity alone, at least 4: two references and two to ask about.
        num_train_scenes: pictures of two to four identities; ``num_test_scenes``: of three or four.
        num_general: pictures of things.
        num_train_records: records recombine pictures, so they cost nothing but reading.
        num_test_records: evaluation records of matching and of location; half as many of each other task.
        size: width and height of the pictures in pixels.
        num_workers: processes that draw; the result does not depend on it.

    Raises:
        ValueError: an option out of its range.
        FileExistsError: ``root`` holds something that is no data set.
    """
    options = {name: value for name, value in locals().items() if name not in ("root", "num_workers")}
    check_positive(num_workers=num_workers, **{name: value for name, value in options.items() if name != "seed"})
    for name, least in LEAST.items():
        if options[name] < least:
            raise ValueError(f"{name}={options[name]} must be at least {least}.")
    return build_once(root, NAME, VERSION, options, lambda folder: _build(folder, options, num_workers))


def _build(folder: Path, options: Mapping[str, int], num_workers: int) -> Mapping[str, Any]:
    seed = options["seed"]
    stills = plan_stills(options["num_general"], Random(f"{seed} general"))
    plan: dict[str, Sequence[Picture | Still]] = {"general": stills}
    for split in SPLITS:
        rng, identities, scenes = Random(f"{seed} {split}"), options[f"num_{split}"], options[f"num_{split}_scenes"]
        sizes = [SCENE_SIZES[split][i % len(SCENE_SIZES[split])] for i in range(scenes)]
        photos = plan_photos(split, identities, options["num_photos"], rng)
        plan[split] = photos + plan_scenes(split, identities, sizes, rng)
    drawn = draw_all(
        [picture for part in plan.values() for picture in part],
        folder / "images",
        size=options["size"],
        seed=seed,
        num_workers=num_workers,
    )
    albums = {split: Album([one for one in drawn if one.path.startswith(f"{split}/")]) for split in SPLITS}
    train, test = (
        RecordComposer(albums[split], Random(f"{seed} {split} records"), drawn_names(NAMES)) for split in SPLITS
    )
    records = {
        "train": train.training(options["num_train_records"]),
        "test": test.evaluation(options["num_test_records"]),
        "general": general_records(stills, options["num_general_records"], Random(f"{seed} general records")),
    }
    counts = {name: write_records(folder / f"{name}.jsonl", rows) for name, rows in records.items()}
    counts |= {f"{part}_images": len(pictures) for part, pictures in plan.items()}
    return {"splits": {split: list(album.photos) for split, album in albums.items()}, "counts": counts}
