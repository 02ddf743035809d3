"""MM-ID (IDA-VLM, arXiv 2407.07577): 585 items of six tasks about people in films, animations and image sets."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from idavlm.data import RecordDataset
from idavlm.data.readers import MMID_TYPES
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ParseBox, score_answers
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.image_files import image_size

_MMID_NAME = {ours: theirs for theirs, ours in MMID_TYPES.items()}


def load_mmid(data: Path, images: Path | None) -> list[Item]:
    """Load ``benchmark_mmid.json``. Its paths (``./images/movie/...``) are relative to ``images``.

    The default of ``images`` is the folder of the file, as in the release.
    """
    root = images if images is not None else data.parent
    samples = RecordDataset(data, root, reader="mmid")
    return [
        Item(sample, {"task": _MMID_NAME[sample.task], "domain": domain_of(sample.images[0])}) for sample in samples
    ]


def domain_of(path: str) -> str:
    """``"movie"``, ``"animation"`` or ``"match"``: the folder below ``images``."""
    parts = PurePosixPath(path).parts
    return parts[parts.index("images") + 1] if "images" in parts[:-2] else parts[0]


def score_mmid(items: Sequence[Item], answers: Sequence[Answer], parse_box: ParseBox | None) -> EvaluationResult:
    """Compute the scores that need no judge.

    - ``matching``: accuracy.
    - ``location``: mean IoU and accuracy at IoU 0.5.
    - ``QA_*``: accuracy among the right and the false answers, by likelihood (``accuracy``) and by the candidate that
      is closest to the generated text (``closest_accuracy``).
    - ``caption_*``: precision, recall and F1 of character names, full or in part.
    """
    samples = [item.sample for item in items]
    return score_answers(samples, answers, parse_box=parse_box, prose=True, image_size=image_size)


def identity_key(name: str, path: str) -> str:
    """Film and character: the file names of a character share the part before ``_shot_``."""
    file = PurePosixPath(path)
    return f"{file.parent}/{file.stem.split('_shot_')[0]}"


MMID = EvaluationTask(
    name="mmid",
    description="MM-ID: matching, location, questions and captions about characters (benchmark_mmid.json)",
    load=load_mmid,
    score=score_mmid,
    boxes=True,
    write_choices=True,
    judged=("qa_single", "qa_multi", "caption_single", "caption_multi"),
    identity_key=identity_key,
    max_new_tokens=256,
)
