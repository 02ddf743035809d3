"""MMPB, RePIC, P-Bench and HumanRef in their formats; questions for people who are not in the image."""

import csv
import json
import random
from functools import partial

import pytest

from idavlm.cli.main import main
from idavlm.data import DataError, parse_sample
from idavlm.evaluation import Answer, EvaluationResult, score_answers
from idavlm.evaluation.tasks import TASKS
from idavlm.evaluation.tasks.human_ref import _most_matches, _released_matches
from idavlm.evaluation.tasks.mmpb import released_option
from idavlm.evaluation.tasks.pvit import declines, pvit_scores
from idavlm.evaluation.tasks.repic import released_scores
from idavlm.models import BoxFormat
from idavlm.utils.answer_parsing import says_absent
from tests.shuffled_answers import chance_of_labels, chance_of_sets, check_shuffled
from tests.small_models import draw_images, small_model, small_processor


def score(task: str, items, texts, kind: str = "pixels") -> EvaluationResult:
    answers = [Answer(item.sample.id, text) for item, text in zip(items, texts, strict=True)]
    boxes = BoxFormat(kind)
    return TASKS[task].score(items, answers, boxes.read_boxes if TASKS[task].several_boxes else boxes.read)


def metrics(result: EvaluationResult) -> dict[str, dict[str, float]]:
    return {task: row["metrics"] for task, row in result.summary.items()}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def report_of(task: str, data, items, texts, out, *arguments: str) -> str:
    """The report of ``idavlm eval TASK --predictions``."""
    answers = [{"id": item.sample.id, "prediction": text} for item, text in zip(items, texts, strict=True)]
    predictions = write_json(out / "answers.json", answers)
    command = ["eval", task, str(data), "--predictions", str(predictions), "--out", str(out / "run"), *arguments]
    assert main(command) == 0
    return (out / "run" / "report.md").read_text()


# MMPB

COLUMNS = ["index", "question", *"ABCD", "image_path", "answer", "attribute", "category", "l2-category", "concept"]
COLUMNS += ["target", "name", "preference", "description_moderate"]
FOOD = {"A": "a dog", "B": "Pizza", "C": "a soup", "D": "rice"}


def mmpb_rows() -> list[dict]:
    """Five recognition questions and four choices of one person, with the numbers of the release as answers."""
    base = {
        "attribute": "human",
        "name": "p1",
        "description_moderate": "A tall man.",
        "preference": "<sks> likes pizza.",
    }
    rows = []
    for number in range(4):
        question = {"question": "Is <sks> in this image?", "answer": 4 + number % 2, "category": "recognition"}
        rows.append(base | question | {"l2-category": ("awareness", "overconcept")[number % 2]})
    for number in range(4):
        question = {"question": "What would <sks> choose?", **FOOD, "answer": number, "category": "preference"}
        rows.append(base | question | {"l2-category": "inconsistency", "concept": "food"})
    return [{"index": number, **row} for number, row in enumerate(rows)]


