"""Image files of a benchmark: find missing files, determine image sizes."""

from collections.abc import Sequence

from PIL import Image, ImageOps

from idavlm.data.errors import DataError
from idavlm.data.images import ImageStore
from idavlm.data.schema import Sample
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.tasks.base import Item
from idavlm.utils import check_choice

MISSING = ("fail", "skip")
"""What to do about missing files: raise an error, or leave out the items that need them."""


def image_size(sample: Sample) -> tuple[int, int] | None:
    """Height and width of the last image of ``sample`` after EXIF rotation; None if the file is missing."""
    if sample.image_root is None or not sample.message_images:
        return None
    file = sample.image_root / sample.message_images[-1]
    if not file.is_file():
        return None
    with Image.open(file) as image:  # reads the header only, unless the image has to be rotated
        upright = ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) > 1 else image
        return upright.height, upright.width


def missing_images(items: Sequence[Item]) -> dict[str, list[str]]:
    """Paths of missing image files, each with the ids of the items that need it."""
    missing: dict[str, list[str]] = {}
    exists: dict[tuple, bool] = {}
    for item in items:
        for path in dict.fromkeys(item.sample.images):
            key = (item.sample.image_root, path)
            if key not in exists:
                exists[key] = (ImageStore(item.sample.image_root).root / path).is_file()
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
    check_choice("missing", missing, MISSING)
    absent = missing_images(items)
    skipped = {sample_id for sample_ids in absent.values() for sample_id in sample_ids}
    kept = [item for item in items if item.sample.id not in skipped]
    if absent and (missing == "fail" or not kept):
        listed = "\n  ".join(absent)
        root = items[0].sample.image_root
        raise DataError(
            f"{len(absent)} image files of {len(skipped)} items are missing in {root}; pass the right folder with "
            f"--images, or leave these items out with --missing skip.\n  {listed}",
            kind="image",
        )
    return kept, absent


def with_sizes(
    items: Sequence[Item], answers: Sequence[Answer], missing: str
) -> tuple[list[Item], list[Answer], dict[str, list[str]]]:
    """Items whose image size is known, which is needed to parse boxes in relative coordinates.

    The size comes from the answer, the data, or the image file.

    Args:
        items: items of a benchmark.
        answers: one per item.
        missing: as in :func:`with_images`.

    Returns:
        Remaining items, their answers, and the images of unknown size with the ids of the items that need them.

    Raises:
        DataError: sizes are unknown and ``missing="fail"``.
    """
    check_choice("missing", missing, MISSING)
    unknown: dict[str, list[str]] = {}
    for item, answer in zip(items, answers, strict=True):
        known = item.sample.task != "location" or answer.image_size or item.extra.get("size")
        if not known and image_size(item.sample) is None:
            unknown.setdefault(item.sample.message_images[-1], []).append(item.sample.id)
    if unknown and missing == "fail":
        listed = "\n  ".join(unknown)
        raise DataError(
            f"the size of {len(unknown)} images is unknown, but the box format has relative coordinates. Pass the "
            f"folder of the images with --images (now {items[0].sample.image_root}), or leave these items out with "
            f"--missing skip.\n  {listed}",
            kind="image",
        )
    skipped = {sample_id for sample_ids in unknown.values() for sample_id in sample_ids}
    kept = [pair for pair in zip(items, answers, strict=True) if pair[0].sample.id not in skipped]
    return [item for item, _ in kept], [answer for _, answer in kept], unknown
