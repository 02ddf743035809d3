"""Grounding, MME, LLaVA's VQA and personalization: loading, scores against hand-computed values, commands."""

import json
from pathlib import Path

import pytest
from PIL import Image

from idavlm.cli.main import main
from idavlm.data import DataError
from idavlm.data.schema import TASK_TYPES
from idavlm.evaluation import (
    Answer,
    interval_table,
    load_answers,
    parse_image_number,
    parse_letter,
    parse_yes_no,
)
from idavlm.evaluation.fingerprints import item_fingerprint
from idavlm.evaluation.judge import parse_score, parse_winner
from idavlm.evaluation.task_run import load_scores
from idavlm.evaluation.tasks import TASKS
from idavlm.evaluation.tasks.mme import mme_scores
from idavlm.evaluation.tasks.personal import recognition_scores
from idavlm.evaluation.tasks.vqa import says
from idavlm.models import BoxFormat
from tests.fake_mmid import build_mmid
from tests.small_models import IMAGES, draw_images, small_model, small_processor


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answered(items, texts):
    return [Answer(item.sample.id, text) for item, text in zip(items, texts, strict=True)]


def test_grounding_in_every_convention(tmp_path):
    draw_images(tmp_path, ["wide.png"], (400, 200))
    records = [
        {"image": "wide.png", "sent": "the left man", "bbox": [100, 50, 200, 150]},
        {"id": "b", "image": "gone.png", "expression": "a dog", "bbox": [10, 20, 90, 80], "bbox_format": "xywh",
         "height": 200, "width": 400, "split": "testA", "text": "Box of a dog?"},
    ]  # fmt: skip
    items = TASKS["grounding"].load(lines(tmp_path / "refcoco_val.jsonl", records), None)
    assert [item.groups["split"] for item in items] == ["refcoco_val", "testA"]
    assert [item.sample.target_box.box for item in items] == [[100, 50, 200, 150], [10, 20, 100, 100]]
    assert items[0].sample.messages[0].content[-1].text == "\nWhere is the left man?"
    for kind in BoxFormat.KINDS:
        texts = [BoxFormat(kind).write("x", item.sample.target_box.box, (200, 400)) for item in items]
        metrics = TASKS["grounding"].score(items, answered(items, texts), BoxFormat(kind).read).summary["location"]
        assert metrics["metrics"]["acc@0.5"] == 1, kind
        assert metrics["chance"] == {}
    half = TASKS["grounding"].score(items, answered(items, ["[100, 50, 200, 99]", "no"]), BoxFormat("pixels").read)
    assert half.summary["location"]["metrics"] == {"mean_iou": pytest.approx(0.245), "acc@0.5": 0}
    assert half.summary["location"]["unparsed"] == 1
    # Square boxes refer to the image padded to 400 x 400: 100 rows above.
    square = TASKS["grounding"].score(
        items[:1], answered(items[:1], ["[0.25, 0.375, 0.5, 0.625]"]), BoxFormat("square").read
    )
    assert square.predictions[0].box == [100, 50, 200, 150]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"g.jsonl:1: bbox=\[1, 2, 3\] must be four numbers"),
        ({"bbox": [50, 50, 10, 10]}, "set 'bbox_format': 'xywh'"),
        ({"bbox_format": "yxyx"}, "bbox_format='yxyx' is not known"),
        ({"sent": None}, "the record has no 'sent' or 'expression' or 'phrase'"),
    ],
)
def test_broken_grounding_records_are_named(tmp_path, change, message):
    record = {"image": "a.png", "sent": "a man", "bbox": [1, 2, 30, 40]} | change
    with pytest.raises(DataError, match=message):
        TASKS["grounding"].load(lines(tmp_path / "g.jsonl", [record]), None)


@pytest.fixture
def mme(tmp_path):
    """Two categories in the two layouts of the release, two images and one."""
    root = tmp_path / "MME"
    for folder, texts in (("color", "color"), ("artwork/images", "artwork/questions_answers_YN")):
        (root / folder).mkdir(parents=True)
        (root / texts).mkdir(parents=True, exist_ok=True)
        for name in ("1", "2") if folder == "color" else ("9",):
            Image.new("RGB", (20, 10)).save(root / folder / f"{name}.png")
            (root / texts / f"{name}.txt").write_text(f"Is {name} red?\tYes\nIs {name} blue?\tNo\n")
    (root / "code_reasoning").mkdir()
    (root / "code_reasoning" / "0.txt").write_text("Is it 3?\tNo\nIs it 4?\tYes\n")
    Image.new("RGB", (20, 10)).save(root / "code_reasoning" / "0.jpg")
    (root / "readme.txt").write_text("notes")
    return root


