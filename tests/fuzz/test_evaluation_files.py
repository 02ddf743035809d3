"""Mutated prediction files, task files and scores: ``idavlm eval`` scores them, or names the file in one line."""

import contextlib
import copy
import io
import json
import random
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idavlm.cli.main import main
from idavlm.evaluation.tasks import TASKS
from tests.fake_mmid import build_mmid
from tests.fuzz import fuzz_settings
from tests.small_models import IMAGES, draw_images

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 27, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "A",
    "yes", "30", "Picture 2", "[1, 2, 3, 4]", "\ud800", "\0", "\u0663", "f\u0131ve", "x" * 5000, "1" * 5000, "[" * 5000,
    "(" * 500, "../x", "/x", "a.png", "kate.png", "<image>", "<img>image_1</img>", "<think>", "https://x/y.png",
    "the " * 300, [], [[]], [None], [1, 2, 3, 4], [1, 2], ["a", "b"], [0, 0, 0, 0], [1e308] * 4, [float("nan")] * 4,
    {}, {"a": 1}, {"id": 1},
]  # fmt: skip
TEXTS = [value for value in VALUES if isinstance(value, str) and value != "\ud800"]
BYTES = [
    b"",
    b"\xff",
    b"\0",
    b"[",
    b"{",
    b'"',
    b"}",
    b"\n",
    b",",
    b"\xef\xbb\xbf",
    b"NaN",
    b"1e999",
    b"\\ud800",
    b"[" * 3000,
]
KEYS = [
    "id",
    "question_id",
    "prediction",
    "text",
    "likelihoods",
    "image_size",
    "item",
    "answer",
    "answers",
    "facts",
    "unknown",
]


class Evaluation:
    """A folder with valid files of every task, which :meth:`run` mutates and evaluates.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draw_images(folder / "images", IMAGES)
        self.records = _records(folder)
        self.answers = {}
        for name in self.records:
            path = self._write("valid", name, self.records[name])
            items = TASKS[name].load(path, folder if name == "mmid" else folder / "images")
            self.answers[name] = [
                {"id": item.sample.id, "prediction": item.sample.answer or "1, 2, 3, 4"} for item in items
            ]
        self.answers["records"][2] = {"id": "qa_single", "likelihoods": [-1.5, -2.0, -0.5], "image_size": [60, 80]}

    def run(self, rng: random.Random) -> str:
        """Mutate the answers, the records or the scores of one task, and return the outcome: "scored", or the error.

        Raises:
            AssertionError: an error without the name of the file, a wrong exit status, or scores that are not numbers.
        """
        task = rng.choice(sorted(self.records))
        what = rng.choice(["texts", "answers", "records", "scores"])
        answers, records = copy.deepcopy(self.answers[task]), copy.deepcopy(self.records[task])
        if what == "texts":
            for answer in answers:
                answer["prediction"] = "".join(rng.choices(TEXTS, k=rng.randint(1, 3)))
        elif what == "answers":
            mutate(answers, rng)
        elif what == "records":
            mutate(records, rng)
        data, out = self._write("mutated", task, records), self.folder / "out"
        predictions = self.folder / "answers.json"
        predictions.write_bytes(_encode(answers, rng, broken=what == "answers"))
        if what == "records" and data.is_file() and rng.random() < 0.2:
            data.write_bytes(_break(data.read_bytes(), rng))
        options = ["--images", str(self.folder if task == "mmid" else self.folder / "images"), "--out", str(out)]
        options += ["--boxes", rng.choice(["pixels", "qwen", "unit", "square", "bins32"])] if TASKS[task].boxes else []
        options += ["--missing", rng.choice(["fail", "skip"])]
        status, error = _main(["eval", task, str(data), "--predictions", str(predictions), *options])
        if status == 0 and what == "scores":
            scores = out / "scores.json"
            content = json.loads(scores.read_text())
            mutate(content, rng)
            scores.write_bytes(_encode(content, rng, broken=True))
            compared = ["eval", "compare", str(out), str(out), "--out", str(self.folder / "page.html")]
            status, error = _main(compared)
        if status == 0:
            if what != "scores":
                json.loads((out / "scores.json").read_text(), parse_constant=_refuse)
            return f"{what}: scored"
        assert status == 2, (status, error)
        lines = [line for line in error.splitlines() if line.startswith("idavlm eval: ")]
        assert len(lines) == 1, error
        assert len(error) < 3000, f"a message of {len(error)} characters: {error[:200]}"
        assert str(self.folder) in error or "between a and b" in error or " a has " in error, error
        return f"{what}: {re.sub(r'[0-9]+', 'N', type_of(lines[0], self.folder))}"

    def _write(self, name: str, task: str, records: Any) -> Path:
        """The data file of a task; for MME, a folder of one text file per image."""
        if task == "mme":
            folder = self.folder / f"{name}-mme"
            shutil.rmtree(folder, ignore_errors=True)
            for category, content in records.items() if isinstance(records, dict) else ():
                (folder / "color").mkdir(parents=True, exist_ok=True)
                (folder / "color" / f"{category}.txt").write_bytes(str(content).encode("utf-8", "surrogatepass"))
            folder.mkdir(exist_ok=True)
            return folder
        path = self.folder / f"{name}-{task}.json"
        path.write_bytes(json.dumps(records).encode())
        return path


def mutate(value: Any, rng: random.Random) -> None:
    """Replace, remove, repeat, exchange or add some of the elements of nested lists and objects, at any depth."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = [(parent, key) for parent, key in _places(value) if len(parent)]
        if not places:
            return
        parent, key = rng.choice(places)
        how = rng.randrange(6)
        if how == 0 and len(parent) > 1:
            parent.pop(key)
        elif how == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif how == 2:
            other, other_key = rng.choice(places)
            parent[key] = copy.deepcopy(other[other_key])
        elif how == 3 and isinstance(parent, dict):
            parent[rng.choice(KEYS)] = rng.choice(VALUES)
        elif how == 4 and isinstance(parent[key], str):
            text, at = parent[key], rng.randrange(len(parent[key]) + 1)
            parent[key] = text[:at] + str(rng.choice(VALUES)) + text[at:]
        else:
            parent[key] = rng.choice(VALUES)


