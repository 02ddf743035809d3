"""Image files of a benchmark: leave out items whose images are missing or of unknown size, or raise an error."""

from collections.abc import Mapping, Sequence

from idavlm.data import ImageStore
from idavlm.data.errors import DataError
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.tasks.base import Item
from idavlm.utils import check_choice

MISSING = ("fail", "skip")
"""What to do about missing files: raise an error, or leave out the items that need them."""


def missing_images(items: Sequence[Item]) -> dict[str, list[str]]:
    """Paths of missing image files, each with the ids of the items that need it."""
    missing: dict[str, list[str]] = {}
    exists: dict[tuple, bool] = {}
    for item in items:
        for path in dict.fromkeys(item.sample.images):
            key = (item.sample.image_root, path)
            if key not in exists:
                exists[key] = ImageStore(item.sample.image_root or "").has(path)
            if not exists[key]:
                missing.setdefault(path, []).append(item.sample.id)
    return missing


def with_images(items: Sequence[Item], missing: str) -> tuple[list[Item], dict[str, list[str]]]:
    """Items whose image files all exist, and the missing files with the ids of the items that need them.

    Args:
        items: items of a benchmark.
        missing: ``"fail"``: missing files are an error that lists them; ``"skip"``: their items are left out.

    Raises:
        DataError: files are missing and ``missing="fail"``, or no item is left.
    """
    absent = missing_images(items)
    return _without(items, absent, missing, "{files} image files of {items} items are missing in {root}"), absent


def with_sizes(
    items: Sequence[Item], answers: Sequence[Answer], missing: str
) -> tuple[list[Item], dict[str, list[str]]]:
    """Items whose image size is known, which is needed to parse boxes in relative coordinates.

    The size comes from the answer, the data, or the image file.

    Args:
        items: items of a benchmark.
        answers: one per item.
        missing: as in :func:`with_images`.

    Returns:
        Remaining items, and the images of unknown size with the ids of the items that need them.

    Raises:
        DataError: sizes are unknown and ``missing="fail"``, or no item is left.
    """
    unknown: dict[str, list[str]] = {}
    for item, answer in zip(items, answers, strict=True):
        if item.asks_for_boxes and not (answer.image_size or item.image_size()):
            unknown.setdefault(item.sample.message_images[-1], []).append(item.sample.id)
    problem = "the size of {files} images is unknown (in {root}), but the box format has relative coordinates"
    return _without(items, unknown, missing, problem), unknown


def _without(items: Sequence[Item], absent: Mapping[str, list[str]], missing: str, problem: str) -> list[Item]:
    """Items that need none of the ``absent`` files (path -> ids of items)."""
    check_choice("missing", missing, MISSING)
    skipped = {sample_id for sample_ids in absent.values() for sample_id in sample_ids}
    kept = [item for item in items if item.sample.id not in skipped]
    if absent and (missing == "fail" or not kept):
        problem = problem.format(files=len(absent), items=len(skipped), root=items[0].sample.image_root)
        listed = "\n  ".join(absent)
        raise DataError(
            f"{problem}; pass the right folder with --images, or leave the items out with --missing skip.\n  {listed}",
            kind="image",
        )
    return kept