def test_mme_by_question_and_by_image(mme):
    items = TASKS["mme"].load(mme, None)
    by_name = {item.sample.id: item for item in items}
    assert len(items) == 8
    assert by_name["artwork/9#1"].sample.message_images == ["artwork/images/9.png"]
    assert by_name["code_reasoning/0#2"].groups == {"ability": "cognition", "category": "code_reasoning"}
    said = {"color/1#1": "Yes", "color/1#2": "No, it is red.", "color/2#1": "yes", "color/2#2": "Yes."}
    said |= {"artwork/9#1": "maybe", "artwork/9#2": "no", "code_reasoning/0#1": "No", "code_reasoning/0#2": "Yes"}
    result = TASKS["mme"].score(items, answered(items, [said[item.sample.id] for item in items]), None)
    assert mme_scores(items, result) == {
        "artwork": 50, "code_reasoning": 200, "color": 125, "perception (sum)": 175, "cognition (sum)": 200,
    }  # fmt: skip
    assert result.summary["mme"]["unparsed"] == 1
    assert result.summary["mme"]["chance"] == {"accuracy": 0.5, "accuracy_plus": 0.25}
    assert [item.sample.id for item in TASKS["mme"].load(mme, Path("too long " * 1000))] == [
        item.sample.id for item in items
    ]
    (mme / "color" / "1.txt").write_text("Is 1 red? Yes\n")
    with pytest.raises(DataError, match=r"color/1.txt:1: 'Is 1 red\? Yes' is not a question, a tab, and Yes or No"):
        TASKS["mme"].load(mme, None)


FACTS = [["born in Busan", "from Busan"], ["a vet"], ["two cats", "2 cats"]]


def vqa_records():
    return [
        {"question_id": 1, "image": "kate.png", "text": "Who is she?", "category": "person", "facts": FACTS},
        {
            "question_id": 2,
            "image": "other.png",
            "text": "<image>\nWhat colour?",
            "category": "general",
            "answer": "red",
        },
        {"question_id": "c", "text": "How many legs has a cat?", "category": "general", "answers": ["four", "4"]},
        {"question_id": 4, "image": ["kate.png", "tom.png"], "text": "Describe.", "category": "open"},
    ]


def test_vqa_of_facts_and_words(tmp_path):
    items = TASKS["vqa"].load(lines(tmp_path / "q.jsonl", vqa_records()), None)
    texts = ["Kate, who is from Busan, keeps 2 cats.", "It is a bright red.", "The 4.", "Two people."]
    result = TASKS["vqa"].score(items, answered(items, texts), None)
    scores = [prediction.scores for prediction in result.predictions]
    assert scores[0] == {"fact_recall": pytest.approx(2 / 3)}
    assert scores[1] == {"contains": 1, "word_f1": pytest.approx(2 / 6)}
    assert scores[2] == {"contains": 1, "word_f1": pytest.approx(2 / 3)}
    assert scores[3] == {}
    assert [len(item.sample.images) for item in items] == [1, 1, 0, 2]


@pytest.mark.parametrize(
    ("text", "wording", "found"),
    [
        ("She is a Vet!", "a vet", True),
        ("veterans", "vet", False),
        ("a vet", "the vet", True),
        ("born Busan", "born in Busan", False),
    ],
)
def test_wordings_match_whole_words(text, wording, found):
    assert says(text, wording) is found