def mmpb_csv(folder, rows, *, letters: bool):
    """The files of the release's converters: one of them writes letters, the other one numbers."""
    words = dict(enumerate([*"ABCD", "Yes", "No"]))
    folder.mkdir(exist_ok=True)
    with (folder / "dataset.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        for row in rows:
            path = f"human/test/p1/{row['category']}/{row['index']}.png"
            draw_images(folder, [path], (8, 6))
            answer = words[row["answer"]] if letters and row["answer"] in words else row["answer"]
            writer.writerow({**row, "image_path": path, "answer": answer})
    draw_images(folder, [f"human/train/p1/{number}.png" for number in range(5)], (8, 6))
    return folder


def test_mmpb_from_the_files_of_both_converters_and_from_parquet(tmp_path):
    """All three give the same questions with five reference photos; the truth scores 1, constants score chance."""
    rows = mmpb_rows()
    by_letters = TASKS["mmpb"].load(mmpb_csv(tmp_path / "letters", rows, letters=True), None)
    by_numbers = TASKS["mmpb"].load(mmpb_csv(tmp_path / "numbers", rows, letters=False) / "dataset.csv", None)
    datasets = pytest.importorskip("datasets")
    photos = {
        f"injection_image_{n}": {"bytes": (tmp_path / f"letters/human/train/p1/{n - 1}.png").read_bytes()}
        for n in range(1, 6)
    }
    table = []
    for row, item in zip(rows, by_letters, strict=True):
        scene = (tmp_path / "letters" / item.sample.message_images[0]).read_bytes()
        table.append({**dict.fromkeys(COLUMNS), **row, "image_path": {"bytes": scene}, **photos})
    (tmp_path / "hub" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "hub" / "data" / "train-0.parquet")
    from_parquet = TASKS["mmpb"].load(tmp_path / "hub", None)
    for items in (by_letters, by_numbers, from_parquet):
        assert [item.sample.answer for item in items] == ["Yes", "No", "Yes", "No", *"ABCD"]
        assert [item.sample.identities[0].name for item in items] == ["<sks>"] * 8
        assert all(len(item.sample.reference_images) == 5 for item in items)
        root = items[0].sample.image_root
        assert all((root / path).is_file() for item in items for path in item.sample.images)
        assert "likes pizza" not in items[0].sample.messages[0].content[-1].text
        assert (
            "\n<sks> likes pizza.\nWhat would <sks> choose?\nOptions:\nA. a dog"
            in items[4].sample.messages[0].content[-1].text
        )
        truth = metrics(score("mmpb", items, [item.sample.answer for item in items]))
        assert all(set(row.values()) == {1.0} for row in truth.values()), truth
        for constant, kind, chance in (
            ("Yes", "recognition", 0.5),
            ("No", "recognition", 0.5),
            ("B", "preference", 0.25),
        ):
            found = metrics(score("mmpb", items, [constant] * 8))
            assert found["choice_v" if kind == "preference" else kind]["accuracy"] == chance
    report = report_of("mmpb", tmp_path / "letters", by_letters, ["Yes"] * 8, tmp_path)
    assert "## Constant answers" in report
    assert "| recognition | Yes | accuracy 0.500, exact_match 0.500 |" in report


def test_mmpb_the_released_matching_takes_the_article_for_a_choice(tmp_path):
    assert released_option("A man eats pizza", FOOD) == "A"
    assert released_option("The answer is B, not A.", FOOD) is None
    assert released_option("pizza", FOOD) == "B"
    assert released_option("Sorry, I can't help with images of people yet. B", FOOD) is None
    items = TASKS["mmpb"].load(mmpb_csv(tmp_path / "m", mmpb_rows(), letters=True), None)
    choice, yes = items[5], items[0]
    for text, accuracy, released in (("A man eats Pizza", 1, 0), ("B, not A", 1, 0), ("(B)", 1, 1), ("B", 1, 1)):
        assert metrics(score("mmpb", [choice], [text]))["choice_v"] == {
            "accuracy": accuracy,
            "released_accuracy": released,
        }
    for text, accuracy, exact in (("Yes", 1, 1), ("Yes, he is.", 1, 0), ("yes", 1, 0), ("No", 0, 0)):
        assert metrics(score("mmpb", [yes], [text]))["recognition"] == {"accuracy": accuracy, "exact_match": exact}
    refusal = score("mmpb", items, ["I cannot identify people in images."] * len(items))
    assert all(row["refused"] == row["n"] and row["metrics"]["accuracy"] == 0 for row in refusal.summary.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 7}, "answer='7' is not Yes or No"),
        ({"answer": 0}, "answer='0' is not Yes or No"),
        ({"answer": "Z", **FOOD}, "answer='Z' is not A or B or C or D"),
        ({"question": ""}, "the record has no 'question'"),
        ({"category": "preference", "preference": ""}, "has no 'preference'"),
    ],
)
def test_mmpb_broken_rows_are_named(tmp_path, change, message):
    folder = mmpb_csv(tmp_path / "m", [{**mmpb_rows()[0], **change}], letters=False)
    with pytest.raises(DataError, match=rf"dataset\.csv:2: .*{message}"):
        TASKS["mmpb"].load(folder, None)
    (folder / "dataset.csv").write_text("index,question\n1\n")
    with pytest.raises(DataError, match=r"dataset\.csv:2: the row does not have the 2 fields"):
        TASKS["mmpb"].load(folder, None)


