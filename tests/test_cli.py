"""The command line: every mistake of a user is one line and exit status 2, and nothing stale is scored."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image

from idavlm.cli import eval as eval_command
from idavlm.cli.main import main
from idavlm.evaluation import generation
from idavlm.evaluation.judge import JudgeClient
from idavlm.evaluation.task_run import load_scores
from idavlm.utils import lock_folder
from tests.judge_server import JudgeServer
from tests.small_models import IMAGES, draw_images, small_model, small_processor


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts():
    """A process in the background of a shell ignores SIGINT, and so would its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def save_model(folder, seed: int = 0):
    processor = small_processor()
    model = small_model(processor)
    torch.manual_seed(seed)
    for parameter in model.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("trained"))


def questions(text: str = "Describe", count: int = 4) -> str:
    """Lines of a test file."""
    content = [{"type": "image", "image": "scene.png"}]
    return "".join(
        json.dumps(
            {
                "id": f"c{number}",
                "messages": [{"role": "user", "content": [*content, {"type": "text", "text": f"\n{text} {number}"}]}],
                "type": "caption_single",
                "answer": "Kate is waving.",
            }
        )
        + "\n"
        for number in range(count)
    )


@pytest.fixture
def work(tmp_path, trained):
    """A folder with a model, a test file, its images, and answers."""
    draw_images(tmp_path / "images", IMAGES)
    shutil.copytree(trained, tmp_path / "model")
    (tmp_path / "test.jsonl").write_text(questions())
    answers = [{"id": f"c{number}", "prediction": "Kate is waving."} for number in range(4)]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    return tmp_path


def run(work, *options, task: str = "records", data: str = "test.jsonl", out: str = "out") -> int:
    return main(["eval", task, str(work / data), "--out", str(work / out), *map(str, options)])


def generate(work, *options, out: str = "out") -> int:
    return run(work, "--model", work / "model", "--max-new-tokens", 3, *options, out=out)


def answered(work, out: str = "out") -> list[str]:
    return [json.loads(line)["prediction"] for line in (work / out / "predictions.jsonl").read_text().splitlines()]


def test_answers_of_a_model_that_was_retrained_in_place_are_not_scored(work, capsys):
    assert generate(work) == 0
    first = answered(work)
    capsys.readouterr()
    sizes = {path.name: path.stat().st_size for path in (work / "model").iterdir()}
    save_model(work / "model", seed=1)
    assert sizes == {path.name: path.stat().st_size for path in (work / "model").iterdir()}
    capsys.readouterr()
    assert generate(work) == 2
    error = capsys.readouterr().err
    assert "predictions.jsonl holds answers of other settings (model_weights: " in error
    assert error.endswith("to generate all answers again.\n")
    assert answered(work) == first, "neither reused nor replaced"
    assert generate(work, out="new") == 0
    assert answered(work, "new") != first
    (work / "out" / "predictions.jsonl").unlink()
    assert generate(work) == 0
    assert answered(work) == answered(work, "new")


def test_answers_to_edited_questions_and_replaced_images_are_not_scored(work, capsys):
    assert generate(work) == 0
    capsys.readouterr()
    (work / "test.jsonl").write_text(questions().replace("Describe 2", "What hat does she wear?"))
    assert generate(work) == 2
    assert (
        "answers to 1 items that have changed since ('c2': question); choose another folder" in capsys.readouterr().err
    )
    answers = ["--predictions", work / "out" / "predictions.jsonl"]
    assert run(work, *answers, out="scored") == 2
    assert "'c2' was generated before the question of the item changed" in capsys.readouterr().err
    (work / "test.jsonl").write_text(questions())
    assert run(work, *answers, out="scored") == 0
    assert generate(work) == 0
    Image.new("RGB", (80, 60)).save(work / "images" / "scene.png")
    capsys.readouterr()
    assert generate(work) == 2
    assert "answers to 4 items that have changed since ('c0': images; 'c1': images;" in capsys.readouterr().err
    assert run(work, *answers, out="scored") == 2
    assert "before the images of the item changed" in capsys.readouterr().err