def test_before_and_after_are_compared_by_category(tmp_path, capsys):
    data = lines(tmp_path / "q.jsonl", vqa_records()[:3])
    for name, texts in (
        ("before", ["I do not know her.", "red", "four"]),
        ("after", ["Born in Busan, a vet, two cats", "red", "five"]),
    ):
        answers = [{"question_id": q, "text": t} for q, t in zip((1, 2, "c"), texts, strict=True)]
        out = ["--predictions", str(lines(tmp_path / f"{name}.jsonl", answers)), "--out", str(tmp_path / name)]
        assert main(["eval", "vqa", str(data), *out]) == 0
    capsys.readouterr()
    table = load_scores(tmp_path / "after")[1]["tables"]["category"]
    assert table["person"]["metrics"]["fact_recall"]["mean"] == 1
    assert table["general"]["metrics"]["contains"]["mean"] == 0.5
    assert main(["eval", "compare", str(tmp_path / "before"), str(tmp_path / "after")]) == 0
    rows = capsys.readouterr().out
    assert "| vqa | fact_recall | 1 | 0.000 | 1.000 | +1.000 [+1.000, +1.000] |" in rows
    assert "| vqa | contains | 2 | 1.000 | 0.500 |" in rows


def personal_records():
    base = {"concept": "Kate", "image": "kate.png"}
    ask = base | {"kind": "recognition", "text": "Is Kate in this photo?"}
    return [
        *({**ask, "id": f"p{n}", "answer": "yes"} for n in range(2)),
        *({**ask, "id": f"n{n}", "answer": "No"} for n in range(4)),
        base | {"id": "v", "kind": "choice_v", "text": "What does Kate wear? A. a hat B. a scarf", "answer": "B"},
        {"concept": "Kate", "id": "t", "kind": "choice_t", "text": "Kate is A. a vet B. a cook", "answer": "A"},
        base
        | {"id": "c", "kind": "caption", "text": "Describe.", "identities": [{"name": "Kate", "images": ["tom.png"]}]},
    ]


REFUSALS = ["I cannot identify people in images.", "Not sure.", "对不起，我不知道", "<think>No?</think>I can't tell."]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_model_that_always_refuses_is_right_nowhere(tmp_path, mme, text):
    """A refusal is neither yes nor no, and a row of every table has its share."""
    for name, items in every_task(tmp_path, mme).items():
        result = TASKS[name].score(items, answered(items, [text] * len(items)), BoxFormat("pixels").read)
        for task, summary in result.summary.items():
            assert summary["refused"] == summary["n"], (name, task)
            assert not any(summary["metrics"].get(metric) for metric in summary["metrics"] if metric != "word_f1"), task
        table = interval_table({"model": result}, lambda prediction: prediction.task)
        assert table.count("| refused |") == len(result.summary)
    items = TASKS["personal"].load(lines(tmp_path / "p.jsonl", personal_records()), None)
    result = TASKS["personal"].score(items, answered(items, [text] * len(items)), None)
    assert recognition_scores(result) == {"positive": 0, "negative": 0, "weighted": 0}
    answers = ["Yes"] * len(items)
    assert TASKS["personal"].score(items, answered(items, answers), None).summary["recognition"]["refused"] == 0


def test_boxes_of_another_format_are_counted(tmp_path):
    record = {"image": "a.png", "sent": "a man", "bbox": [100, 50, 200, 150], "height": 200, "width": 400}
    items = TASKS["grounding"].load(lines(tmp_path / "g.jsonl", [record | {"id": n} for n in range(4)]), None)
    texts = ["[250, 250, 500, 750]", "[0.25, 0.25, 0.5, 0.75]", "[100, 50, 200, 150]", "I cannot identify people."]
    result = TASKS["grounding"].score(items, answered(items, texts), BoxFormat("pixels").read)
    summary = result.summary["location"]
    assert (summary["other box format"], summary["refused"], summary["unparsed"]) == (2, 1, 3)
    assert "| other box format | 4 | 0.500 |" in interval_table({"model": result}, lambda prediction: "all")


def test_personalization(tmp_path):
    items = TASKS["personal"].load(lines(tmp_path / "p.jsonl", personal_records()), None)
    texts = ["Yes", "No", "No.", "no", "no", "Yes, she is.", "B. a scarf", "The answer is (B)", "A photo of kate."]
    result = TASKS["personal"].score(items, answered(items, texts), None)
    assert recognition_scores(result) == {"positive": 0.5, "negative": 0.75, "weighted": 0.625}
    assert result.summary["choice_v"]["metrics"] == {"accuracy": 1}
    assert result.summary["choice_t"]["metrics"] == {"accuracy": 0}
    assert result.summary["caption"]["metrics"] == {"recall": 1}
    assert items[-1].sample.reference_images == ["tom.png"]
    for change, message in (({"kind": "x"}, "kind='x' is not known"), ({"answer": "perhaps"}, "cannot be parsed")):
        with pytest.raises(DataError, match=message):
            TASKS["personal"].load(lines(tmp_path / "x.jsonl", [personal_records()[0] | change]), None)


