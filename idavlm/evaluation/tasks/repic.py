"""RePIC: captions that name one, two or four concepts of the image (arXiv 2506.18369)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ReadBox
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import field, question_sample, read_object
from idavlm.evaluation.tasks.constant_answers import constant_answer_table
from idavlm.utils import contains_name, markdown_table, plain_answer
from idavlm.utils.answer_parsing import is_refusal

QUESTIONS = {
    "one": (
        "Give a personalized caption of this image.",
        "Give a caption of the image.",
        "Can you provide a personalized caption of this photo?",
        "Provide a caption of the given image.",
    ),
    "several": (
        "Give a personalized caption of this image.",
        "Give a personal caption of the image.",
        "Provide a personalized caption of the given image.",
    ),
}
"""Questions of the release for one and for several concepts, which take turns."""

_SUFFIX = "_query_templates"
_REMEDY = "pass a query file of RePIC's repository"
_PUNCTUATION = ".,!?;:()[]{}\"'-"


def load_repic(data: Path, images: Path | None) -> list[Item]:
    """Load a query file ``query_tot/<set>_query_templates.json``, or all of the release's folder ``data``.

    A query file maps the path of an image to its concepts, ``["<tag>"]``, or to several lists of concepts. Its database
    is ``database_tot/database_<set>/database_mod.json``. Paths (``./data/...``) are relative to ``images``, by default
    the folder that holds ``data``.
    """
    if data.is_dir():
        folder = data / "data" if (data / "data" / "query_tot").is_dir() else data
        files = sorted((folder / "query_tot").glob(f"*{_SUFFIX}.json"))
        if not files:
            raise DataError(f"{data} holds no query_tot/*{_SUFFIX}.json; pass the folder 'data' of RePIC's repository.")
    else:
        files = [data]
    return [item for file in files for item in _load_queries(file, images)]


def _load_queries(file: Path, images: Path | None) -> list[Item]:
    name = file.stem.removesuffix(_SUFFIX)
    root = images if images is not None else file.absolute().parent.parent.parent
    folders = [file.parent.parent / "database_tot" / f"database_{name}{plural}" for plural in ("", "s")]
    database = next((path for folder in folders if (path := folder / "database_mod.json").is_file()), None)
    if database is None:
        raise DataError(
            f"{folders[0] / 'database_mod.json'} is missing; {file.name} needs it for the reference photos. It is in "
            "RePIC's repository."
        )
    concepts = _load_concepts(database)
    items: list[Item] = []
    for path, value in read_object(file, remedy=_REMEDY).items():
        where = f"{file}: {quote(path)}"
        is_list = isinstance(value, list) and bool(value)
        for tags in value if is_list and isinstance(value[0], list) else [value]:
            if not isinstance(tags, list) or not tags or not all(isinstance(tag, str) for tag in tags):
                raise DataError(f"{quote(tags)} is not a list of concepts like ['<bull>'].", where=where)
            unknown = [tag for tag in tags if tag not in concepts]
            if unknown:
                raise DataError(f"{quote(unknown[0])} is not a concept of {database}; add it.", where=where)
            items.append(_item(name, len(items), path, tags, concepts, where, root))
    return items


def _load_concepts(path: Path) -> dict[str, dict[str, str]]:
    content = read_object(path, remedy=_REMEDY).get("concept_dict")
    if not isinstance(content, dict):
        raise DataError(f"{path} has no 'concept_dict'; expected RePIC's database_mod.json.")
    concepts = {}
    for tag, entry in content.items():
        where = f"{path}: {quote(tag)}"
        if not isinstance(entry, dict):
            raise DataError(f"{quote(entry)} is not a concept; expected 'name', 'image' and 'info'.", where=where)
        concepts[tag] = {name: field(entry, (name,), where) for name in ("name", "image", "info")}
    return concepts


def _item(
    name: str, number: int, path: str, tags: list[str], concepts: Mapping[str, Mapping], where: str, root: Path
) -> Item:
    # References come in the order of the database, as in the release.
    shown = [tag for tag in concepts if tag in tags]
    infos = [
        f"{place}. Name: <{concepts[tag]['name']}>, Info: {concepts[tag]['info']}" for place, tag in enumerate(shown, 1)
    ]
    questions = QUESTIONS["one" if len(tags) == 1 else "several"]
    infos.append(f"This is the query image. {questions[number % len(questions)]}")
    question = {"id": f"{name}/{number}", "text": "\n".join(infos), "image": _relative(path)}
    question["identities"] = [
        {"name": concepts[tag]["name"], "images": [_relative(concepts[tag]["image"])]} for tag in shown
    ]
    sample = question_sample(question, where, root=root, task="caption", answer=", ".join(tags))
    groups = {"set": name, "concepts": str(len(tags))}
    return Item(
        sample, groups, {"tags": tags, "spellings": {tag: _spellings(tag, entry) for tag, entry in concepts.items()}}
    )


def _relative(path: str) -> str:
    return PurePosixPath(path).as_posix()


def _bare(tag: str) -> str:
    return tag[1:-1] if tag.startswith("<") and tag.endswith(">") else tag


def _spellings(tag: str, entry: Mapping[str, str]) -> list[str]:
    """The tag and the name of the database, which the prompt shows, with underscores or spaces."""
    return list(dict.fromkeys(text for name in (_bare(tag), entry["name"]) for text in (name, name.replace("_", " "))))


def score_repic(items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None) -> EvaluationResult:
    """Score ``precision``, ``recall`` and ``f1`` of the concepts that a caption names, and ``released_recall``.

    A concept is named if its tag or its name in the database occurs as whole words; case counts for two concepts only,
    as in the release. Precision counts every concept of the database that the caption names. :func:`released_scores`
    has the released scores, which miss names with a space and ``<Ann>'s``, search the tag ("ironman") where the prompt
    shows the name ("Iron Man"), and do not count wrong names beside right ones.
    """
    predictions = []
    for item, answer in zip(items, answers, strict=True):
        text, tags = answer.prediction or "", item.extra["tags"]
        caption = plain_answer(text)
        named = {
            tag
            for tag, spellings in item.extra["spellings"].items()
            if any(contains_name(caption, spelling, ignore_case=len(tags) != 2) for spelling in spellings)
        }
        hits = len(named & set(tags))
        precision, recall = hits / len(named) if named else 0.0, hits / len(tags)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        released = sum(tag in _released_named(text, tags, tags) for tag in tags) / len(tags)
        scores = {"f1": f1, "precision": precision, "recall": recall, "released_recall": released}
        problem = "refused" if not named and is_refusal(text) else ""
        predictions.append(Prediction(item.sample.id, "caption", text, item.sample.answer, scores, problem=problem))
    return EvaluationResult(predictions)


def _released_named(text: str, pool: Sequence[str], tags: Sequence[str]) -> set[str]:
    """Concepts of ``pool`` that the released scorer finds among the words of a caption."""
    fold = (lambda word: word) if len(tags) == 2 else str.lower
    words = {word.strip(_PUNCTUATION) for word in fold(text.replace("</s>", "")).split()}
    return {tag for tag in pool if fold(tag) in words or fold(_bare(tag)) in words}


def released_scores(items: Sequence[Item], result: EvaluationResult) -> dict[str, dict[str, float]]:
    """``precision``, ``recall`` and ``f1`` of each set, as the released scorer computes them over all its targets.

    A target that the caption does not name counts against precision only if the caption names another concept among the
    targets of the set.
    """
    sets: dict[str, list[tuple[Sequence[str], str]]] = {}
    for item, prediction in zip(items, result.predictions, strict=True):
        sets.setdefault(item.groups["set"], []).append((item.extra["tags"], prediction.text))
    scores = {}
    for name, rows in sets.items():
        pool = sorted({tag for tags, _ in rows for tag in tags})
        hits = missed = targets = 0
        for tags, text in rows:
            named = _released_named(text, pool, tags)
            found = sum(tag in named for tag in tags)
            hits += found
            targets += len(tags)
            missed += len(tags) - found if named - set(tags) else 0
        precision, recall = hits / (hits + missed) if hits + missed else 0.0, hits / targets
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        scores[name] = {"precision": precision, "recall": recall, "f1": f1}
    return scores


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    names = ("precision", "recall", "f1")
    rows = [[name, *(f"{row[metric]:.3f}" for metric in names)] for name, row in released_scores(items, result).items()]
    spaced = sum(" " in tag for item in items for tag in item.extra["tags"])
    targets = sum(len(item.extra["tags"]) for item in items)
    constants = {
        "the names of the prompt": lambda item: ", ".join(identity.name for identity in item.sample.identities),
        "all tags of the prompt": lambda item: " ".join(item.extra["tags"]),
        "every name of the database": lambda item: ", ".join(names[0] for names in item.extra["spellings"].values()),
    }
    return "\n\n".join(
        [
            "## Released scores",
            markdown_table(["set", *names], rows),
            f"{spaced} of {targets} targets have a tag with a space, which the released scorer never finds.",
            constant_answer_table(items, partial(score_repic, read_box=None), constants),
        ]
    )


REPIC = EvaluationTask(
    name="repic",
    description="RePIC: captions that name one, two or four concepts (folder data of the repository, or a query file)",
    load=load_repic,
    score=score_repic,
    judged=("caption",),
    summary=_summary,
    max_new_tokens=256,
)