# RePIC


def repic(root):
    """One concept, two concepts, and four concepts with two subsets of one group photo."""
    names = {"<bull>": "bull", "<asian_doll>": "asian_doll"}
    pair = {"<Anya>": "Anya", "<Bond>": "Bond", "<K>": "K"}
    group = {
        "<thor>": "Thor",
        "<ironman>": "Iron Man",
        "<black widow>": "Black Widow",
        "<hulk>": "Hulk",
        "<wei>": "Wei",
    }
    queries = {
        "myvlm": {"./data/q/bull 1.jpg": ["<bull>"], "./data/q/doll.jpg": ["<asian_doll>"]},
        "2_concept": {"./data/q/pair.jpg": ["<Anya>", "<Bond>"], "./data/q/two.jpg": ["<K>", "<Bond>"]},
        "4_concept": {"./data/q/group photo.jpg": [list(group)[:4], list(group)[1:]]},
    }
    for folder, concepts in (("myvlm", names), ("2_concepts", pair), ("4_concepts", group)):
        entries = {}
        for tag, name in concepts.items():
            path = f"./data/database_tot/database_{folder}/{name}.jpg"
            draw_images(root, [path[2:]], (8, 6))
            entries[tag] = {"name": name, "image": path, "info": f"About {name}.", "category": "person"}
        content = {"concept_dict": entries, "path_to_concept": {entry["image"]: tag for tag, entry in entries.items()}}
        write_json(root / f"data/database_tot/database_{folder}/database_mod.json", content)
    for name, query in queries.items():
        draw_images(root, [path[2:] for path in query], (8, 6))
        write_json(root / f"data/query_tot/{name}_query_templates.json", query)
    return root


def test_repic_from_the_folder_of_the_repository(tmp_path):
    data = repic(tmp_path) / "data"
    items = TASKS["repic"].load(data, None)
    assert [item.groups["set"] for item in items] == ["2_concept"] * 2 + ["4_concept"] * 2 + ["myvlm"] * 2
    group = items[2].sample
    assert [identity.name for identity in group.identities] == ["Thor", "Iron Man", "Black Widow", "Hulk"]
    assert group.reference_images[1] == "data/database_tot/database_4_concepts/Iron Man.jpg"
    text = group.messages[0].content[-1].text
    assert text.startswith("\n1. Name: <Thor>, Info: About Thor.\n2. Name: <Iron Man>")
    assert text.endswith("This is the query image. Give a personalized caption of this image.")
    assert all((tmp_path / path).is_file() for item in items for path in item.sample.images)
    truth = [f"{' and '.join(item.extra['tags'])} in a garden." for item in items]
    result = score("repic", items, truth)
    assert {result.summary["caption"]["metrics"][metric] for metric in ("f1", "precision", "recall")} == {1.0}
    one = [item for item in items if item.groups["set"] == "myvlm"]
    assert released_scores(one, score("repic", one, truth[4:]))["myvlm"] == {"precision": 1, "recall": 1, "f1": 1}
    assert metrics(score("repic", one, truth[4:][::-1]))["caption"]["f1"] == 0, "names of the other image"
    report = report_of("repic", data, items, truth, tmp_path)
    assert "2 of 14 targets have a tag with a space" in report
    assert "| caption | the names of the prompt | f1 1.000, precision 1.000, " in report, (
        "a model that repeats the prompt reaches 1"
    )