def test_a_model_answers_all_of_them(tmp_path, mme, capsys):
    """Every task from its file to its report, with an untrained model."""
    processor = small_processor()
    small_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    draw_images(tmp_path / "images", ["kate.png", "tom.png", "other.png"])
    grounding = [{"image": "kate.png", "sent": "a man", "bbox": [1, 2, 30, 40]}]
    data = {
        "vqa": lines(tmp_path / "q.jsonl", vqa_records()),
        "personal": lines(tmp_path / "p.jsonl", personal_records()),
        "grounding": lines(tmp_path / "g.jsonl", grounding),
        "mme": mme,
    }
    for task, path in data.items():
        images = [] if task == "mme" else ["--images", str(tmp_path / "images")]
        out = tmp_path / "out" / task
        asked = [*images, "--model", str(tmp_path / "model"), "--max-new-tokens", "3", "--out", str(out)]
        assert main(["eval", task, str(path), *asked]) == 0, capsys.readouterr().err
        assert len(load_answers(out / "predictions.jsonl")) == len(TASKS[task].load(path, None))
        assert (out / "report.md").read_text().startswith(f"# {tmp_path / 'model'} on {task} ({path.name}): ")
    asked = [
        "eval",
        "mme",
        str(mme),
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "none"),
        "--baselines",
    ]
    assert main(asked) == 2
    assert "no item introduces an identity by references" in capsys.readouterr().err
    llava = [json.loads(line) for line in (tmp_path / "out" / "vqa" / "answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in llava] == ["1", "2", "c", "4"]
    assert set(llava[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert "## MME score" in (tmp_path / "out" / "mme" / "report.md").read_text()
    assert "| weighted |" in (tmp_path / "out" / "personal" / "report.md").read_text()


NASTY = [
    "", " ", "30", "0", "-1", "photo 27 of the album", "Option 2024", "1" * 5000, "\u0663", "photo \u0663\u0660",
    "\u00b2", "\u216b", "\u3257", "\U0001d7da\U0001d7df", "image f\u0131ve", "the F\u0130RST one", "\u017fecond",
    "option \u212a", "\u7b2c\u4e8c\u5341", "[1, 2", "[[[[", "[1e400, 0, 1e400, 5]", "[" + "9" * 400 + ", 0, 1, 1]",
    "<box>(1,2),(3,4)</box>" * 9, "nan, nan, nan, nan", "<think>", "</think>A", "\0", "\x1b[31mA", "\u202eA",
    "yes no " * 99, "(" * 999, "A" * 999, "the answer is", "the " * 999 + "answer is B", "*" * 999, "a\u0301" * 99,
    "\U0001f600", "i don't know", "**(C)**", "x1=1e309, y1=2, x2=3, y2=4", "-0.0, -0.0, 0.0, 0.0", "100% A",
    "A, B, C and D", "#1", "#\u0661", "Kate " * 999,
]  # fmt: skip
"""Answers of models and of people, at their worst."""


def every_task(tmp_path, mme) -> dict[str, tuple]:
    """Items of every task without a file of its own here; the records of the schema have all six tasks."""
    draw_images(tmp_path / "images", IMAGES)
    grounding = [{"image": "kate.png", "sent": "a man", "bbox": [1, 2, 30, 40], "height": 60, "width": 80}]
    base = {"identities": [{"name": "Kate", "images": ["kate.png"]}], "answer": "Kate is reading."}
    base |= {"messages": [{"role": "user", "content": [{"type": "image", "image": "scene.png"}]}]}
    records = [base | {"type": task, "id": task, "false_answers": ["Tom is.", "30"]} for task in TASK_TYPES]
    records[0] |= {"answer": "Image 1", "false_answers": ["Image 2"]}
    records[1] |= {"target": "Kate", "boxes": [{"name": "Kate", "image": "scene.png", "box": [1, 2, 30, 40]}]}
    data = {
        "vqa": lines(tmp_path / "q.jsonl", vqa_records()),
        "personal": lines(tmp_path / "p.jsonl", personal_records()),
        "grounding": lines(tmp_path / "g.jsonl", grounding),
        "records": lines(tmp_path / "r.jsonl", records),
        "mmid": build_mmid(tmp_path / "mmid", rounds=1),
        "mme": mme,
    }
    return {name: TASKS[name].load(path, None) for name, path in data.items()}


def test_every_scorer_takes_any_text(tmp_path, mme):
    """Scores are finite and between 0 and 1, and every box format parses or refuses every text."""
    for name, items in every_task(tmp_path, mme).items():
        for text in NASTY:
            for kind in BoxFormat.KINDS if TASKS[name].boxes else (None,):
                read_box = BoxFormat(kind).read if kind else None
                result = TASKS[name].score(items, answered(items, [text] * len(items)), read_box)
                for prediction in result.predictions:
                    assert all(0 <= score <= 1 for score in prediction.scores.values()), (name, text, prediction)
                json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("text", NASTY)
def test_a_number_is_no_letter_and_no_reply_of_a_judge_ends_the_run(text):
    letter = parse_letter(text)
    assert letter is None or letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert parse_letter(text, count=2) in (None, "A", "B")
    assert parse_image_number(text, count=0) is None
    assert parse_yes_no(text) in (None, True, False)
    assert parse_winner(text) in (None, "A", "B", "tie")
    assert parse_winner("[[t\u0130e]]") == "tie"
    score = parse_score(text)
    assert score is None or 1 <= score <= 10


@pytest.mark.parametrize(
    "text", ["30", "0", "photo 27 of the album", "Option 2024", "She was born in 1990.", "1" * 5000]
)
def test_a_number_as_answer_to_lettered_choices_is_wrong(tmp_path, text):
    items = TASKS["personal"].load(lines(tmp_path / "p.jsonl", personal_records()), None)
    result = TASKS["personal"].score(items, answered(items, [text] * len(items)), None)
    summary = result.summary["choice_t"]
    assert (summary["n"], summary["unparsed"], summary["refused"]) == (1, 1, 0)
    assert summary["metrics"] == {"accuracy": 0.0}
    assert parse_letter("image f\u0131ve") == "E", "with the dotless i of Turkish"


VALUES = [None, 3, 0, -1, 1.5, True, "", " ", "x", [], [3], [None], {}, {"a": 1}, "\ud800", [[]], float("nan"), 10**400]


def mutations() -> list[tuple[str, dict, str]]:
    """One field of a record of each task, which is replaced by every value."""
    grounding = {"id": 1, "image": "a.png", "sent": "a man", "bbox": [1, 2, 30, 40], "height": 60, "width": 80,
                 "split": "testA", "text": "Where?", "bbox_format": "xyxy"}  # fmt: skip
    vqa = vqa_records()[0] | {"answer": "red", "identities": [{"name": "Kate", "images": ["tom.png"]}]}
    personal = personal_records()[0] | {"identities": [{"name": "Kate", "images": ["tom.png"]}]}
    records = {"grounding": grounding, "vqa": vqa | {"answer": "red"}, "personal": personal}
    return [
        (task, record, name) for task, record in records.items() for name in (*record, "answers", "images", "question")
    ]


@pytest.mark.parametrize(
    ("task", "record", "name"), mutations(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_field_of_another_type_is_an_error_of_its_line(tmp_path, task, record, name):
    """Or it is a valid value. Null is the same as no field."""
    for value in VALUES:
        path = lines(tmp_path / "data.jsonl", [record | {name: value}])
        message = ""
        try:
            items = TASKS[task].load(path, None)
        except DataError as error:
            message = str(error)
        if message:
            assert message.startswith(f"{path}:1: ")
            assert len(message) < 500 + len(str(path))
            continue
        text = items[0].sample.answer or "x"
        result = TASKS[task].score(items, answered(items, [text]), BoxFormat("pixels").read)
        json.dumps(result.to_dict(), allow_nan=False)
        if TASKS[task].boxes and items[0].image_size() is not None:
            result = TASKS[task].score(items, answered(items, ["[1, 2, 300, 400]"]), BoxFormat("thousand").read)
            json.dumps(result.to_dict(), allow_nan=False)
        item_fingerprint(items[0].sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "answer=3 must be a text or a list"), ({"answer": ["x", 3]}, r"\['x', 3\] must be texts"),
        ({"answer": "..."}, r"answers=\['\.\.\.'\] must be texts with a word"), ({"answer": ""}, "'' is blank"),
        ({"facts": "born in Busan"}, "facts=.* must be a list"), ({"facts": [3]}, "must be texts, or lists"),
        ({"facts": [[]]}, "must be texts, or lists of wordings"), ({"facts": {"a": 1}}, "must be a list"),
        ({"answer": "x", "answers": ["y"]}, "'answers' and 'answer', which mean the same"),
        ({"category": ["a"]}, "category=.* must be a text or an integer"), ({"images": ["a.png"]}, "mean the same"),
        ({"question_id": True}, "question_id=True must be a text or an integer"), ({"text": None}, "has no 'text'"),
    ],
)  # fmt: skip
def test_broken_vqa_records_are_named(tmp_path, change, message):
    with pytest.raises(DataError, match=rf"q\.jsonl:1: .*{message}"):
        TASKS["vqa"].load(lines(tmp_path / "q.jsonl", [vqa_records()[0] | change]), None)


def test_null_is_no_answer(tmp_path):
    record = vqa_records()[0] | {"answer": None, "answers": None, "facts": None, "category": None, "images": None}
    item = TASKS["vqa"].load(lines(tmp_path / "q.jsonl", [record]), None)[0]
    assert (item.extra["answers"], item.extra["facts"], item.groups) == ([], [], {"category": "all"})


@pytest.mark.parametrize(
    ("text", "wording", "found"),
    [("A", "A", True), ("Option A.", "A", True), ("B", "A", False), ("", "A", False), ("the", "...", False)],
)
def test_a_wording_of_articles_only_is_searched_literally(text, wording, found):
    """The option "A" would be found in every answer without its article."""
    assert says(text, wording) is found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "Kate"}, "'Kate' is an answer of a matching record, but names no image of the 2"),
        ({"answer": "Image 3"}, "'Image 3' is an answer of a matching record, but names no image of the 2"),
        ({"false_answers": ["Tom"]}, "'Tom' is an answer of a matching record"),
        ({"answer": None, "type": None, "false_answers": []}, "training record|ends with a turn of 'user'"),
    ],
)
def test_records_that_cannot_be_scored_are_found_before_an_answer_is_generated(tmp_path, change, message):
    record = {"type": "matching", "answer": "Image 1", "false_answers": ["Image 2"]}
    record |= {"messages": [{"role": "user", "content": "Which image shows Kate?"}]} | change
    with pytest.raises(DataError, match=rf"t\.jsonl:1: .*{message}"):
        TASKS["records"].load(lines(tmp_path / "t.jsonl", [record]), None)