def type_of(line: str, folder: Path) -> str:
    """A message without its values, to count messages of one kind."""
    return re.sub(r"['\"\[{].*", "...", line.replace(str(folder), ""))[:60]


def run(count: int, seed: int) -> Counter:
    """Evaluate ``count`` mutated files and count the outcomes. The first unexpected error ends the run."""
    rng, outcomes = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation(Path(folder))
        for number in range(count):
            try:
                outcomes[evaluation.run(random.Random(rng.random()))] += 1
            except Exception as error:
                raise AssertionError(f"file {number} of seed {seed}: {type(error).__name__}: {error}") from error
    return outcomes


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    return Evaluation(tmp_path_factory.mktemp("evaluation"))


@fuzz_settings(80)
@given(st.integers(0, 2**32))
def test_mutated_files_are_scored_or_named(evaluation, seed):
    evaluation.run(random.Random(seed))


def test_unchanged_files_are_scored(evaluation, monkeypatch):
    """Otherwise every mutated file could be refused for another reason."""
    monkeypatch.setattr("tests.fuzz.test_evaluation_files.mutate", lambda value, rng: None)
    monkeypatch.setattr("tests.fuzz.test_evaluation_files._break", lambda data, rng: data)
    outcomes = Counter(evaluation.run(random.Random(seed)) for seed in range(60))
    assert set(outcomes) <= {"texts: scored", "answers: scored", "records: scored", "scores: scored"}, outcomes


def _records(folder: Path) -> dict[str, Any]:
    image = {"type": "image", "image": "scene.png"}
    turn = [{"role": "user", "content": [image, {"type": "text", "text": "Where is Kate?"}]}]
    base = {"identities": [{"name": "Kate", "images": ["kate.png"]}], "messages": turn, "answer": "Kate is reading."}
    false = {"false_answers": ["Tom is reading.", "Kate is asleep."]}
    records = [
        base | {"id": "matching", "type": "matching", "answer": "Image 1", "false_answers": ["Image 2"]},
        base | {"id": "location", "type": "location", "answer": "", "target": "Kate",
                "boxes": [{"name": "Kate", "image": "scene.png", "box": [1, 2, 30, 40]}]},
        base | {"id": "qa_single", "type": "qa_single"} | false,
        base | {"id": "caption", "type": "caption_single"},
    ]  # fmt: skip
    vqa = [
        {"question_id": 1, "image": "kate.png", "text": "Who?", "category": "a", "facts": [["a vet", "vet"], "red"]},
        {"question_id": 2, "image": ["kate.png", "tom.png"], "text": "<image> or <image>?", "answers": ["four", "4"]},
        {"question_id": "c", "text": "How many?", "answer": "4", "identities": base["identities"]},
    ]
    kinds = {"recognition": "yes", "choice_v": "B", "choice_t": "A", "caption": None}
    personal = [
        {"id": kind, "kind": kind, "concept": "Kate", "image": "kate.png", "text": "A or B?"}
        | ({} if answer is None else {"answer": answer})
        for kind, answer in kinds.items()
    ]
    grounding = [
        {"id": "a", "image": "kate.png", "sent": "a man", "bbox": [1, 2, 30, 40], "split": "testA"},
        {
            "image": "gone.png",
            "expression": "a dog",
            "bbox": [1, 2, 30, 40],
            "bbox_format": "xywh",
            "height": 60,
            "width": 80,
        },
    ]
    mme = {"1": "Is it red?\tYes\nIs it blue?\tNo\n", "2": "Is it a dog?\tNo\n"}
    mmid = json.loads(build_mmid(folder, rounds=1).read_text())
    return {"records": records, "vqa": vqa, "personal": personal, "grounding": grounding, "mme": mme, "mmid": mmid}


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container within ``value`` with each of its keys."""
    found: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += [(value, key), *_places(value[key])]
    return found


def _encode(value: Any, rng: random.Random, *, broken: bool) -> bytes:
    """JSON, or JSON lines of a list, with the bytes of the file damaged now and then."""
    as_lines = isinstance(value, list) and rng.random() < 0.3
    text = "\n".join(map(json.dumps, value)) if as_lines else json.dumps(value)
    return _break(text.encode(), rng) if broken and rng.random() < 0.2 else text.encode()


def _break(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice(BYTES) + data[start + rng.choice([0, 1, 5, len(data)]) :]


def _main(arguments: list[str]) -> tuple[int, str]:
    """Exit status and stderr."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        status = main(arguments)
    return status, error.getvalue()


def _refuse(constant: str) -> None:
    raise AssertionError(f"scores.json holds {constant}")
