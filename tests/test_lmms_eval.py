"""The plug-in of lmms-eval, run by its own runner; skipped if lmms-eval is not installed."""

import json
import runpy
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image

from idavlm.evaluation.lmms_eval.messages import sample_of
from tests.fake_mmid import build_mmid
from tests.small_models import small_model, small_processor

REASON = "lmms-eval is not installed: it brings torchvision and some seventy packages, too many for [dev]"


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


def test_the_task_in_its_own_runner(tmp_path, monkeypatch):
    evaluator = pytest.importorskip("lmms_eval.evaluator", reason=REASON)
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager

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
    gold = {str(item["id"]): item["answer"] for item in json.loads(benchmark.read_text())}

    def run() -> dict:
        found = evaluator.simple_evaluate(
            model="idavlm",
            model_args=f"pretrained={tmp_path / 'model'}",
            tasks=["idavlm_mmid"],
            task_manager=TaskManager(include_path=str(Path(mmid_task.__file__).parent), include_defaults=False),
            batch_size=4,
            device="cpu",
            gen_kwargs="max_new_tokens=3",
            bootstrap_iters=10,
        )["results"]["idavlm_mmid"]
        return {name.split(",")[0]: value for name, value in found.items() if name.endswith(",none")}

    untrained = run()
    assert untrained["location_acc_at_0.5"] == 0
    # Right answers in place of the model's: every metric is 1.
    monkeypatch.setattr(
        model,
        "_answer",
        lambda self, chunk: [gold[self.task_dict[request[4]][request[5]][request[3]]["id"]] for request in chunk],
    )
    full = run()
    metrics = {name: value for name, value in full.items() if "stderr" not in name}
    assert set(metrics) == {
        "matching_accuracy", "location_mean_iou", "location_acc_at_0.5", "qa_closest_accuracy",
        "caption_name_precision", "caption_name_recall", "caption_name_f1",
    }  # fmt: skip
    assert set(metrics.values()) == {1.0}
