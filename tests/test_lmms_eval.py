"""The plug-in of lmms-eval, run by its own runner, or by a small one with the same interface."""

import importlib
import json
import runpy
from importlib.metadata import entry_points
from pathlib import Path
from statistics import fmean

import pytest
from PIL import Image
from transformers import AutoProcessor

from idavlm.cli.main import main
from idavlm.evaluation import Answer
from idavlm.evaluation.chat_messages import sample_of
from idavlm.evaluation.task_run import load_scores
from idavlm.evaluation.tasks import TASKS
from idavlm.models import BoxFormat
from tests.fake_mmid import build_mmid
from tests.fake_packages import use
from tests.small_models import small_model, small_processor
from tests.vlm_families import save_tiny_vlm, tiny_processor

PLUGIN = "idavlm.evaluation.lmms_eval"


@pytest.fixture
def runner():
    """``evaluator`` of lmms-eval. It brings torchvision and some seventy packages, too many for [dev]."""
    with use("lmms_eval", PLUGIN):
        yield importlib.import_module("lmms_eval.evaluator")


def evaluate(runner, checkpoint: Path, **options) -> dict[str, float]:
    """The figures of the task ``idavlm_mmid``."""
    from lmms_eval.tasks import TaskManager

    from idavlm.evaluation import lmms_eval

    arguments = {"pretrained": checkpoint, **options}
    found = runner.simple_evaluate(
        model="idavlm",
        model_args=",".join(f"{name}={value}" for name, value in arguments.items()),
        tasks=["idavlm_mmid"],
        task_manager=TaskManager(include_path=str(Path(lmms_eval.__file__).parent), include_defaults=False),
        batch_size=1,
        device="cpu",
        gen_kwargs="max_new_tokens=3",
        bootstrap_iters=10,
    )["results"]["idavlm_mmid"]
    figures = {name.split(",")[0]: value for name, value in found.items() if name.endswith(",none")}
    return {name: value for name, value in figures.items() if "stderr" not in name}


def figures_of(predictions) -> dict:
    """Scores of ``idavlm eval`` under the names of the task."""
    values: dict[str, list[float]] = {}
    for prediction in predictions:
        for metric, value in prediction.scores.items():
            name = f"{prediction.task.split('_')[0]}_{metric.replace('@', '_at_')}"
            values.setdefault(name, []).append(value)
    return {name: pytest.approx(fmean(found)) for name, found in values.items()}


def answer_mmid(folder: Path, monkeypatch, family: str, *, is_attached: bool) -> tuple[Path, Path | None]:
    """Run ``idavlm eval mmid`` on a tiny model of a family.

    Returns:
        The file of the benchmark and the folder of the ID-Former; the model is in ``folder / family``, the scores in
        ``folder / "out"``.
    """
    # Without torchvision, AutoProcessor cannot load the processors of models with videos.
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda path, **options: tiny_processor(family))
    benchmark, id_former = build_mmid(folder, rounds=1), save_tiny_vlm(folder, family)
    command = ["eval", "mmid", str(benchmark), "--model", str(folder / family), "--boxes", "pixels"]
    command += ["--batch-size", "1", "--max-new-tokens", "3", "--device", "cpu", "--out", str(folder / "out")]
    assert main([*command, "--id-former", str(id_former)] if is_attached else command) == 0
    return benchmark, id_former if is_attached else None


def test_messages_become_a_sample(tmp_path):
    image = Image.new("RGB", (30, 20), "teal")
    image.save(tmp_path / "file.jpg")
    content = [
        {"type": "text", "text": "Kate is "}, {"type": "image", "url": image}, {"type": "text", "text": "\n"},
        {"type": "text", "text": "In the image: "}, {"type": "image", "url": str(tmp_path / "file.jpg")},
        {"type": "text", "text": "\n What is Kate doing?"},
    ]  # fmt: skip
    sample = sample_of([{"role": "user", "content": content}], tmp_path, "7")
    assert [(identity.name, identity.images) for identity in sample.identities] == [("Kate", ["7-0.png"])]
    assert sample.message_images == ["7-1.png"]
    assert [part.text for part in sample.messages[-1].content if part.type == "text"][-1] == "\n What is Kate doing?"
    with Image.open(tmp_path / "7-1.png") as written:
        assert written.size == (30, 20)
    with pytest.raises(ValueError, match="content of type 'video' is not supported"):
        sample_of([{"role": "user", "content": [{"type": "video", "url": "x"}]}], tmp_path, "8")


