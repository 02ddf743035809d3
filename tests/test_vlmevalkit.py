"""The plug-in of VLMEvalKit, run by its own command, or by a small one with the same interface."""

import importlib
import inspect
import json
import re
import runpy
import sys

import pandas
import pytest

from idavlm.evaluation.task_run import load_scores
from tests.fake_mmid import build_mmid
from tests.fake_packages import is_real, use
from tests.test_lmms_eval import answer_mmid
from tests.test_more_benchmarks import human_ref
from tests.vlm_families import save_tiny_vlm

PLUGIN = "idavlm.evaluation.vlmevalkit"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Module of the data sets."""
    monkeypatch.setenv("LMUData", str(tmp_path / "LMUData"))
    with use("vlmeval", PLUGIN):
        yield importlib.import_module(f"{PLUGIN}.benchmark")


def run_command(monkeypatch, work_dir, *, data: str, file_format: str = "json") -> None:
    """``python -m idavlm.evaluation.vlmevalkit --data DATA --model idavlm``."""
    monkeypatch.setenv("PRED_FORMAT", file_format)
    monkeypatch.setattr(sys, "argv", ["run", "--data", data, "--model", "idavlm", "--work-dir", str(work_dir)])
    monkeypatch.delitem(sys.modules, "vlmeval.run", raising=False)
    runpy.run_module(PLUGIN, run_name="__main__")


@pytest.mark.parametrize(
    ("family", "is_attached", "file_format"), [("qwen2_5_vl", True, "json"), ("llava", False, "tsv")]
)
def test_the_figures_are_those_of_idavlm_eval(tmp_path, monkeypatch, plugin, family, is_attached, file_format):
    """Of a model with an attached ID-Former, and of one without, to which references are images of the prompt."""
    benchmark, id_former = answer_mmid(tmp_path, monkeypatch, family, is_attached=is_attached)
    variables = {"MMID_DATA": benchmark, "MMID_BOXES": "pixels", "IDAVLM_MODEL": tmp_path / family}
    variables |= {"IDAVLM_DEVICE": "cpu", "IDAVLM_MAX_NEW_TOKENS": 3}
    for name, value in (variables | ({"IDAVLM_ID_FORMER": id_former} if id_former else {})).items():
        monkeypatch.setenv(name, str(value))
    run_command(monkeypatch, tmp_path / "work", data="idavlm_mmid", file_format=file_format)
    [scores] = (tmp_path / "work").rglob("scores.json")
    assert "Means with 95 % bootstrap intervals" in (scores.parent / "report.md").read_text()
    found, expected = load_scores(scores)[0].predictions, load_scores(tmp_path / "out")[0].predictions
    assert {one.id: one.text for one in found} == {one.id: one.text for one in expected}
    assert len({one.text for one in found}) > 3
    for one, other in zip(found, expected, strict=True):
        other.scores.pop("accuracy" if other.task.startswith("qa") else "", None)  # by likelihood
        assert (one.id, one.scores) == (other.id, other.scores)


def test_questions_are_those_of_the_task(tmp_path, monkeypatch, plugin):
    monkeypatch.setenv("MMID_DATA", str(build_mmid(tmp_path, rounds=1)))
    with pytest.raises(ValueError, match="MMID_BOXES is not set; export MMID_BOXES: the box format of the model"):
        plugin.IdentityBenchmark("idavlm_mmid")
    monkeypatch.setenv("MMID_BOXES", "pixels")
    dataset = plugin.IdentityBenchmark("idavlm_mmid")
    assert len(dataset) == len(dataset.data) == len(dataset.items) == 19
    for number, item in enumerate(dataset.items):
        message = dataset.build_prompt(dataset.data.iloc[number])
        assert message == dataset.build_prompt(number)
        assert sum(part["type"] == "image" for part in message) == len(item.sample.images)
    text = "".join("<image>" if part["type"] == "image" else part["value"] for part in dataset.build_prompt(0))
    assert re.fullmatch(r"Ada Lund is <image>\nBo Reyes is <image>\n\s*In the image: <image>\n Identify .*", text)
    monkeypatch.delenv("MMID_DATA")
    with pytest.raises(ValueError, match="MMID_DATA is not set"):
        plugin.IdentityBenchmark("idavlm_mmid")


@pytest.mark.parametrize("suffix", ["json", "tsv", "xlsx"])
def test_answers_are_read_as_they_were_written(tmp_path, monkeypatch, plugin, suffix):
    """pandas takes "None" for a missing value, "3" for a number and "1 Jan" for a date."""
    texts = ["None", "null", "3", "03", "NaN", "", "2020-01-01", "True", 'a "quote"', "two\nlines", "tab\there"]
    table = pandas.DataFrame({"index": range(len(texts)), "answer": "", "prediction": texts})
    file = tmp_path / f"answers.{suffix}"
    if suffix == "xlsx":
        pytest.importorskip("openpyxl", reason="openpyxl, of VLMEvalKit, is not installed")
        table.to_excel(file, index=False)
    elif suffix == "tsv":
        table.to_csv(file, sep="\t", index=False, quoting=1)
    else:
        file.write_text(json.dumps(table.to_dict("records")))
    assert list(plugin._predictions(file).values()) == texts


def test_answers_are_scored_by_the_task(tmp_path, monkeypatch, plugin):
    data = human_ref(tmp_path / "HumanRef")
    monkeypatch.setenv("HUMAN_REF_DATA", str(data))
    monkeypatch.setenv("HUMAN_REF_BOXES", "pixels")
    dataset = plugin.IdentityBenchmark("idavlm_human_ref")
    texts = [str(item.extra["boxes"]) if item.extra["boxes"] else "None" for item in dataset.items]
    file = tmp_path / "idavlm_idavlm_human_ref.json"
    file.write_text(json.dumps([{"index": number, "prediction": text} for number, text in enumerate(texts)]))
    found = dataset.evaluate(str(file), nproc=4, verbose=False)
    assert found["human_ref_density_f1"] == found["rejection_rejection"] == 1
    assert found["human_ref_unparsed"] == found["rejection_refused"] == 0
    assert (tmp_path / "idavlm_idavlm_human_ref" / "report.md").is_file()
    with pytest.raises(ValueError, match="--judge gpt: answers are scored without a judge here"):
        dataset.evaluate(str(file), model="gpt")
    file.write_text(json.dumps([{"index": 0, "prediction": ""}]))
    with pytest.raises(ValueError, match=r"human_ref.json has no prediction for 2 questions, the first is 1"):
        dataset.evaluate(str(file))
    file.write_text(json.dumps([{"index": 0}]))
    with pytest.raises(ValueError, match="has no column 'prediction'"):
        dataset.evaluate(str(file))
    with pytest.raises(ValueError, match=r"answers\.pkl is not \.xlsx, \.tsv or \.json; export PRED_FORMAT=json"):
        dataset.evaluate("answers.pkl")


def test_a_model_needs_a_checkpoint_and_takes_no_videos(tmp_path, monkeypatch, plugin):
    model_class = importlib.import_module(f"{PLUGIN}.model").IDAVLM
    monkeypatch.delenv("IDAVLM_MODEL", raising=False)
    with pytest.raises(ValueError, match="IDAVLM_MODEL is not set"):
        model_class()
    save_tiny_vlm(tmp_path, "llava")
    model = model_class(str(tmp_path / "llava"), device="cpu", max_new_tokens=2)
    said = [{"type": "text", "value": "Be brief.", "role": "system"}, {"type": "text", "value": "Who is Kate?"}]
    assert isinstance(model.generate_inner(said), str)
    with pytest.raises(ValueError, match="content of type 'video' is not supported"):
        model.generate_inner([{"type": "video", "value": "film.mp4"}])


@pytest.mark.skipif(not is_real("vlmeval"), reason="VLMEvalKit is not installed")
def test_the_small_package_has_the_interface_of_the_real_one(plugin):
    """The arguments that it takes are those of VLMEvalKit, in the same order."""
    import importlib.util
    from pathlib import Path

    folder = Path(__file__).parent / "fake_packages" / "vlmeval"
    for module, name in (("vlm/base.py", "BaseModel"), ("dataset/image_base.py", "ImageBaseDataset")):
        spec = importlib.util.spec_from_file_location("small", folder / module)
        small = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(small)
        real = getattr(importlib.import_module(f"vlmeval.{module.removesuffix('.py').replace('/', '.')}"), name)
        for method, function in inspect.getmembers(getattr(small, name), inspect.isfunction):
            assert list(inspect.signature(function).parameters) == list(
                inspect.signature(getattr(real, method)).parameters
            ), method
