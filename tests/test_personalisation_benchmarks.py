"""Yo'LLaVA, MyVLM, RAP and MC-LLaVA: miniatures in the true formats, released scores, their traps, and commands."""

import json
import random

import pytest
from PIL import Image

from idavlm import attach_id_former, save_id_former
from idavlm.cli.main import main
from idavlm.data import DataError
from idavlm.evaluation import Answer, load_checkpoint
from idavlm.evaluation.task_run import TaskRun, load_scores
from idavlm.evaluation.tasks import TASKS
from idavlm.evaluation.tasks.mc_llava import character_bleu
from idavlm.evaluation.tasks.rap import normalize_answer
from tests.fuzz.test_evaluation_files import mutate
from tests.shuffled_answers import chance_of_labels, chance_of_sets, check_shuffled
from tests.test_eval_tasks import NASTY, REFUSALS
from tests.vlm_families import tiny_model, tiny_processor


def draw(root, *paths):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (40 * number % 256, 90, 200)).save(root / path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def score(name, items, text=lambda item: item.sample.answer):
    answers = [Answer(item.sample.id, text(item)) for item in items]
    result = TASKS[name].score(items, answers, None)
    return result, {task: row["metrics"] for task, row in result.summary.items()}


def of_task(items, task):
    return [item for item in items if item.sample.task == task]


def summary(name, items, text=lambda item: item.sample.answer):
    return TASKS[name].summary(items, score(name, items, text)[0])


# --- Yo'LLaVA --------------------------------------------------------------------------------------------------------


@pytest.fixture
def yollava(tmp_path):
    root = tmp_path / "yollava-data"
    for concept in ("mug7", "bo", "shiba"):
        draw(root, *(f"train/{concept}/{number}.png" for number in (10, 2, 0, 1, 3, 4)), f"test/{concept}/0.png")
        draw(root, f"test/{concept}/2.png", f"train/{concept}/negative_example/7.png")
    options = {"A": "A lamp", "B": "A fern"}
    write(
        root / "yollava-visual-qa.json",
        {
            concept: {
                f"./yollava-data/test/{concept}/{number}.png": {
                    "question": "What is beside <sks>?", "options": options, "correct_answer": letter,
                }
                for number, letter in ((0, "A"), (2, second))
            }
            for concept, second in (("mug7", "B"), ("bo", "A"))
        },
    )  # fmt: skip
    return root


def test_yollava_asks_each_concept_of_every_image(yollava, tmp_path):
    run = TaskRun(TASKS["yollava"], yollava, tmp_path / "out")
    items = run.load_items()
    recognition, choices = of_task(items, "recognition"), of_task(items, "choice_v")
    assert (len(recognition), len(choices)) == (3 * 6, 4)
    assert sum(item.sample.answer == "Yes" for item in recognition) == 6
    [identity] = choices[0].sample.identities
    assert identity.name == "<mug7>"
    assert identity.images == [f"train/mug7/{number}.png" for number in range(5)]  # in order; no negative examples
    assert recognition[0].sample.messages[0].content[-1].text == (
        "\nCan you see <bo> in this photo? Answer with a single word or phrase."
    )
    assert choices[0].sample.messages[0].content[-1].text.startswith("\nQuestion: What is beside <mug7>?\nOptions:\nA.")
    fewer = TaskRun(TASKS["yollava"], yollava, tmp_path / "out", max_references=1).load_items()
    assert fewer[0].sample.identities[0].images == ["train/bo/0.png"]
    more = TaskRun(TASKS["yollava"], yollava, tmp_path / "out", max_references=50).load_items()
    assert more[0].sample.identities[0].images[-1] == "train/bo/10.png"
    assert "text-only questions" in summary("yollava", items)


def test_yollava_released_recognition_drops_answers_other_than_yes_and_no(yollava):
    items = TASKS["yollava"].load(yollava, None)
    result, metrics = score("yollava", items)
    assert set(metrics["recognition"].values()) == set(metrics["choice_v"].values()) == {1.0}
    assert result.summary["recognition"]["chance"] == {"positive": 0.5, "negative": 0.5}
    # Right for one of six positives, otherwise evasive: the released scorer sees a perfect model.
    first = next(item.sample.id for item in items if item.sample.answer == "Yes")
    _, metrics = score("yollava", items, lambda item: "Yes" if item.sample.id == first else "I cannot tell.")
    assert metrics["recognition"]["released_positive"] == 1
    assert metrics["recognition"]["positive"] == pytest.approx(1 / 6)
    assert metrics["recognition"]["negative"] == 0
    assert "released_negative" not in metrics["recognition"]
    # "yes." is an answer, but not for the released scorer.
    _, metrics = score("yollava", items, lambda item: item.sample.answer.lower() + ".")
    assert metrics["recognition"] == {"positive": 1, "negative": 1}


def test_yollava_constant_answers_score_chance(yollava):
    items = TASKS["yollava"].load(yollava, None)
    text = summary("yollava", items, lambda item: "Yes")
    assert "| recognition | always Yes | positive 1.000, negative 0.000, weighted 0.500 |" in text
    assert "| choice_v | always A | accuracy 0.750 |" in text
    assert "| pairs | 1.000 | 0.000 | 0.500 |" in text


def test_yollava_files_that_do_not_fit_are_named(yollava):
    with pytest.raises(DataError, match=r"train is not a folder; pass yollava-data"):
        TASKS["yollava"].load(yollava.parent, None)
    file = yollava / "yollava-visual-qa.json"
    content = json.loads(file.read_text())
    for change, message in (
        ({"correct_answer": "C"}, r"qa.json: bo: .*0.png: correct_answer='C' is not one of the letters A, B"),
        ({"options": {"B": "x", "A": "y"}}, r"0.png: options=.* must be texts by letters in order"),
        ({"question": None}, r"0.png: the record has no 'question'"),
    ):
        entry = content["bo"]["./yollava-data/test/bo/0.png"] | change
        write(file, {"bo": {"./yollava-data/test/bo/0.png": entry}})
        with pytest.raises(DataError, match=message):
            TASKS["yollava"].load(yollava, None)
    write(file, {"tom": content["bo"]})
    with pytest.raises(DataError, match=r"'tom' is not one of the concepts"):
        TASKS["yollava"].load(yollava, None)
    file.unlink()
    assert f"visual questions: {file} does not exist" in summary("yollava", TASKS["yollava"].load(yollava, None))


# --- MyVLM -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def myvlm(tmp_path):
    root = tmp_path / "objects"
    for concept in ("red_mug", "cat_statue"):
        draw(root, *(f"{concept}/{number}.jpg" for number in range(7)))
        write(
            root / concept / "captions.json",
            {f"{number}.jpg": [f"A {concept} on a table.", f"My {concept}."] for number in range(7)},
        )
    return root


def test_myvlm_captions_the_images_that_introduce_nothing(myvlm):
    items = TASKS["myvlm"].load(myvlm, None)
    assert len(items) == 5 * 2 * 3
    for item in items:
        [identity] = item.sample.identities
        assert identity.name == "sks"
        assert len(identity.images) == 4
        assert item.sample.message_images[0] not in identity.images
        assert item.sample.answer == "A sks on a table."
    assert len({tuple(item.sample.identities[0].images) for item in items}) > 2  # the splits differ
    assert [item.sample.id for item in items] == [item.sample.id for item in TASKS["myvlm"].load(myvlm, None)]
    assert "16 people are not released" in summary("myvlm", items)


def test_myvlm_recall_of_the_name_as_a_word(myvlm):
    items = TASKS["myvlm"].load(myvlm, None)
    assert set(score("myvlm", items)[1]["caption"].values()) == {1.0}
    # Neither the name of the class nor a part of a word shows recognition.
    assert score("myvlm", items, lambda item: "A red mug.")[1]["caption"] == {"recall": 0}
    assert score("myvlm", items, lambda item: "Two desksks.")[1]["caption"] == {"recall": 0}


def test_myvlm_files_that_do_not_fit_are_named(myvlm):
    write(myvlm / "red_mug" / "captions_augmented.json", {f"{number}.jpg": ["A mug."] for number in range(5)})
    assert "images do not name the concept: red_mug/" in summary("myvlm", TASKS["myvlm"].load(myvlm, None))
    write(myvlm / "red_mug" / "captions_augmented.json", {"0.jpg": "A mug."})
    with pytest.raises(DataError, match=r"captions_augmented.json: 0.jpg: 'A mug.' is not a list of captions"):
        TASKS["myvlm"].load(myvlm, None)
    write(myvlm / "red_mug" / "captions_augmented.json", {"0.jpg": ["A mug."]})
    with pytest.raises(DataError, match=r"has 1 images; 4 introduce the concept"):
        TASKS["myvlm"].load(myvlm, None)


# --- RAP -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rap(tmp_path):
    root = tmp_path / "RAP-MLLM"
    names = {"mug7": "cup", "pigcup": "cup", "bo": "dog"}
    draw(root, *(f"example_database/{name}.png" for name in names))
    draw(root, *(f"yollava-data/test/{name}/{number}.png" for name in names for number in (0, 1)))
    concepts = {
        f"<{name}>": {"name": name, "image": f"example_database/{name}.png", "info": f"<{name}> is a {kind}.",
                      "category": kind}
        for name, kind in names.items()
    }  # fmt: skip
    paths = {concept["image"]: tag for tag, concept in concepts.items()}
    write(root / "example_database/database.json", {"concept_dict": concepts, "path_to_concept": paths})
    records = []
    for shown in names:
        for asked in names:
            record = {"image": f"benchmark_data/yollava-data/test/{shown}/0.png", "concept": asked}
            record["question"] = f"<image>\nIs <{asked}> in this image? Answer with a single word or phrase."
            if shown == asked:
                records.append(record | {"type": "positive", "correct_answer": True})
            records.append(record | {"type": "negative", "correct_answer": shown == asked})
    write(root / "eval/recognition_test.json", records)
    visual = {"question": "What is beside sks?", "options": {"A": "A lamp", "B": "A fern"}}
    images = {"./yollava-data/test/mug7/0.png": "A", "./yollava-data/test/mug7/1.png": "B"}
    questions = {path: visual | {"correct_answer": letter} for path, letter in images.items()}
    write(root / "eval/yollava-visual-qa.json", {"mug7": questions})
    text = {"question": "What is sks?", "option": {"A": "A cup", "B": "A dog"}, "correct_answer": "A"}
    write(root / "eval/yollava-text-only-qa.json", {"mug7": {str(number): text for number in range(10)}})
    write(root / "eval/captions.json", {"yollava-data/test/mug7/0.png": ["mug7"], "yollava-data/test/bo/0.png": ["bo"]})
    return root


def test_rap_recognition_counts_a_pair_once_and_by_its_right_answer(rap):
    items = TASKS["rap"].load(rap, None)
    recognition = of_task(items, "recognition")
    assert len(recognition) == 9
    assert sum(item.sample.answer == "Yes" for item in recognition) == 3
    [identity] = recognition[0].sample.identities
    assert (identity.name, identity.images) == ("<mug7>", ["example_database/mug7.png"])
    assert recognition[0].sample.message_images == ["yollava-data/test/mug7/0.png"]
    assert recognition[0].sample.messages[0].content[-1].text == (
        "\n[Name: <mug7>, Info: <mug7> is a cup.\n]Is <mug7> in this image? Answer with a single word or phrase."
    )
    assert score("rap", items)[1]["recognition"] == {"positive": 1, "negative": 1}
    text = summary("rap", items, lambda item: "No")
    assert "3 recognition records that repeat another one are asked once" in text
    assert "| recognition | always No | positive 0.000, negative 1.000, weighted 0.500 |" in text


def test_rap_released_scorer_deletes_the_answer_a(rap):
    assert normalize_answer("A") == normalize_answer("") == normalize_answer("The.") == ""
    items = TASKS["rap"].load(rap, None)
    _, metrics = score("rap", items)
    for task in ("choice_v", "choice_t"):
        assert metrics[task] == {"accuracy": 1, "released_accuracy": 1}
    assert metrics["choice_t_shuffled"] == {"accuracy": 1}
    # An empty answer is right where A is, and an explained one is wrong everywhere.
    result, metrics = score("rap", items, lambda item: "")
    assert metrics["choice_v"] == {"accuracy": 0, "released_accuracy": 0.5}
    assert metrics["choice_t"] == {"accuracy": 0, "released_accuracy": 1}
    assert result.summary["choice_t"]["unparsed"] == 10
    _, metrics = score("rap", items, lambda item: f"{item.sample.answer}. A thing")
    assert metrics["choice_v"] == {"accuracy": 1, "released_accuracy": 0}


def test_rap_text_questions_are_also_asked_with_shuffled_options(rap):
    items = TASKS["rap"].load(rap, None)
    _, metrics = score("rap", items, lambda item: "A")
    assert metrics["choice_t"]["accuracy"] == 1
    assert metrics["choice_t_shuffled"]["accuracy"] == 0.5
    for item in of_task(items, "choice_t_shuffled"):
        assert f"{item.sample.answer}. A cup" in item.sample.messages[0].content[-1].text
        assert not item.sample.message_images
    text = summary("rap", items, lambda item: "A")
    assert "| choice_t | always A | accuracy 1.000, released_accuracy 1.000 |" in text
    assert "| choice_t | always B | accuracy 0.000, released_accuracy 0.000 |" in text
    assert "| choice_t_shuffled | always A | accuracy 0.500 |" in text


def test_rap_captions_introduce_a_wrong_concept_too(rap):
    items = of_task(TASKS["rap"].load(rap, None), "caption")
    assert [identity.name for identity in items[0].sample.identities] == ["<mug7>", "<pigcup>"]  # the same category
    assert score("rap", items)[1]["caption"] == {"recall": 1, "precision": 1}
    everything = {item.sample.id: " ".join(one.name for one in item.sample.identities) for item in items}
    assert score("rap", items, lambda item: everything[item.sample.id])[1]["caption"] == {"recall": 1, "precision": 0.5}
    assert score("rap", items, lambda item: "A mug.")[1]["caption"] == {"recall": 0, "precision": 0}


def test_rap_files_that_do_not_fit_are_named(rap):
    (rap / "eval/captions.json").unlink()
    assert "eval/captions.json does not exist" in summary("rap", TASKS["rap"].load(rap, None))
    records = json.loads((rap / "eval/recognition_test.json").read_text())
    write(rap / "eval/recognition_test.json", [records[0], records[1] | {"correct_answer": False}])
    with pytest.raises(DataError, match=r"recognition_test.json.*contradicts an earlier record"):
        TASKS["rap"].load(rap, None)
    write(rap / "eval/recognition_test.json", [records[0] | {"correct_answer": "yes"}])
    with pytest.raises(DataError, match=r"correct_answer='yes' must be"):
        TASKS["rap"].load(rap, None)
    write(rap / "eval/recognition_test.json", [records[0] | {"concept": "tom"}])
    with pytest.raises(DataError, match=r"'tom' is not a concept of the database"):
        TASKS["rap"].load(rap, None)
    with pytest.raises(DataError, match=r"has neither example_database/database.json nor database.json"):
        TASKS["rap"].load(rap / "eval", None)


# --- MC-LLaVA --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mc_llava(tmp_path):
    root, kind = tmp_path / "mcdataset", "two_concept"
    scenarios = [("Ann", "Bob"), ("Joanna", "Tim")]
    write(root / "concept_type.json", {name: kind for names in scenarios for name in names})
    choice = {"Human": "What is <{}> holding?\nA. Cup\nB. Book\nC. Hat", "AI": "B"}
    for names in scenarios:
        multi = f"{kind}/multi/{'_'.join(names)}"
        draw(root, *(f"{multi}/{number}.png" for number in range(2)))
        for name in names:
            train, test = f"{kind}/concept/train/{name}", f"{kind}/concept/test/{name}"
            draw(root, *(f"{train}/{number}.png" for number in range(3)), f"{train}/0_mask.png")
            draw(root, *(f"{test}/{number}.png" for number in range(2)))
            asked = {"Human": choice["Human"].format(name), "AI": "B"}
            write(root / test / "choice.json", {f"{test}/{number}.png": asked for number in range(2)})
            said = {"Human": f"What is <{name}> doing?", "AI": "Reading a book."}
            write(root / test / "vqa.json", {f"./data/{test}/{number}.png": said for number in range(2)})
            write(root / test / "qa.json", [{"question": f"Who is <{name}>?\nA. x\nB. y\nC. z", "answer": "C"}])
        both = [choice | {"AI": "A"}, choice, choice | {"AI": "C"}]
        images = [f"{multi}/{number}.png" for number in range(2)]
        for name in ("choice.json", "vqa_position.json"):
            write(root / multi / name, dict.fromkeys(images, both))
        write(root / multi / "vqa.json", {image: [{"Human": "Why?", "AI": "They talk."}] for image in images})
        write(root / multi / "qa.json", [{"question": "Who?\nA. x\nB. y\nC. z", "answer": "A"}])
        places = [{names[0]: "left", names[1]: "right"}, {names[0]: "left", names[1]: None}]
        # In another order than that of the file names, by which the released code pairs them.
        write(root / multi / "position.json", dict(reversed(list(zip(images, places, strict=True)))))
    return root


def test_mc_llava_introduces_all_concepts_of_the_scenario(mc_llava):
    items = TASKS["mc_llava"].load(mc_llava, None)
    settings = [(item.sample.task, item.groups["setting"]) for item in items if item.extra["scenario"] == "Ann_Bob"]
    assert {setting: settings.count(setting) for setting in settings} == {
        ("recognition", "si_sq"): 8, ("recognition", "mi_sq"): 4, ("recognition", "mi_mq"): 2, ("caption", "si"): 4,
        ("caption", "mi"): 2, ("choice_v", "si_sq"): 4, ("vqa", "si_sq"): 4, ("choice_t", "s"): 2,
        ("choice_v", "mi_sq"): 4, ("choice_v", "mi_mq"): 2, ("vqa", "mi_sq"): 2, ("choice_position", "mi_sq"): 4,
        ("choice_position", "mi_mq"): 2, ("choice_t", "m"): 1,
    }  # fmt: skip
    for item in items:
        # Each scenario has its own concepts, although "Ann" is a part of "Joanna".
        assert [f"<{name}>" for name in item.extra["scenario"].split("_")] == [
            identity.name for identity in item.sample.identities
        ]
        assert len(item.sample.identities[0].images) == 3  # no mask
    joint = next(item for item in items if item.groups["setting"] == "mi_mq")
    assert "Can you see <Ann> and <Bob> in this photo?" in joint.sample.messages[0].content[-1].text
    question = of_task(items, "choice_v")[0].sample.messages[0].content[-1].text
    assert question.endswith("C. Hat\nIMPORTANT: Answer the question using a single letter A, B or C.")
    assert "random images of other scenarios" in summary("mc_llava", items)
    assert len(TaskRun(TASKS["mc_llava"], mc_llava, mc_llava).load_items()) == len(items)


def test_mc_llava_recognition_knows_who_is_absent(mc_llava):
    items = TASKS["mc_llava"].load(mc_llava, None)
    result, metrics = score("mc_llava", items)
    assert metrics["recognition"]["positive"] == metrics["recognition"]["negative"] == 1
    # The released code expects Yes of Bob in the image that does not show him, alone and with Ann.
    wrong = [one for one in result.predictions if one.scores.get("released_positive") == 0]
    assert len(wrong) == 4
    assert all(one.answer == "No" for one in wrong)
    for task in ("choice_v", "choice_t", "choice_position"):
        assert metrics[task] == {"accuracy": 1, "released_accuracy": 1}
        assert result.summary[task]["chance"] == {"accuracy": pytest.approx(1 / 3)}
    # The released code compares unstripped.
    _, metrics = score("mc_llava", items, lambda item: f"{item.sample.answer}.\n")
    assert metrics["choice_v"] == {"accuracy": 1, "released_accuracy": 0}
    assert metrics["recognition"]["positive"] == 1
    assert metrics["recognition"]["released_accuracy"] == 0
    _, metrics = score("mc_llava", items, lambda item: "B")
    assert metrics["choice_position"]["accuracy"] == pytest.approx(1 / 3)


def test_mc_llava_captions_belong_to_their_own_images(mc_llava):
    items = of_task(TASKS["mc_llava"].load(mc_llava, None), "caption")
    names = {item.sample.message_images[0]: item.extra["names"] for item in items}
    assert names["two_concept/multi/Ann_Bob/0.png"] == ["<Ann>", "<Bob>"]
    assert names["two_concept/multi/Ann_Bob/1.png"] == ["<Ann>"]
    _, metrics = score("mc_llava", items)
    assert metrics["caption"] == {"recall": 1, "precision": 1, "released_recall": 1}
    # Names without brackets count; the released code finds Ann in Joanna.
    ann = [item for item in items if item.groups["setting"] == "mi" and item.extra["names"] == ["<Ann>"]]
    assert score("mc_llava", ann, lambda item: "Joanna")[1]["caption"]["released_recall"] == 0
    assert score("mc_llava", ann, lambda item: "Annabel")[1]["caption"] == {
        "recall": 0, "precision": 0, "released_recall": 1,
    }  # fmt: skip
    assert score("mc_llava", ann, lambda item: "Ann and Bob")[1]["caption"]["precision"] == 0.5


def test_mc_llava_bleu_is_over_characters(mc_llava):
    vqa = of_task(TASKS["mc_llava"].load(mc_llava, None), "vqa")
    assert score("mc_llava", vqa)[1]["vqa"] == {"word_f1": 1, "released_bleu": 1}
    assert character_bleu("abcd", "xyz") == character_bleu("abcd", "") == 0
    # Computed by hand: 3 of 3 characters, 1 of 2 pairs, brevity exp(1 - 4/3).
    assert character_bleu("abcd", "abd") == pytest.approx(2.718281828 ** (-1 / 3) * 0.5**0.3)
    assert character_bleu("ab", "ba") == pytest.approx(0.1**0.3)  # no pair is counted as 0.1
    # Words that are all wrong share most characters.
    assert character_bleu("Reading a book.", "A boring deak.") > 0.6


def test_mc_llava_files_that_do_not_fit_are_named(mc_llava):
    multi = mc_llava / "two_concept/multi/Ann_Bob"
    write(multi / "choice.json", {"two_concept/multi/Ann_Bob/0.png": [{"Human": "Who?\nA. x\nB. y", "AI": "D"}]})
    with pytest.raises(DataError, match=r"choice.json: .*0.png: 0: the answer 'D' is not one of the options \(A, B\)"):
        TASKS["mc_llava"].load(mc_llava, None)
    (multi / "choice.json").unlink()
    items = TASKS["mc_llava"].load(mc_llava, None)
    assert f"{multi / 'choice.json'} does not exist" in summary("mc_llava", items)
    multi.rename(multi.with_name("Ann_Eve"))
    with pytest.raises(DataError, match=r"Ann_Eve: 'Eve' is not a concept of two_concept"):
        TASKS["mc_llava"].load(mc_llava, None)
    with pytest.raises(DataError, match=r"concept_type.json does not exist"):
        TASKS["mc_llava"].load(multi.parent, None)


# --- All four --------------------------------------------------------------------------------------------------------

BENCHMARKS = ("yollava", "myvlm", "rap", "mc_llava")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_any_answer_has_scores_and_a_refusal_has_none(name, request):
    folder = request.getfixturevalue(name)
    items = list({item.sample.task: item for item in TASKS[name].load(folder, None)}.values())
    for text in REFUSALS:
        result, metrics = score(name, items, lambda item, text=text: text)
        for task, row in result.summary.items():
            assert row["refused"] == row["n"], (task, text)
            own = {metric: value for metric, value in metrics[task].items() if not metric.startswith("released")}
            assert not any(value for metric, value in own.items() if metric != "word_f1"), (task, text)
    for text in NASTY:
        result, _ = score(name, items, lambda item, text=text: text)
        assert all(0 <= value <= 1 for one in result.predictions for value in one.scores.values()), text
        json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_mutated_files_are_loaded_or_named(name, request):
    """The error of a file that does not fit names the file, or the folder that lacks it."""
    folder, rng = request.getfixturevalue(name), random.Random(0)
    files = sorted(folder.rglob("*.json"))
    errors = []
    for _ in range(60):
        file = rng.choice(files)
        content = file.read_bytes()
        changed = json.loads(content)
        mutate(changed, rng)
        file.write_text(json.dumps(changed))
        try:
            TaskRun(TASKS[name], folder, folder / "out").load_items()
        except DataError as error:
            errors.append(str(error))
        file.write_bytes(content)
    assert 5 < len(errors) < 60
    assert [error for error in errors if str(folder) not in error] == []


@pytest.mark.parametrize("name", BENCHMARKS)
def test_answers_of_any_model_are_scored_by_the_command(name, request, tmp_path, capsys):
    folder = request.getfixturevalue(name)
    items = TASKS[name].load(folder, None)
    answers = [{"id": item.sample.id, "prediction": item.sample.answer} for item in items]
    write(tmp_path / "answers.json", answers)
    command = ["eval", name, str(folder), "--predictions", str(tmp_path / "answers.json"), "--out", str(tmp_path / "o")]
    assert main(command) == 0, capsys.readouterr().err
    assert {value for one in load_scores(tmp_path / "o")[0].predictions for value in one.scores.values()} <= {0.0, 1.0}
    assert "## Not evaluated" in (tmp_path / "o" / "report.md").read_text()
    assert main([*command, "--id-former", "folder"]) == 2
    assert "--id-former folder is part of a model; pass --model, not --predictions" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["yollava", "rap", "mc_llava"])