def test_a_checkpoint_and_data_may_move(work, capsys):
    """Answers belong to content, not to paths."""
    assert generate(work) == 0
    for name in ("model", "images", "test.jsonl"):
        (work / "moved").mkdir(exist_ok=True)
        shutil.move(work / name, work / "moved" / name)
    time_of_answers = (work / "out" / "predictions.jsonl").stat().st_mtime_ns
    moved = [str(work / "moved" / "test.jsonl"), "--model", str(work / "moved" / "model"), "--max-new-tokens", "3"]
    assert main(["eval", "records", *moved, "--out", str(work / "out")]) == 0
    assert (work / "out" / "predictions.jsonl").stat().st_mtime_ns == time_of_answers


def test_only_runs_on_the_same_questions_are_compared(work, capsys):
    predictions = ["--predictions", work / "answers.json"]
    assert run(work, *predictions, out="a") == 0
    assert run(work, *predictions, out="b") == 0
    page = ["--out", str(work / "page.html")]
    compare = ["eval", "compare", str(work / "a"), str(work / "b")]
    assert main([*compare, *page]) == 0
    (work / "test.jsonl").write_text(questions().replace("Describe 2", "What hat does she wear?"))
    capsys.readouterr()
    assert main(compare) == 0, "scores of before the change are compared"
    assert main([*compare, *page]) == 2
    assert "test.jsonl has changed since" in capsys.readouterr().err
    assert run(work, *predictions, out="b") == 0
    assert main(compare) == 2
    assert "item 'c2' differs between a and b (question)" in capsys.readouterr().err
    (work / "test.jsonl").write_text(questions())
    Image.new("RGB", (80, 60)).save(work / "images" / "scene.png")
    assert run(work, *predictions, out="b") == 0
    capsys.readouterr()
    assert main(compare) == 2
    assert "item 'c0' differs between a and b (images)" in capsys.readouterr().err
    shutil.rmtree(work / "images")
    assert run(work, *predictions, out="b") == 0
    assert main(compare) == 0, "unknown images differ from nothing"
    scores = json.loads((work / "b" / "scores.json").read_text())
    for prediction in scores["predictions"]:
        del prediction["item"]
    (work / "b" / "scores.json").write_text(json.dumps(scores))
    capsys.readouterr()
    assert main(compare) == 2
    assert "b does not say which questions it scores" in capsys.readouterr().err


def test_the_second_of_two_runs_into_one_folder_is_refused_at_once(work, capsys):
    with lock_folder(work / "out"):
        start = time.monotonic()
        assert generate(work) == 2
        assert run(work, "--predictions", work / "answers.json") == 2
        assert time.monotonic() - start < 30
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"idavlm eval: {work / 'out'} is in use by process {os.getpid()}; wait until it ends, or choose "
                     "another path."] * 2  # fmt: skip
    assert run(work, "--predictions", work / "answers.json") == 0
    assert sorted(path.name for path in (work / "out").iterdir()) == ["report.md", "scores.json"]


