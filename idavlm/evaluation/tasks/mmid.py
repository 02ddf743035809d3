"""MM-ID (IDA-VLM, arXiv 2407.07577): 585 items of six types about people in films, animation and pictures to match."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from idavlm.data import RecordDataset
from idavlm.data.readers import MMID_TYPES
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ParseBox, score_answers
from idavlm.evaluation.tasks.images import image_size
from idavlm.evaluation.tasks.task import EvaluationTask, Item

_NAME_OF = {ours: theirs for theirs, ours in MMID_TYPES.items()}


def load_mmid(data: Path, images: Path | None) -> list[Item]:
    """Items of ``benchmark_mmid.json``; their paths (``./images/movie/...``) stand below ``images``.

    Without ``images`` they stand beside the file, as in the release.
    """
    root = images if images is not None else data.parent
    samples = RecordDataset(data, root, reader="mmid")
    return [Item(one, {"type": _NAME_OF[one.task], "domain": domain_of(one.images[0])}) for one in samples]


def domain_of(path: str) -> str:
    """``"movie"``, ``"animation"`` or ``"match"``: the folder below ``images``."""
    parts = PurePosixPath(path).parts
    return parts[parts.index("images") + 1] if "images" in parts[:-2] else parts[0]


def score_mmid(items: Sequence[Item], answers: Sequence[Answer], parse_box: ParseBox | None) -> EvaluationResult:
    """Scores that need no judge.

    ``matching``: accuracy. ``location``: mean IoU and accuracy at IoU 0.5. ``QA_*``: accuracy among the right and the
    false answers, by likelihood (``accuracy``) and by what was written (``closest_accuracy``). ``caption_*``:
    precision, recall and F1 of character names, full or in part.
    """
    samples = [item.sample for item in items]
    return score_answers(samples, answers, parse_box=parse_box, prose=True, image_size=image_size)


def person_of(name: str, path: str) -> str:
    """Film and character; photos of one character have the name before ``_shot_`` in common."""
    file = PurePosixPath(path)
    return f"{file.parent}/{file.stem.split('_shot_')[0]}"


MMID = EvaluationTask(
    name="mmid",
    about="MM-ID: matching, location, questions and captions about people (benchmark_mmid.json)",
    load=load_mmid,
    score=score_mmid,
    boxes=True,
    write_choices=True,
    judged=("qa_single", "qa_multi", "caption_single", "caption_multi"),
    person=person_of,
    max_new_tokens=256,
)
