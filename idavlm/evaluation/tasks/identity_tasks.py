"""The six identity tasks: MM-ID (IDA-VLM, arXiv 2407.07577), and own records in the schema of idavlm."""

from functools import partial
from pathlib import Path, PurePosixPath

from idavlm.data import RecordDataset
from idavlm.data.readers import MMID_TYPES
from idavlm.evaluation.tasks.base import EvaluationTask, Item, score_items

_MMID_NAME = {ours: theirs for theirs, ours in MMID_TYPES.items()}


def load_mmid(data: Path, images: Path | None) -> list[Item]:
    """Load ``benchmark_mmid.json``. Its paths (``./images/movie/...``) are relative to ``images``.

    The default of ``images`` is the folder of the file, as in the release. The domain is the folder below ``images``:
    movie, animation or match.
    """
    items = []
    for sample in RecordDataset(data, images if images is not None else data.parent, reader="mmid"):
        parts = PurePosixPath(sample.images[0]).parts
        domain = parts[parts.index("images") + 1] if "images" in parts[:-2] else parts[0]
        items.append(Item(sample, {"task": _MMID_NAME[sample.task], "domain": domain}))
    return items


def load_records(data: Path, images: Path | None) -> list[Item]:
    """Load a ``.jsonl`` file. Paths are relative to ``images``, by default the folder ``images`` next to the file."""
    return [Item(sample, {"task": sample.task or ""}) for sample in RecordDataset(data, images)]


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