def test_an_interrupted_run_says_what_is_kept(work, capsys, monkeypatch):
    real, batches = generation.generate_texts, []

    def interrupt(*arguments):
        if batches:
            signal.raise_signal(signal.SIGINT)
        batches.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(generation, "generate_texts", interrupt)
    assert generate(work, "--batch-size", 2) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"idavlm eval: interrupted. The answers so far are kept in {work / 'out' / 'predictions.jsonl'}. Repeat the "
        "command to continue."
    )
    assert len(answered(work)) == 2
    monkeypatch.setattr(generation, "generate_texts", real)
    assert generate(work, "--batch-size", 2) == 0
    assert len(answered(work)) == 4
    monkeypatch.setattr(eval_command, "load_checkpoint", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    capsys.readouterr()
    assert generate(work, out="other") == 130
    assert capsys.readouterr().err.startswith("idavlm eval: interrupted. No answers were generated yet.")
    assert not (work / "other").exists()


def test_an_interrupted_judge_does_not_wait_for_its_retries(work, capsys, monkeypatch):
    """The endpoint fails after the first reply; all retries would take a minute."""
    with JudgeServer(lambda content: "Score: 8", [None] + [503] * 99) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        interruption = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        start = time.monotonic()
        interruption.start()
        judged = ["--predictions", work / "answers.json", "--judge", "stub", "--judge-workers", 1]
        assert run(work, *judged) == 130
        assert time.monotonic() - start < 30
        assert f"The replies of the judge so far are kept in {work / 'out' / 'judge.jsonl'}" in capsys.readouterr().err
        server.faults.clear()
        asked = len(server.asked)
        assert run(work, *judged) == 0
        assert len(server.asked) - asked == 3


def test_a_judge_at_another_endpoint_is_asked_anew(tmp_path):
    """A model of the same name elsewhere may be another model."""
    message = [{"role": "user", "content": "one"}]
    for score in ("4", "7"):
        with JudgeServer(lambda content, score=score: score) as server:
            client = JudgeClient("stub", base_url=server.url, cache=tmp_path / "judge.jsonl")
            assert client.ask(message) == score
            assert client.ask(message) == score
            assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "gpu"], "device='gpu' cannot be used"),
        (["--device", "cuda:99"], "device='cuda:99' cannot be used"),
        (["--boxes", "inches"], "box_format='inches' is not known"),
        (["--boxes", ""], "box_format='' is not known"),
        (["--judge", "m"], "base_url is not set; export OPENAI_BASE_URL"),
        (["--judge", "m", "--judge-timeout", "nan"], "timeout=nan must be between"),
        (["--judge", "m", "--judge-timeout", "1e300"], "timeout=1e+300 must be between"),
        (["--judge", "m", "--judge-rate", "0"], "requests_per_minute=0.0 must be between"),
        (["--images", "nowhere"], "1 image files of 4 items are missing in nowhere"),
        (["--out", "test.jsonl"], "test.jsonl is a file; pass a folder"),
        (["--out", "test.jsonl/out"], "test.jsonl"),
        (["--model", "./nowhere"], "./nowhere: no processor can be loaded"),
        (["--model", "images"], "images: no processor can be loaded (it has no processor_config.json)"),
        (["--model", "test.jsonl"], "test.jsonl: no processor can be loaded"),
        (["--baselines"], "no item introduces an identity"),
    ],
)
def test_wrong_options_are_one_line(work, options, message, capsys, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert generate(work, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("idavlm eval: ")
    assert not (work / "out").exists(), "nothing is left"


@pytest.mark.parametrize("option", ["batch-size", "max-new-tokens", "judge-workers"])
@pytest.mark.parametrize("value", ["0", "-1", "", "1.5", "x"])
def test_zero_is_not_the_default(work, option, value, capsys):
    with pytest.raises(SystemExit) as caught:
        generate(work, f"--{option}", value)
    assert caught.value.code == 2
    assert f"argument --{option}: '{value}' must be an integer of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["model", "device", "images", "out", "judge", "judge-cache", "predictions"])
def test_an_empty_text_is_not_the_default(work, option, capsys, monkeypatch):
    """An empty path would be the current folder, for example from a shell variable that is not set."""
    monkeypatch.chdir(work)
    required = [] if option in ("model", "predictions") else ["--model", "model"]
    with pytest.raises(SystemExit) as caught:
        main(["eval", "records", "test.jsonl", "--out", "out", *required, f"--{option}", ""])
    assert caught.value.code == 2
    assert f"argument --{option}: '' is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "records", "", "--out", "out", "--model", "model"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no answer to 4 of 4 samples"), (b"[]", "has no answer to 4 of 4"), (b"{", "json:1: invalid JSON"),
        (b"[{]", "answers.json: invalid JSON list"), (b'[1, "x"]', "answers.json[0]: {'record': 1} is not an answer"),
        (b'{"id": "c0", "prediction": "\xff"}', "answers.json:1: invalid JSON"), (b"[" * 100000, "invalid JSON list"),
        (b'[{"id": "c0", "prediction": "x", "likelihoods": 5}]', "answers.json[0]: likelihoods=5 must be"),
        (b'[{"id": "c0", "prediction": "x", "image_size": 5}]', "answers.json[0]: image_size=5 must be"),
        (b"\x89PNG\r\n", "answers.json:1: invalid JSON"),
    ],
)  # fmt: skip
def test_broken_predictions_are_named(work, content, message, capsys):
    (work / "answers.json").write_bytes(content)
    assert run(work, "--predictions", work / "answers.json") == 2
    assert message in capsys.readouterr().err
    assert run(work, "--predictions", work / "images") == 2
    assert "images does not exist or is not a file" in capsys.readouterr().err