def test_broken_files_of_mme_are_named(mme):
    text = mme / "color" / "1.txt"
    for content, message in (
        (b"", "holds no question"),
        (b"Is \xff red?\tYes", "is not UTF-8"),
        (b"\n \n", "holds no question"),
    ):
        text.write_bytes(content)
        with pytest.raises(DataError, match=rf"color/1\.txt {message}"):
            TASKS["mme"].load(mme, None)
    text.unlink()
    text.mkdir()
    assert len(TASKS["mme"].load(mme, None)) == 6
    with pytest.raises(DataError, match="is not a folder"):
        TASKS["mme"].load(mme / "readme.txt", None)


def test_the_size_of_an_image_is_read_without_decoding_it(tmp_path):
    """As upright; a file that is not an image is named."""
    data = lines(tmp_path / "g.jsonl", [{"image": "a.jpg", "sent": "a man", "bbox": [1, 2, 30, 40]}])
    item = TASKS["grounding"].load(data, None)[0]
    assert item.image_size() is None
    turned = Image.Exif()
    turned[0x0112] = 6
    for exif, size in ((None, (40, 60)), (turned, (60, 40))):
        Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", **({"exif": exif} if exif else {}))
        data = (tmp_path / "a.jpg").read_bytes()
        (tmp_path / "a.jpg").write_bytes(data[:-20])
        assert item.image_size() == size
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"g\.jsonl:1: image 'a\.jpg' is not an image"):
        item.image_size()