def test_repic_traps_of_the_released_scorer(tmp_path):
    items = TASKS["repic"].load(repic(tmp_path) / "data", None)
    pair, group, bull = items[0], items[2], items[4]

    def both(item, text):
        result = score("repic", [item], [text])
        return result.predictions[0].scores, released_scores([item], result)[item.groups["set"]]

    ours, released = both(group, "<thor>, <ironman>, <black widow> and <hulk> pose.")
    assert (ours["recall"], released["recall"]) == (1, 0.75), "a tag with a space is never found"
    ours, released = both(group, "Thor, Iron Man, Black Widow and Hulk pose.")
    assert (ours["recall"], released["recall"]) == (1, 0.5), "the prompt shows Iron Man, the scorer searches ironman"
    ours, released = both(bull, "<bull>'s horns shine.")
    assert (ours["recall"], released["recall"]) == (1, 0)
    ours, _ = both(bull, "A bull and an asian doll.")
    assert ours["precision"] == 0.5
    both_pairs = items[:2]
    result = score("repic", both_pairs, ["Anya, Bond and K are here.", "K and Bond."])
    assert released_scores(both_pairs, result)["2_concept"]["precision"] == 1, "wrong names cost nothing"
    assert [prediction.scores["precision"] for prediction in result.predictions] == [pytest.approx(2 / 3), 1]
    result = score("repic", both_pairs, ["Anya and K.", "A garden."])
    found = released_scores(both_pairs, result)["2_concept"]
    assert (found["precision"], found["recall"]) == (0.5, 0.25), "Bond is a miss because K is named; silence is none"
    assert both(pair, "anya and bond")[1]["recall"] == 0, "case counts for two concepts"
    assert both(bull, "BULL")[1]["recall"] == 1


def test_repic_missing_parts_are_named(tmp_path):
    data = repic(tmp_path) / "data"
    query = data / "query_tot" / "myvlm_query_templates.json"
    write_json(query, {"./data/q/a.jpg": ["<unicorn>"]})
    with pytest.raises(
        DataError, match=r"myvlm_query_templates\.json: './data/q/a\.jpg': '<unicorn>' is not a concept"
    ):
        TASKS["repic"].load(query, None)
    write_json(query, {"./data/q/a.jpg": "<bull>"})
    with pytest.raises(DataError, match="'<bull>' is not a list of concepts"):
        TASKS["repic"].load(query, None)
    (data / "database_tot" / "database_myvlm" / "database_mod.json").unlink()
    with pytest.raises(DataError, match=r"database_myvlm/database_mod\.json is missing"):
        TASKS["repic"].load(query, None)
    with pytest.raises(DataError, match="holds no query_tot"):
        TASKS["repic"].load(data / "q", None)


# PVIT


def p_bench(folder):
    """Choices about one and two people, and questions about a person who is absent or unknown."""
    draw_images(folder / "image", ["ann.png", "ann2.png", "tom.png", "scene.png"], (8, 6))
    ann, scene = "<image>\nThis is a photo of Ann.\n", "<image>\nWhat does {} hold?"
    options = "\nA. Cup\nB. Book\nC. Hat\nD. Pen"
    tom = "<image>\nHere is Tom's picture.\n"
    records = [
        {"image": ["ann.png", "scene.png"], "text": ann + scene.format("Ann") + options, "value": letter, "mode": "mc"}
        for letter in "ABCD"
    ]
    two = {"image": ["ann.png", "tom.png", "scene.png"], "text": ann + tom + scene.format("Tom") + options}
    records.append(two | {"value": "B. Book", "mode": "mc"})
    absent = {"image": ["tom.png", "scene.png"], "text": tom + scene.format("Tom"), "mode": "neg"}
    records.append(absent | {"value": "Sorry, Tom is not in the image."})
    records.append(absent | {"text": tom + scene.format("Kim"), "value": "I do not know who Kim is."})
    records.append(absent | {"value": "Tom holds a red cup.", "mode": "free"})
    return write_json(folder / "p_bench.json", records)