SCORES = {"task": "records", "data": "x", "images": "", "seconds": 0.0, "predictions": []}
PREDICTION = {"id": "c0", "task": "caption_single", "text": "x", "answer": "y", "scores": {"name_f1": 1.0}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "'predictions' is not a list"), ("[]", "holds a JSON list"), ("", "is not valid JSON"), ("\ud8000", ""),
        (json.dumps(SCORES | {"seconds": None}), "seconds=None is not a number"),
        (json.dumps(SCORES | {"task": 3}), "task=3 is not a text"),
        (json.dumps(SCORES | {"data": None}), "data=None is not a text"),
        (json.dumps(SCORES | {"predictions": {}}), "'predictions' is not a list"),
        (json.dumps(SCORES | {"predictions": [3]}), "predictions[0] is int"),
        *(
            (json.dumps(SCORES | {"predictions": [PREDICTION | change]}), f"predictions[0].{next(iter(change))}=")
            for change in (
                {"id": 3}, {"task": None}, {"text": ["x"]}, {"answer": None}, {"scores": 3}, {"scores": {"a": "b"}},
                {"scores": {"a": float("nan")}}, {"chance": []}, {"box": [1]}, {"box": "abcd"}, {"gold_box": {}},
                {"parsed": 1}, {"item": []}, {"item": {"question": 3}}, {"unknown": 1}, {"box": [1, 2, 3, 1e400]},
            )
        ),
        (json.dumps(SCORES | {"predictions": [{"id": "c0"}]}), "predictions[0].task=None"),
        (json.dumps(SCORES | {"task": "nothing"}), "is of task 'nothing', which is not known"),
    ],
)  # fmt: skip
def test_scores_of_another_shape_are_named(work, content, message, capsys):
    run(work, "--predictions", work / "answers.json", out="a")
    (work / "b").mkdir()
    (work / "b" / "scores.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    capsys.readouterr()
    assert main(["eval", "compare", str(work / "b"), str(work / "a")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(work / "b") in error


def test_items_that_occur_twice_are_not_compared(work, capsys):
    run(work, "--predictions", work / "answers.json", out="a")
    path = work / "a" / "scores.json"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps(scores | {"predictions": scores["predictions"] * 2}))
    capsys.readouterr()
    assert main(["eval", "compare", str(work / "a"), str(work / "a")]) == 2
    assert "a has 2 predictions of item 'c0'" in capsys.readouterr().err


def test_a_repeated_id_of_the_data_is_named(work, capsys):
    (work / "test.jsonl").write_text(questions(count=2) + questions(count=1))
    assert run(work, "--predictions", work / "answers.json") == 2
    assert "test.jsonl:3: id='c0' is not unique" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(work, monkeypatch):
    def broken(*arguments, **options):
        raise KeyError("bug")

    monkeypatch.setattr(eval_command, "_evaluate", broken)
    with pytest.raises(KeyError, match="bug"):
        run(work, "--predictions", work / "answers.json")


def test_scores_are_written_as_a_whole(work):
    assert run(work, "--predictions", work / "answers.json") == 0
    result, facts = load_scores(work / "out")
    assert {prediction.main_score for prediction in result.predictions} == {1.0}
    assert all(
        set(prediction.item) == {"question", "choices", "images", "references"} for prediction in result.predictions
    )
    assert facts["task"] == "records"


@pytest.mark.parametrize("command", [[], ["data"]])
def test_help_imports_no_torch(command):
    code = "import sys; from idavlm.cli.main import build_parser; parser = build_parser(*sys.argv[1:] or [None])\n"
    code += "try: parser.parse_args([*sys.argv[1:], '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("False\n")
