"""MM-ID in its own format, from loading to the report, on a miniature that is built here."""

import json
import random

import pytest

from idavlm.cli.main import main
from idavlm.data import DataError, RecordDataset
from idavlm.data.readers import read_mmid
from idavlm.evaluation import Answer, EvaluationResult, load_answers, name_spellings, names_in
from idavlm.evaluation.task_run import load_scores
from idavlm.evaluation.tasks import TASKS
from idavlm.evaluation.tasks.image_files import missing_images, with_images
from idavlm.models import BoxFormat
from tests.fake_mmid import build_mmid
from tests.judge_server import JudgeServer
from tests.small_models import small_model, small_processor

MMID = TASKS["mmid"]
TYPES = {"matching", "location", "QA_singleimage", "QA_multiimage", "caption_singleimage", "caption_multiimage"}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return build_mmid(tmp_path_factory.mktemp("mmid"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    processor = small_processor()
    small_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def truth(benchmark, path, *, shuffled: bool = False):
    """The right answers in the released format of predictions."""
    items = json.loads(benchmark.read_text())
    answers = [item["answer"] for item in items]
    if shuffled:
        random.Random(0).shuffle(answers)
    released = [
        {"id": item["id"], "question": item["question"], "prediction": answer}
        for item, answer in zip(items, answers, strict=True)
    ]
    path.write_text(json.dumps(released))
    return path


def run(*arguments) -> int:
    return main(["eval", *map(str, arguments)])


def test_items_become_samples(benchmark):
    items = {item.sample.id: item for item in MMID.load(benchmark, None)}
    assert {item.groups["task"] for item in items.values()} == TYPES
    assert {item.groups["domain"] for item in items.values()} == {"movie", "animation", "match"}
    sample = items["1"].sample
    assert sample.task == "location"
    assert [identity.name for identity in sample.identities] == ["Ada Lund", "Bo Reyes"]
    assert sample.target_box.box in ([30, 20, 130, 200], [180, 35, 300, 230])
    assert len(sample.message_images) == 1
    matching = next(item.sample for item in items.values() if item.sample.task == "matching")
    assert len(matching.message_images) == 4
    assert len(matching.reference_images) == 1
    assert (matching.answer, len(matching.false_answers)) == ("Image 1", 3)


@pytest.mark.parametrize(("false", "expected"), [("a. / b", ["a.", "b"]), ("a/ b/c.", ["a", "b", "c."]), ("", [])])
def test_false_answers_are_split_at_every_kind_of_slash(false, expected):
    item = {"id": 1, "type": "QA_singleimage", "question": "What?", "answer": "x / y", "false answers": false}
    read = read_mmid(item, "f[0]")
    assert (read["false_answers"], read["answer"]) == (expected, "x / y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "QA"}, r"f\[3\]: type='QA' is not known; MM-ID has 'matching'"),
        ({"question": "<img>image_9</img> Where?"}, r"question names image_9, but the item has no such field"),
        ({"answer": "on the left"}, r"answer='on the left' of a location item is not \[x1, y1, x2, y2\]"),
        ({"question": "Kate is <img>image_1</img>\n Where?"}, "a location item has no scene"),
    ],
)
def test_broken_items_are_named(change, message):
    item = {"id": 3, "type": "location", "image_1": "a.jpg", "question": "<img>image_1</img> Where is Kate?"}
    item |= {"answer": "[1, 2, 3, 4]", "ground_target": "Kate"}
    with pytest.raises(DataError, match=message):
        read_mmid(item | change, "f[3]")


def test_parts_of_names_count_and_ordinary_words_do_not():
    spelling = name_spellings(["Beth Hardiment", "Captain Dain", "Chris   (as Chris Gorham)"], ["Will", "Glen Mc"])
    assert names_in("Beth, Dain and Chris; Captain. Will Glen Mc go?", spelling) == {
        "Beth Hardiment", "Captain Dain", "Chris   (as Chris Gorham)", "Glen Mc",
    }  # fmt: skip
    twins = name_spellings(["Ann Lee", "Bob Lee"])
    assert names_in("Lee and Ann", twins) == {"Ann Lee"}


def test_the_right_answers_score_1_in_every_task(benchmark, tmp_path, capsys):
    predictions = truth(benchmark, tmp_path / "truth.json")
    assert run("mmid", benchmark, "--predictions", predictions, "--boxes", "pixels", "--out", tmp_path / "out") == 0
    result, facts = load_scores(tmp_path / "out")
    assert {name for name, row in facts["tables"]["task"].items() if row["n"]} == TYPES
    for table in facts["tables"].values():
        for name, row in table.items():
            assert {metric["mean"] for metric in row["metrics"].values()} == {1.0}, name
            assert row["unparsed"] == 0
    assert len(result.predictions) == len(json.loads(benchmark.read_text()))
    report = (tmp_path / "out" / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert "| location | mean_iou | 6 | 1.000 [1.000, 1.000] |" in report
    assert "## By domain" in report


@pytest.mark.parametrize("kind", ["qwen", "unit", "square", "bins32"])
def test_right_boxes_in_every_format(benchmark, kind):
    """Up to the precision of the format, with image sizes from the files."""
    items = [item for item in MMID.load(benchmark, None) if item.sample.task == "location"]
    write = BoxFormat(kind).write
    answers = [Answer(item.sample.id, f"Here: {write('x', item.sample.target_box.box, (240, 320))}") for item in items]
    scores = MMID.score(items, answers, BoxFormat(kind).read).summary["location"]["metrics"]
    assert scores["acc@0.5"] == 1
    assert scores["mean_iou"] > (0.85 if kind == "bins32" else 0.98)


def test_shuffled_answers_score_as_guesses(tmp_path):
    """100 matching items: a quarter is right, within the interval."""
    benchmark = build_mmid(tmp_path, rounds=25)
    items = [item for item in MMID.load(benchmark, None) if item.sample.task == "matching"]
    gold = [item.sample.answer for item in items]
    random.Random(0).shuffle(gold)
    answers = [Answer(item.sample.id, text) for item, text in zip(items, gold, strict=True)]
    scored = MMID.score(items, answers, None)
    assert scored.summary["matching"]["chance"] == {"accuracy": 0.25}
    assert scored.main_scores["matching"] == pytest.approx(0.25, abs=0.09)


def test_wrong_answers_score_nothing(benchmark, tmp_path):
    items = MMID.load(benchmark, None)
    nothing = MMID.score(items, [Answer(item.sample.id, "") for item in items], BoxFormat("pixels").read)
    means = {score for row in nothing.summary.values() for score in row["metrics"].values()}
    assert means == {0.0}
    assert nothing.summary["location"]["unparsed"] == nothing.summary["location"]["n"]


def test_the_box_format_is_required_and_never_guessed(benchmark, tmp_path, capsys):
    predictions = truth(benchmark, tmp_path / "truth.json")
    assert run("mmid", benchmark, "--predictions", predictions, "--out", tmp_path / "out") == 2
    assert "--boxes is missing; pass the box format of the model" in capsys.readouterr().err


def test_relative_boxes_need_the_image_size(tmp_path, capsys):
    benchmark = build_mmid(tmp_path, rounds=1)
    scene = tmp_path / MMID.load(benchmark, None)[0].sample.message_images[0]
    scored = ["mmid", benchmark, "--predictions", truth(benchmark, tmp_path / "truth.json"), "--boxes", "qwen"]
    scored += ["--out", tmp_path / "out"]
    assert run(*scored) == 0
    assert len(load_scores(tmp_path / "out")[0].predictions) == 19
    scene.unlink()
    assert run(*scored) == 2
    error = capsys.readouterr().err
    assert "the size of 1 images is unknown" in error
    assert scene.name in error
    assert run(*scored, "--missing", "skip") == 0
    assert len(load_scores(tmp_path / "out")[0].predictions) == 18


def test_predictions_must_fit(benchmark, tmp_path, capsys):
    predictions = truth(benchmark, tmp_path / "truth.json")
    released = json.loads(predictions.read_text())

    def message(content, *more):
        predictions.write_text(json.dumps(content))
        arguments = ["--predictions", predictions, "--boxes", "pixels", "--out", tmp_path / "out", *more]
        assert run("mmid", benchmark, *arguments) == 2
        return capsys.readouterr().err

    assert "no answer to 2 of" in message(released[2:])
    assert "second answer to id='1'" in message([released[0], *released])
    assert "id='99' is not among the samples" in message([*released, {"id": 99, "prediction": "x"}])
    assert "truth.json[0]: {'id': 1} is not an answer" in message([{"id": 1}, *released[1:]])
    predictions.write_text(json.dumps(released[2:]))
    arguments = ["--predictions", predictions, "--boxes", "pixels", "--out", tmp_path / "out", "--missing", "skip"]
    assert run("mmid", benchmark, *arguments) == 0
    assert len(load_scores(tmp_path / "out")[0].predictions) == len(released) - 2


def test_missing_images_are_listed_once(tmp_path, checkpoint, capsys):
    benchmark = build_mmid(tmp_path, rounds=1)
    items = MMID.load(benchmark, None)
    assert missing_images(items) == {}
    gone = tmp_path / items[0].sample.message_images[0]
    gone.unlink()
    absent = missing_images(items)
    assert list(absent) == [items[0].sample.message_images[0]]
    assert absent[items[0].sample.message_images[0]] == ["1", "2", "3", "4", "5"]
    kept, _ = with_images(items, "skip")
    assert len(kept) == len(items) - 5
    with pytest.raises(DataError, match=r"1 image files of 5 items are missing in .* --missing skip"):
        with_images(items, "fail")
    asked = ["mmid", benchmark, "--model", checkpoint, "--max-new-tokens", 2, "--out", tmp_path / "out"]
    assert run(*asked) == 2
    assert capsys.readouterr().err.count(gone.name) == 1
    assert run(*asked, "--missing", "skip") == 0
    assert "1 image files are missing, 14 items are left" in capsys.readouterr().out


def test_a_model_is_asked_with_baselines_and_compared(benchmark, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ["mmid", benchmark, "--model", checkpoint, "--max-new-tokens", 4, "--out", out, "--baselines"]
    assert run(*asked) == 0
    lines = (out / "predictions.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert set(first) >= {"id", "question", "prediction", "image_size"}
    assert len(lines) == len(json.loads(benchmark.read_text()))
    table = capsys.readouterr().out
    assert "| task | metric | n | right references | no references | wrong references | chance |" in table
    before = [path.read_bytes() for path in sorted(out.rglob("predictions.jsonl"))]
    assert len(before) == 3
    assert run(*asked) == 0, "all answers exist: they are scored again, none is generated"
    assert [path.read_bytes() for path in sorted(out.rglob("predictions.jsonl"))] == before
    scored = load_scores(out)[0]
    qa = [prediction for prediction in scored.predictions if prediction.task == "qa_single"]
    assert all({"accuracy", "closest_accuracy"} <= set(prediction.scores) for prediction in qa), (
        "by likelihood and by text"
    )
    capsys.readouterr()
    assert run("mmid", benchmark, "--model", checkpoint, "--max-new-tokens", 5, "--out", out) == 2
    assert "holds answers of other settings (max_new_tokens: 4 then, 5 now)" in capsys.readouterr().err


def test_baselines_are_checked_before_the_first_answer(tmp_path, checkpoint, capsys):
    """One film has two characters, and both are in every sample: no other identity is left."""
    benchmark = build_mmid(tmp_path, rounds=1)
    benchmark.write_text(json.dumps(json.loads(benchmark.read_text())[:5]))
    out = tmp_path / "out"
    assert run("mmid", benchmark, "--model", checkpoint, "--out", out, "--baselines") == 2
    assert "pass samples with more identities" in capsys.readouterr().err
    assert not out.exists()


def test_a_checkpoint_without_processor_is_named(benchmark, tmp_path, capsys):
    small_model(small_processor()).save_pretrained(tmp_path / "model")
    assert run("mmid", benchmark, "--model", tmp_path / "model", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'model'}: no processor can be loaded (it has no processor_config.json)" in error
    assert "processor.save_pretrained(" in error
    (tmp_path / "model" / "processor_config.json").write_text("{}")
    assert run("mmid", benchmark, "--model", tmp_path / "model", "--out", tmp_path / "out") == 2
    assert f"{tmp_path / 'model'}: no processor can be loaded (" in capsys.readouterr().err


def test_the_report_says_what_was_evaluated(benchmark, tmp_path):
    predictions = truth(benchmark, tmp_path / "truth.json")
    assert run("mmid", benchmark, "--predictions", predictions, "--boxes", "pixels", "--out", tmp_path / "out") == 0
    title = (tmp_path / "out" / "report.md").read_text().splitlines()[0]
    assert title == f"# {predictions} on mmid (benchmark.json): 38 items"


def test_comparison(benchmark, tmp_path, capsys):
    right = truth(benchmark, tmp_path / "right.json")
    wrong = truth(benchmark, tmp_path / "wrong.json", shuffled=True)
    for name, path in (("right", right), ("wrong", wrong)):
        run("mmid", benchmark, "--predictions", path, "--boxes", "pixels", "--out", tmp_path / name)
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert run("compare", tmp_path / "wrong", tmp_path / "right", "--out", page) == 0
    table = capsys.readouterr().out
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in table.splitlines()}
    cells = [cell.strip() for cell in rows["matching", "accuracy"].split("|")[1:-1]]
    losing = EvaluationResult.load(tmp_path / "wrong" / "scores.json")
    wins = sum(found.scores["accuracy"] == 0 for found in losing.predictions if found.task == "matching")
    assert cells[2:5] == ["8", f"{1 - wins / 8:.3f}", "1.000"]
    assert [int(cell) for cell in cells[-3:]] == [wins, 0, 8 - wins]
    text = page.read_text()
    differ = [found for found in losing.predictions if found.scores and found.main_score != 1]
    assert text.count("<article>") == len(differ)
    assert "data:image/jpeg;base64," in text
    assert "Identify" in text
    assert run("compare", tmp_path / "wrong", tmp_path / "nowhere") == 2


def test_a_judge_scores_questions_and_captions_and_compares(benchmark, tmp_path, capsys, monkeypatch):
    """The endpoint fails half way; the resumed run does not repeat requests that were answered."""
    right = truth(benchmark, tmp_path / "right.json")
    wrong = truth(benchmark, tmp_path / "wrong.json", shuffled=True)

    def reply(content):
        if "Answer A" not in content:
            gold, said = content.split("Ground truth: ")[1].split("\n\nAnswer to judge: ")
            return "Fits.\nScore: 10" if said.startswith(gold) else "Score: 2/10"
        gold, first = content.split("Ground truth: ")[1].split("\n\nAnswer A: ")
        return "[[A]]" if first.startswith(gold) else "[[B]]"

    with JudgeServer(reply) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        options = ["--boxes", "pixels", "--judge", "stub", "--judge-timeout", "5"]
        server.faults += [None] * 6 + [400] * 4
        assert run("mmid", benchmark, "--predictions", right, *options, "--out", tmp_path / "right") == 2
        assert "refused the request for 'stub': HTTP 400" in capsys.readouterr().err
        server.faults.clear()
        assert run("mmid", benchmark, "--predictions", right, *options, "--out", tmp_path / "right") == 0
        judged = [found for found in load_scores(tmp_path / "right")[0].predictions if "judge" in found.scores]
        assert {found.task for found in judged} == {"qa_single", "qa_multi", "caption_single", "caption_multi"}
        assert {found.scores["judge"] for found in judged} == {10}
        assert len(judged) == 24
        assert sorted(server.answered) == sorted(set(server.answered)), "no request twice"
        assert "| judge | 6 | 10.000 [10.000, 10.000] | - |" in capsys.readouterr().out
        run("mmid", benchmark, "--predictions", wrong, *options, "--out", tmp_path / "wrong")
        assert run("compare", tmp_path / "wrong", tmp_path / "right", "--judge", "stub") == 0
        line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("Judge stub, both orders, 24 items: wrong better 0, right better 2")
    assert line.endswith("no verdict 0.")


def test_references_of_one_character_are_not_wrong_references(benchmark):
    key = MMID.identity_key("Ben", "./images/movie/12 Strong/Ben Milo_shot_0083_img_2_special.jpg")
    assert key == MMID.identity_key("Benny", "./images/movie/12 Strong/Ben Milo_shot_0100_img_0_special.jpg")
    assert key != MMID.identity_key("Ben", "./images/movie/Up/Ben Milo_shot_0083_img_2_special.jpg")


def test_the_reader_serves_data_sets_too(benchmark):
    assert RecordDataset(benchmark, benchmark.parent, reader="mmid")[0].image_root == benchmark.parent
    assert len(load_answers(truth(benchmark, benchmark.parent / "truth.json"))) == 38