def test_p_bench_introduces_people_and_scores_refusals_apart(tmp_path):
    data = p_bench(tmp_path)
    items = TASKS["pvit"].load(data, None)
    assert [item.sample.task for item in items] == ["choice"] * 5 + ["unanswerable"] * 2 + ["description"]
    assert [identity.name for identity in items[4].sample.identities] == ["Ann", "Tom"]
    assert items[4].sample.message_images == ["scene.png"]
    assert items[4].sample.messages[0].content[-1].text.startswith("\nWhat does Tom hold?\nA. Cup")
    assert [item.groups["people"] for item in items] == ["1"] * 4 + ["2"] + ["1"] * 3
    truth = [item.sample.answer for item in items]
    assert all(set(row.values()) == {1.0} for row in metrics(score("pvit", items, truth)).values())
    expected = {"choice, 1 people": 1, "choice, 2 people": 1, "unanswerable": 1, "mean of choice and unanswerable": 1}
    assert pvit_scores(items, score("pvit", items, truth)) == expected
    always_a = pvit_scores(items, score("pvit", items, ["A"] * 8))
    assert (always_a["choice, 1 people"], always_a["unanswerable"]) == (0.25, 0)
    refusal = score("pvit", items, ["Sorry, I do not know who that is."] * 8)
    assert metrics(refusal)["choice"]["accuracy"] == 0
    assert pvit_scores(items, refusal)["mean of choice and unanswerable"] == 0.5
    assert refusal.summary["choice"]["refused"] == 5
    assert metrics(score("pvit", items, [""] * 8))["unanswerable"]["accuracy"] == 0, "silence is no refusal"
    report = report_of("pvit", data, items, truth, tmp_path)
    assert "| choice, 2 people | 1.000 |" in report
    assert "| choice | B | accuracy 0.400 |" in report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No trace of Ann can be found in this picture.", True), ("The image excludes Ann.", True),
        ("I'm unfamiliar with Ann.", True), ("Ann's face is unknown to me.", True), ("not here", True),
        ("Ann holds a cup.", False), ("Ann is not wearing a hat.", False), ("She has no shoes.", False), ("B", False),
    ],
)  # fmt: skip
def test_p_bench_a_refusal_denies_that_the_person_is_there_or_known(text, expected):
    assert declines(text) is expected


def test_p_bench_photos_of_other_introductions_stay_in_the_question(tmp_path):
    text = "<image>\nMeet Ann!\n<image>\nThis is an image of J. B. Smith.\n<image>\nThis photo shows J. B. Smith.\nWho?"
    record = {"image": ["a.png", "b.png", "c.png"], "text": text, "value": "Ann", "mode": "free"}
    item = TASKS["pvit"].load(write_json(tmp_path / "q.json", [record]), None)[0]
    assert item.sample.message_images == ["a.png"]
    assert [(identity.name, identity.images) for identity in item.sample.identities] == [
        ("J. B. Smith", ["b.png", "c.png"])
    ]
    for change, message in (
        ({"image": ["a.png"]}, "has 3 <image> placeholders for 1 images"),
        ({"mode": None}, "has no 'mode'"),
        ({"conversations": []}, "training record of PVIT-3M"),
        ({"text": text + "\nA. x\nB. y", "value": "C"}, "value='C' is not one of the options A, B"),
    ):
        with pytest.raises(DataError, match=rf"q\.json\[0\]: .*{message}"):
            TASKS["pvit"].load(write_json(tmp_path / "q.json", [record | change]), None)


# HumanRef

PEOPLE = [[0, 0, 20, 40], [30, 0, 50, 40], [60, 0, 80, 40]]