def test_shuffled_answers_score_chance(name, request):
    """Not of MyVLM: all its right captions hold the same name."""
    items = TASKS[name].load(request.getfixturevalue(name), None)

    def shuffled(items, texts):
        answers = [Answer(item.sample.id, text) for item, text in zip(items, texts, strict=True)]
        return TASKS[name].score(items, answers, None)

    for task in dict.fromkeys(item.sample.task for item in items):
        found = of_task(items, task)
        texts = [item.sample.answer for item in found]
        if len(set(texts)) == 1:  # in any order, they are right
            continue
        if task == "recognition":
            positive = texts.count("Yes") / len(texts)
            chance = {"positive": positive, "negative": 1 - positive}  # whose mean is 0.5
        elif task == "caption":
            names = [set(item.extra["names"]) for item in found]
            chance = {"recall": chance_of_sets(names, names)}
        else:  # right answers of vqa share no words
            chance = {"word_f1" if task == "vqa" else "accuracy": chance_of_labels(texts)}
        check_shuffled(shuffled, found, texts, chance)


# --- Models of transformers ------------------------------------------------------------------------------------------


def test_eval_takes_a_model_of_transformers_with_and_without_an_id_former(myvlm, tmp_path, monkeypatch):
    """Without an ID-Former, references are images of the prompt; with one, they become identities."""
    processor, model = tiny_processor("llava"), tiny_model("llava")
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    attach_id_former(model)
    save_id_former(model, tmp_path / "id_former")
    command = ["eval", "myvlm", str(myvlm), "--model", str(tmp_path / "llava"), "--device", "cpu"]
    command += ["--max-new-tokens", "2", "--max-references", "1", "--batch-size", "30"]
    for extra, out in (([], "plain"), (["--id-former", str(tmp_path / "id_former")], "attached")):
        assert main([*command, *extra, "--out", str(tmp_path / out)]) in (0, None)
        result, facts = load_scores(tmp_path / out)
        assert len(result.predictions) == 30
        assert facts["task"] == "myvlm"
    sample = TaskRun(TASKS["myvlm"], myvlm, tmp_path, max_references=2).load_items()[0].sample
    for id_former, has_roles in ((None, False), (tmp_path / "id_former", True)):
        _, loaded = load_checkpoint(tmp_path / "llava", id_former=id_former)
        encoded = loaded.encode(sample, add_generation_prompt=True)
        assert len(encoded["pixel_values"]) == 3
        assert ("image_roles" in loaded.collate([encoded])) == has_roles
