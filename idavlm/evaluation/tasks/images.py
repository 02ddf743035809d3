"""Pictures of a benchmark: which are missing, and how large one is."""

from collections.abc import Sequence

from PIL import Image, ImageOps

from idavlm.data.errors import DataError
from idavlm.data.images import ImageStore
from idavlm.data.schema import Sample
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.tasks.task import Item
from idavlm.utils import check_choice

MISSING = ("fail", "skip")


def image_size(sample: Sample) -> tuple[int, int] | None:
    """Height and width, upright, of the last picture of ``sample``; None where it is not on the disk."""
    if sample.image_root is None or not sample.message_images:
        return None
    file = sample.image_root / sample.message_images[-1]
    if not file.is_file():
        return None
    with Image.open(file) as picture:  # reads the header alone, unless the picture has to be turned
        turned = ImageOps.exif_transpose(picture) if picture.getexif().get(0x0112, 1) > 1 else picture
        return turned.height, turned.width


def missing_images(items: Sequence[Item]) -> dict[str, list[str]]:
    """Every picture that is not there, once, with the ids of the items that need it."""
    missing: dict[str, list[str]] = {}
    there: dict[tuple, bool] = {}
    for item in items:
        for path in dict.fromkeys(item.sample.images):
            key = (item.sample.image_root, path)
            if key not in there:
                there[key] = (ImageStore(item.sample.image_root).root / path).is_file()
            if not there[key]:
                missing.setdefault(path, []).append(item.sample.id)
    return missing


def with_images(items: Sequence[Item], missing: str) -> tuple[list[Item], dict[str, list[str]]]:
    """Items whose pictures are all there, and the pictures that are not.

    Args:
        items: of a benchmark.
        missing: ``"fail"``: a missing picture is an error that lists all of them; ``"skip"``: its items are left out.

    Raises:
        DataError: pictures are missing and ``missing="fail"``, or no item is left.
    """
    check_choice("missing", missing, MISSING)
    absent = missing_images(items)
    gone = {number for numbers in absent.values() for number in numbers}
    kept = [item for item in items if item.sample.id not in gone]
    if absent and (missing == "fail" or not kept):
        listed = "\n  ".join(absent)
        root = items[0].sample.image_root
        raise DataError(
            f"{len(absent)} pictures of {len(gone)} items are not below {root}; is that the right folder? To leave "
            f"these items out: --missing skip.\n  {listed}",
            kind="image",
        )
    return kept, absent


def with_sizes(
    items: Sequence[Item], answers: Sequence[Answer], missing: str
) -> tuple[list[Item], list[Answer], dict[str, list[str]]]:
    """Items whose boxes can be read where boxes count in parts of a picture: its size must be known.

    It is, where the answer has it, the data have it, or the picture is there.

    Args:
        items: of a benchmark.
        answers: one an item.
        missing: as in :func:`with_images`.

    Returns:
        Items and answers that are left, and the pictures whose size is not known.

    Raises:
        DataError: sizes are missing and ``missing="fail"``.
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
            f"the size of {len(unknown)} pictures is not known, and the boxes count in parts of them. Give --images "
            f"with the right folder (now {items[0].sample.image_root}), or leave these items out: --missing skip."
            f"\n  {listed}",
            kind="image",
        )
    gone = {number for numbers in unknown.values() for number in numbers}
    kept = [pair for pair in zip(items, answers, strict=True) if pair[0].sample.id not in gone]
    return [item for item, _ in kept], [answer for _, answer in kept], unknown