def test_images_are_read_as_in_training(tmp_path):
    """Upright, and white where they are transparent."""
    clear = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    clear.save(tmp_path / "clear.png", exif=exif)
    for url in (str(tmp_path / "clear.png"), Image.open(tmp_path / "clear.png")):
        sample_of([{"role": "user", "content": [{"type": "image", "url": url}]}], tmp_path, "9")
        with Image.open(tmp_path / "9-0.png") as written:
            assert (written.size, written.getpixel((0, 0))) == ((20, 30), (255, 255, 255))


def test_the_folder_of_the_task(capsys):
    runpy.run_module("idavlm.evaluation.lmms_eval", run_name="__main__")
    assert (Path(capsys.readouterr().out.strip()) / "idavlm_mmid.yaml").is_file()


def test_the_task_in_its_own_runner(tmp_path, monkeypatch, runner):
    from lmms_eval.models import get_model

    from idavlm.evaluation.lmms_eval import mmid_task

    assert "idavlm" in {point.name for point in entry_points(group="lmms_eval.models")}, (
        "installed without it: reinstall"
    )
    benchmark = build_mmid(tmp_path, rounds=1)
    processor = small_processor()
    small_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("MMID_DATA", str(benchmark))
    with pytest.raises(ValueError, match="MMID_BOXES is not set"):
        mmid_task.MMIDTask(config={"task": "x", "output_type": "generate_until"})
    monkeypatch.setenv("MMID_BOXES", "pixels")
    model = get_model("idavlm")
    for argument, message in (("system_prompt", "is not supported"), ("temperature", "is not known")):
        with pytest.raises(ValueError, match=message):
            model(str(tmp_path / "model"), **{argument: "Be brief."})
    untrained = evaluate(runner, tmp_path / "model")
    assert untrained["location_acc_at_0.5"] == 0
    gold = {str(item["id"]): item["answer"] for item in json.loads(benchmark.read_text())}
    texts = dict(gold)
    monkeypatch.setattr(
        model,
        "_answer",
        lambda self, chunk: [texts[self.task_dict[request[4]][request[5]][request[3]]["id"]] for request in chunk],
    )
    right = evaluate(runner, tmp_path / "model")
    assert set(right) == {
        "matching_accuracy", "location_mean_iou", "location_acc_at_0.5", "qa_closest_accuracy",
        "caption_name_precision", "caption_name_recall", "caption_name_f1",
    }  # fmt: skip
    assert set(right.values()) == {1.0}
    # Every second answer is another one.
    items = TASKS["mmid"].load(benchmark, None)
    texts |= dict.fromkeys(list(gold)[::2], "Image 1, where Cora is reading a map at [40, 30, 150, 190].")
    answers = [Answer(item.sample.id, texts[item.sample.id]) for item in items]
    expected = figures_of(TASKS["mmid"].score(items, answers, BoxFormat("pixels").read).predictions)
    figures = evaluate(runner, tmp_path / "model")
    assert figures == expected
    assert all(0 < value < 1 for value in figures.values()), figures


@pytest.mark.parametrize(("family", "is_attached"), [("qwen2_5_vl", True), ("llava", False)])
def test_the_figures_are_those_of_idavlm_eval(tmp_path, monkeypatch, runner, family, is_attached):
    """Of a model with an attached ID-Former, and of one without, to which references are images of the prompt."""
    from lmms_eval.models import get_model

    benchmark, id_former = answer_mmid(tmp_path, monkeypatch, family, is_attached=is_attached)
    predictions = load_scores(tmp_path / "out")[0].predictions
    monkeypatch.setenv("MMID_DATA", str(benchmark))
    monkeypatch.setenv("MMID_BOXES", "pixels")
    model, texts = get_model("idavlm"), {}
    answer = model._answer

    def recorded(self, chunk):
        found = answer(self, chunk)
        texts.update(
            {self.task_dict[row[4]][row[5]][row[3]]["id"]: text for row, text in zip(chunk, found, strict=True)}
        )
        return found

    monkeypatch.setattr(model, "_answer", recorded)
    figures = evaluate(runner, tmp_path / family, **({"id_former": id_former} if id_former else {}))
    assert texts == {prediction.id: prediction.text for prediction in predictions}
    assert len(set(texts.values())) > 3
    expected = figures_of(predictions)
    del expected["qa_accuracy"]  # by likelihood, which lmms-eval does not ask for
    assert figures == expected
