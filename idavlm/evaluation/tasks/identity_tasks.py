"""The six identity tasks: MM-ID (IDA-VLM, arXiv 2407.07577), and own records in the schema of idavlm."""

from functools import partial
from pathlib import Path, PurePosixPath

from idavlm.data import DataError, RecordDataset, Sample
from idavlm.data.errors import quote
from idavlm.data.readers import MMID_TYPES
from idavlm.evaluation.tasks.base import EvaluationTask, Item, score_items
from idavlm.utils.answer_parsing import parse_image_number

_MMID_NAME = {ours: theirs for theirs, ours in MMID_TYPES.items()}


def load_mmid(data: Path, images: Path | None) -> list[Item]:
    """Load ``benchmark_mmid.json``. Its paths (``./images/movie/...``) are relative to ``images``.

    The default of ``images`` is the folder of the file, as in the release. The domain is the folder below ``images``:
    movie, animation or match.
    """
    items = []
    for sample in RecordDataset(data, images if images is not None else data.parent, reader="mmid"):
        if not sample.images:
            raise DataError("the item has no image; add the fields that the question names.", where=sample.where)
        parts = PurePosixPath(sample.images[0]).parts
        domain = parts[parts.index("images") + 1] if "images" in parts[:-2] else "".join(parts[:1])
        items.append(Item(sample, {"task": _MMID_NAME[sample.task], "domain": domain}))
    return items


def load_records(data: Path, images: Path | None) -> list[Item]:
    """Load a ``.jsonl`` file. Paths are relative to ``images``, by default the folder ``images`` next to the file."""
    items = []
    for sample in RecordDataset(data, images):
        if not sample.is_evaluation:
            raise DataError(
                "the record has no 'answer', so it is a training record; pass evaluation records, such as test.jsonl.",
                where=sample.where,
            )
        if sample.task == "matching":
            _check_matching(sample)
        items.append(Item(sample, {"task": sample.task}))
    return items


def _check_matching(sample: Sample) -> None:
    """Check that the right answer and the false ones name images, because answers are scored by their numbers."""
    texts = [sample.answer, *sample.false_answers]
    count = len(texts) if sample.false_answers else None
    unclear = next((text for text in texts if parse_image_number(text, count=count) is None), None)
    if unclear is not None:
        most = "" if count is None else f" of the {count}"
        raise DataError(
            f"{quote(unclear)} is an answer of a matching record, but names no image{most}; expected a text like "
            "'Picture 3'.",
            where=sample.where,
        )


def mmid_identity_key(name: str, path: str) -> str:
    """Film and character: the file names of a character share the part before ``_shot_``."""
    file = PurePosixPath(path)
    return f"{file.parent}/{file.stem.split('_shot_')[0]}"


MMID = EvaluationTask(
    name="mmid",
    description="MM-ID: matching, location, questions and captions about characters (benchmark_mmid.json)",
    load=load_mmid,
    score=partial(score_items, prose=True),
    boxes=True,
    write_choices=True,
    judged=("qa_single", "qa_multi", "caption_single", "caption_multi"),
    identity_key=mmid_identity_key,
    max_new_tokens=256,
)

RECORDS = EvaluationTask(
    name="records",
    description="evaluation records in the schema of idavlm (test.jsonl)",
    load=load_records,
    score=score_items,
    boxes=True,
    judged=("caption_single", "caption_multi"),
)