def human_ref(folder):
    draw_images(folder / "images", ["a.png"], (100, 50))
    base = {"image_name": "a.png", "candidate_boxes": PEOPLE, "answer_segmentations": []}
    records = [
        {"referring": "woman in red", "domain": "attribute", "sub_domain": "colour", "answer_boxes": PEOPLE[:1]},
        {"referring": "people", "domain": "position", "sub_domain": "all", "answer_boxes": PEOPLE},
        {"referring": "man on a horse", "domain": "rejection", "sub_domain": "rejection", "answer_boxes": []},
    ]
    records = [{"id": str(number), **base, **record} for number, record in enumerate(records)]
    (folder / "annotations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_human_ref_reads_all_boxes_in_every_format(tmp_path):
    data = human_ref(tmp_path)
    items = TASKS["human_ref"].load(data, None)
    assert [item.groups["people"] for item in items] == ["1", "2-5", "none"]
    for kind in BoxFormat.KINDS:
        texts = ["\n".join(BoxFormat(kind).write("", box, (50, 100)) for box in item.extra["boxes"]) for item in items]
        found = metrics(score("human_ref", items, [*texts[:2], "There is no such person."], kind))
        assert found["rejection"] == {"rejection": 1, "released_rejection": 1}
        assert all(value > 0.89 for value in found["human_ref"].values()), (kind, found)
    truth = [str(item.extra["boxes"]) for item in items]
    found = metrics(score("human_ref", items, truth))
    assert all(value == 1 for row in found.values() for value in row.values())
    half = score("human_ref", items[1:2], [str([PEOPLE[0], [30, 0, 50, 20]])]).predictions[0].scores
    assert half["recall"] == pytest.approx((2 / 3 + 9 / 3) / 10), "IoU 0.5 counts at the first threshold only"
    assert half["precision"] == pytest.approx((1 + 9 / 2) / 10)
    all_people = score("human_ref", items[:1], [str(PEOPLE)]).predictions[0].scores
    assert all_people["density_f1"] == pytest.approx(0.5 / 3), "F1, times right over written boxes"
    twice = score("human_ref", items[:1], [str([PEOPLE[0]] * 2)]).predictions[0].scores
    assert twice["precision"] == 0.5, "a box that is written twice matches once"
    report = report_of("human_ref", data, items, truth, tmp_path, "--boxes", "pixels")
    assert "a number of records: 1." in report
    assert "| rejection | no box | rejection 1.000, released_rejection 1.000 |" in report
    out = tmp_path / "none"
    write_json(out / "a.json", [{"id": str(number), "prediction": "[]"} for number in range(3)])
    assert main(["eval", "human_ref", str(data), "--predictions", str(out / "a.json"), "--out", str(out / "run")]) == 2


def test_human_ref_a_rejection_must_be_said(tmp_path):
    """The released scorer takes everything without a box for one."""
    item = TASKS["human_ref"].load(human_ref(tmp_path), None)[2]
    said = [
        ("none", 1, 1),
        ("[]", 1, 1),
        ("```json\n[]\n```", 1, 1),
        ("No one.", 1, 1),
        ("", 0, 1),
        ("A horse", 0, 1),
    ]
    said += [("I cannot identify people.", 0, 1), ("[0.1, 0.2, 0.3, 0.4]", 0, 1), ("[1, 2, 30, 40]", 0, 0)]
    for text, rejection, released in said:
        scores = score("human_ref", [item], [text]).predictions[0].scores
        assert scores == {"rejection": rejection, "released_rejection": released}, text
    assert score("human_ref", [item], ["[0.1, 0.2, 0.3, 0.4]"]).predictions[0].problem == "other box format"


def test_human_ref_the_released_matching_is_greedy():
    """The first right box takes the written box that the second one needs."""
    right, written = [[0, 0, 10, 10], [2, 0, 12, 10]], [[1, 0, 11, 10], [-3, 0, 7, 10]]
    assert _released_matches(right, written, 0.5) == 1
    assert _most_matches(right, written, 0.5) == 2
    rng = random.Random(0)
    for _ in range(200):
        boxes = [[x, 0, x + 10, 10] for x in (rng.randint(0, 30) for _ in range(8))]
        greedy, most = (count(boxes[:4], boxes[4:], 0.5) for count in (_released_matches, _most_matches))
        assert greedy <= most <= 4
        assert most == _most_matches(boxes[4:], boxes[:4], 0.5)


def test_human_ref_a_record_without_candidates(tmp_path):
    data = human_ref(tmp_path)
    record = json.loads((data / "annotations.jsonl").read_text().splitlines()[0])
    (data / "annotations.jsonl").write_text(json.dumps(record | {"candidate_boxes": []}))
    items = TASKS["human_ref"].load(data, None)
    scores = score("human_ref", items, [str(PEOPLE[:1])]).predictions[0].scores
    assert (scores["density_f1"], scores["released_density_f1"]) == (1, 0)
    for change, message in (
        ({"answer_boxes": []}, "domain='attribute' with 0 answer_boxes"),
        ({"domain": "rejection"}, "domain='rejection' with 1 answer_boxes"),
        ({"answer_boxes": [[1, 2]]}, r"answer_boxes holds \[1, 2\]"),
        ({"answer_boxes": [[5, 5, 1, 1]]}, r"answer_boxes holds \[5, 5, 1, 1\]"),
        ({"candidate_boxes": None}, "the record has no 'candidate_boxes'"),
        ({"referring": 3}, "referring=3 must be a text"),
    ):
        (data / "annotations.jsonl").write_text(json.dumps(record | change))
        with pytest.raises(DataError, match=rf"annotations\.jsonl:1: .*{message}"):
            TASKS["human_ref"].load(data, None)


def test_all_boxes_of_an_answer():
    boxes = BoxFormat("pixels")
    text = '[{"bbox_2d": [1, 2, 30, 40], "label": "Tom"}, {"bbox_2d": [50, 5, 60, 40], "label": "Kate"}]'
    assert boxes.read_boxes(text, (50, 100)) == ([[1, 2, 30, 40], [50, 5, 60, 40]], None)
    assert boxes.read_boxes("no one", (50, 100)) == ([], "none")
    assert boxes.read_boxes("[1, 2, 30, 40] and [0.1, 0.2, 0.3, 0.4]", (50, 100)) == ([[1, 2, 30, 40]], "convention")
    with pytest.raises(ValueError, match="image_size=None"):
        BoxFormat("norm1000").read_boxes("[1, 2, 3, 4]", None)


# A target that is not in the image


def location(box=(10, 10, 30, 30), **changes):
    record = {"type": "location", "target": "Kate", "answer": "", "id": "a"}
    record["identities"] = [{"name": "Kate", "images": ["k.png"]}]
    record["messages"] = [
        {"role": "user", "content": [{"type": "image", "image": "s.png"}, {"type": "text", "text": "?"}]}
    ]
    record["boxes"] = [{"name": "Kate", "image": "s.png", "box": list(box)}] if box else []
    return parse_sample(record | changes)


def test_location_of_a_person_who_is_not_there():
    there, absent = location(), location(None, answer="not here", id="b")
    said = [("not here", 1, 0), ("[]", 1, 0), ("Kate is not in this image.", 1, 0), ("[10, 10, 30, 30]", 0, 1)]
    said += [("[0.1, 0.1, 0.3, 0.3]", 0, 1), ("", 0, 0), ("I cannot identify people.", 0, 0)]
    for text, not_here, false_positive in said:
        answers = [Answer("a", text, image_size=(50, 100)), Answer("b", text, image_size=(50, 100))]
        summary = score_answers([there, absent], answers, read_box=BoxFormat("pixels").read).summary["location"]
        found = summary["metrics"]
        assert (found["not_here"], found["false_positive"]) == (not_here, false_positive), text
        assert found["acc@0.5"] == (text == "[10, 10, 30, 30]"), "only of those who are there"
    for record, message in (
        ({"box": None}, 'set answer to "not here"'),
        ({"box": None, "answer": "not here", "target": None}, "has no box in the last image"),
        ({"answer": "not here"}, "boxes has its box"),
    ):
        with pytest.raises(DataError, match=message):
            location(**record)


def test_grounding_of_an_expression_that_describes_nothing(tmp_path):
    (tmp_path / "g.jsonl").write_text(json.dumps({"image": "a.png", "sent": "a man", "bbox": []}))
    items = TASKS["grounding"].load(tmp_path / "g.jsonl", None)
    assert metrics(score("grounding", items, ["[1, 2, 3, 4]"]))["location"] == {"not_here": 0, "false_positive": 1}
    assert metrics(score("grounding", items, ["none"]))["location"] == {"not_here": 1, "false_positive": 0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("not here", True), ("None", True), ("[]", True), ("[[]]", True), ("null", True), ('{"boxes": []}', True),
        ("不在图中", True), ("<think>She is at [1, 2].</think>not here", True), ("", False), ("a horse", False),
        ("I cannot identify people.", False), ("She is here.", False), ("It is true that she is not here", True),
    ],
)  # fmt: skip
def test_answers_that_say_that_nothing_is_there(text, expected):
    assert says_absent(text) is expected


TEXTS = [
    "",
    " ",
    "[[[[",
    "[1e400, 0, 1e400, 5]",
    "<think>",
    "A" * 999,
    "yes no " * 99,
    "\0",
    "[1, 2, 3, 4] " * 99,
    "<sks>",
]


def make(name: str, folder):
    """The miniature of a benchmark."""
    if name == "mmpb":
        return mmpb_csv(folder / "mmpb", mmpb_rows(), letters=True)
    return {"repic": repic, "pvit": p_bench, "human_ref": human_ref}[name](folder)


NAMES = ["mmpb", "repic", "pvit", "human_ref"]


@pytest.mark.parametrize("name", NAMES)
def test_any_text_gets_scores_from_0_to_1(tmp_path, name):
    items = TASKS[name].load(make(name, tmp_path), None)
    for text in TEXTS:
        result = score(name, items, [text] * len(items))
        json.dumps(result.to_dict(), allow_nan=False)
        assert all(0 <= value <= 1 for prediction in result.predictions for value in prediction.scores.values())
        assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize("name", NAMES)
def test_shuffled_answers_score_chance(tmp_path, name):
    """Right answers of each task in random order."""
    items = TASKS[name].load(make(name, tmp_path), None)
    if name == "human_ref":
        sets = [{tuple(box) for box in item.extra["boxes"]} for item in items]
        texts = [str(item.extra["boxes"]) for item in items]
        chance = {"recall": chance_of_sets([boxes for boxes in sets if boxes], sets), "rejection": 1 / 3}
        check_shuffled(partial(score, name), items, texts, chance)
        return
    for task in dict.fromkeys(item.sample.task for item in items):
        found = [item for item in items if item.sample.task == task]
        if name == "repic":
            tags = [set(item.extra["tags"]) for item in found]
            texts, chance = [" and ".join(names) for names in tags], {"recall": chance_of_sets(tags, tags)}
        else:
            texts = [item.sample.answer for item in found]
            chance = {"accuracy": chance_of_labels(texts)}
        if task not in ("unanswerable", "description"):  # of which every right answer is right everywhere
            check_shuffled(partial(score, name), found, texts, chance)


def test_a_model_answers_all_of_them(tmp_path):
    processor = small_processor()
    small_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for name in NAMES:
        out = tmp_path / "out" / name
        command = ["eval", name, str(make(name, tmp_path)), "--model", str(tmp_path / "model"), "--out", str(out)]
        assert main([*command, "--max-new-tokens", "2"]) == 0
        assert "## Constant answers" in (out / "report.md").read_text()
