"""Benchmarks and examples run, at sizes that take seconds. Their measurements are not asserted."""

import argparse
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from benchmarks import (
    attention_backends,
    attention_matching,
    convert_memory,
    cross_attention,
    generation,
    gpu,
    gpu_stages,
    id_former,
    identity_bank,
    inner_adaptor,
    measure,
    qlora,
    resampler_designs,
    throughput,
)
from idavlm import IdentityProcessor, load_id_former
from idavlm.data import RecordDataset
from idavlm.datasets.characters import build_characters
from idavlm.experimental.shared_towers import train_shared_tower
from tests import small_models

ROOT = Path(__file__).parent.parent


def run(monkeypatch, capsys, main, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    main()
    return capsys.readouterr().out


def test_id_former_benchmark(monkeypatch, capsys):
    """The program itself checks that both modules compute the same."""
    tiny = {"hidden_size": 32, "num_heads": 2, "num_queries": 4, "vision_hidden_size": 24}
    monkeypatch.setattr(id_former, "SMALL", tiny)
    monkeypatch.setattr(id_former, "RELEASED", tiny)
    out = run(monkeypatch, capsys, id_former.main, "--samples", "2", "--rounds", "1")
    assert out.count("forward + backward") == 3
    assert out.count("frames") == 1


def test_the_products_alone_are_all_products():
    sizes = {"hidden_size": 32, "num_heads": 2, "num_queries": 4, "vision_hidden_size": 24}
    _, module = id_former.build(sizes, torch.device("cpu"), torch.float32)
    function = id_former.forward_backward(module, torch.randn(3, 9, 24), *id_former.batch([(2, 1)]))
    assert id_former.flops(id_former.products_alone(function)) == id_former.flops(function)


@pytest.fixture(autouse=True)
def _small_matmul(monkeypatch):
    monkeypatch.setitem(measure.MATMUL_SIZE, "cpu", 64)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_cross_attention_benchmark(monkeypatch, capsys):
    """Every backend is measured in every case, or the reason is printed."""
    sizes = ["--samples", "2", "--queries", "4", "--patches", "9", "--num-heads", "2", "--head-dim", "16"]
    out = run(monkeypatch, capsys, cross_attention.main, *sizes, "--rounds", "1")
    rows = [line.split("|")[2].strip() for line in out.splitlines() if line.startswith("|")]
    for name in attention_backends.BACKENDS:
        missing = out.count(f": {name} does not run here: ")
        assert rows.count(name) == 3 * (len(cross_attention.CASES) - missing), name
    assert {"sdpa", "released", "one call per segment"} <= set(rows)


def test_gpu_benchmark_as_a_dry_run(tmp_path):
    """Every stage runs on the CPU and reports; on a machine without a GPU a real run says so."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([*command, "--dry-run"], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in gpu.STAGES:
        content = json.loads((tmp_path / f"{stage}.json").read_text())
        assert content["status"] == "done", content
        assert content["parts"], stage
        assert f"## {stage}: done" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "tiles.json").read_text())


def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(monkeypatch, tmp_path):
    """What it has found until then is kept."""

    def hangs(report):
        report.note("found before")
        time.sleep(60)

    def crashes(report):
        report.note("found before")
        os.kill(os.getpid(), signal.SIGKILL)

    def raises(report):
        report.note("found before")
        raise RuntimeError("wrong")

    args = argparse.Namespace(out=tmp_path, dry_run=False)
    for stage, error in ((hangs, "did not end in time"), (crashes, "exit code -9"), (raises, "RuntimeError: wrong")):
        monkeypatch.setattr(gpu_stages, stage.__name__, stage, raising=False)
        content = gpu.run_stage(stage.__name__, 1.0, args)
        assert content["status"] == "failed"
        assert error in content["failures"][0]
        assert "found before" in gpu.as_markdown(content)


@pytest.mark.parametrize(("code", "failures"), [(0, 0), (9, 1)])
def test_memory_accesses_are_checked_by_the_tool(monkeypatch, tmp_path, code, failures):
    """On a GPU the tests run under compute-sanitizer, in place of which a script prints its arguments here."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@"\necho "ERROR SUMMARY: {failures} errors"\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: str(tool))
    report = gpu.Report("memory_accesses", tmp_path, 60, dry_run=False)
    gpu_stages.memory_accesses(report)
    assert report.content["parts"] == [{"note": f"ERROR SUMMARY: {failures} errors"}]
    assert len(report.content["failures"]) == failures
    assert all("exit code 9" in text and "-m pytest" in text for text in report.content["failures"])


def test_throughput_benchmark(monkeypatch, capsys):
    """Both loops of every model are measured. TRL's rows are left out where it is not installed."""
    sizes = ["--hidden-size", "32", "--layers", "1", "--batch-size", "2", "--steps", "1", "--rounds", "1"]
    sizes += ["--records", "8", "--max-new-tokens", "1"]
    out = run(monkeypatch, capsys, throughput.main, *sizes)
    names = (throughput.BASE, throughput.ATTACHED, throughput.ATTACHED_WITH, throughput.MLP)
    for name in (*names, throughput.WITHOUT, throughput.WITH):
        assert out.count(f"| {name} |") >= 2, name
    assert out.count("IDTrainer") == 3


def test_resampler_designs_benchmark(monkeypatch, capsys):
    sizes = ["--hidden-size", "32", "--num-heads", "2", "--num-queries", "4", "--num-patches", "9", "--images", "9"]
    out = run(monkeypatch, capsys, resampler_designs.main, *sizes, "--rounds", "1")
    for design in resampler_designs.DESIGNS:
        assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")].count(design) == 2


def test_peak_memory_counts_tensors_that_exist_at_the_same_time():
    megabyte = 2**18

    def two_then_one():
        x = torch.ones(megabyte) + torch.ones(megabyte)
        x.add_(1)
        del x
        return torch.ones(megabyte).view(2, -1)

    assert measure.peak_megabytes(two_then_one, torch.device("cpu")) == pytest.approx(3, abs=0.01)


def run_example(monkeypatch, capsys, name: str, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def test_find_identities_draws_its_examples(monkeypatch, capsys, tmp_path):
    out = run_example(monkeypatch, capsys, "find_identities.py", "--steps", 3, "--seeds", 1, "--out", tmp_path)
    assert "right references" in out
    with Image.open(tmp_path / "found.png") as image:
        assert image.size == (1080, 864)


def test_a_model_is_trained_and_asked_and_fine_tuned(monkeypatch, capsys, tmp_path):
    """make demo on a folder of records, then the two examples that continue from its checkpoint."""
    records = {"num_train_records": 60, "num_test_records": 4, "num_general_records": 8}
    sizes = {"num_train": 8, "num_test": 10, "num_train_scenes": 12, "num_test_scenes": 8, "num_general": 4}
    data = build_characters(tmp_path / "people", **sizes, **records)
    arguments = ["--data", data, "--tower_steps", 2, "--steps", 2, 4, "--out", tmp_path / "demo"]
    out = run_example(monkeypatch, capsys, "train_idformer.py", *arguments)
    assert "| with ID-Former | no references | wrong references | without ID-Former |" in out
    report = (tmp_path / "demo" / "people" / "report.md").read_text()
    assert "held-out identities of people" in report.splitlines()[0]
    assert "1 seed" in report.splitlines()[0]
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert "without ID-Former/matching/accuracy" in metrics["metrics"]
    assert metrics["records"]["with ID-Former"] == str(data / "test.jsonl")
    folder = tmp_path / "demo" / "people" / "seed-0"
    stages = [folder / stage for stage in ("identity-pretraining", "with-id-former", "without-id-former")]
    times = [(stage / "model.safetensors").stat().st_mtime_ns for stage in stages]
    again = ["--resume", "--variants", "with-id-former", "--references", "right", "--export", tmp_path / "exported"]
    run_example(monkeypatch, capsys, "train_idformer.py", *arguments, *again)
    assert [(stage / "model.safetensors").stat().st_mtime_ns for stage in stages] == times, "nothing is trained again"

    model = folder / "with-id-former"
    monkeypatch.chdir(tmp_path)
    out = run_example(monkeypatch, capsys, "quickstart.py", "--out", tmp_path / "default.png")
    assert re.match(r"Where is \w+\?\n\d+ \d+ \d+ \d+\n", out), out
    monkeypatch.chdir(data / "images" / "test")
    arguments = ["--identity", "Kate", "photos/0000-0.jpg", "--identity", "Tom", "photos/0001-0.jpg"]
    arguments += ["--scene", "scenes/0000.jpg", "--model", tmp_path / "exported", "--out", tmp_path / "own.png"]
    assert run_example(monkeypatch, capsys, "quickstart.py", *arguments).startswith("Where is Kate?\n")
    for name in ("default.png", "own.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (512, 512)

    settings = {"checkpoint": model, "data": data, "output_dir": tmp_path / "tuned", "max_steps": 1}
    settings |= {"per_device_train_batch_size": 2, "report_to": "none", "freeze": "[language_model]"}
    settings |= {"max_test_records": 2, "max_new_tokens": 4, "module_learning_rates": "{vision_tower: 1.0e-5}"}
    (tmp_path / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    out = run_example(monkeypatch, capsys, "finetune.py", tmp_path / "config.yaml")
    assert "| task | metric | records | tuned | chance |" in out
    assert (tmp_path / "tuned" / "processor_config.json").exists()
    assert json.loads((tmp_path / "tuned" / "scores.json").read_text())["predictions"]


def test_runs_share_towers_and_stop_after_identity_pretraining(monkeypatch, capsys, tmp_path):
    """A tower is trained once for the same data and options, and the scores do not depend on who trained it."""
    records = {"num_train_records": 40, "num_test_records": 4, "num_general_records": 4}
    sizes = {"num_train": 6, "num_test": 8, "num_train_scenes": 8, "num_test_scenes": 6, "num_general": 2}
    data = build_characters(tmp_path / "people", **sizes, **records)
    shared = ["--data", data, "--tower_root", tmp_path / "towers", "--stop_after", "identity_pretraining"]

    def metrics(name, *options):
        run_example(monkeypatch, capsys, "train_idformer.py", *shared, *options, "--out", tmp_path / name)
        return json.loads((tmp_path / name / "metrics.json").read_text())

    first = metrics("first", "--tower_steps", 2, "--steps", 2, 1)
    assert metrics("again", "--tower_steps", 2, "--steps", 2, 1)["metrics"] == first["metrics"]
    (trained,) = tmp_path.glob("towers/tower-*")
    assert {"identity map/matching/accuracy", "identity map, wrong references/location/right_box"} <= set(
        first["metrics"]
    )
    assert "Identity map of a small ID-Former" in (tmp_path / "first" / "people" / "report.md").read_text()
    assert not (tmp_path / "first" / "people" / "seed-0" / "with-id-former").exists()

    tiny = metrics("tiny", "--tower", "idavlm-tiny", "--steps", 1, 1, "--references", "right")
    assert {name.split("/")[0] for name in tiny["metrics"]} == {"identity map"}

    others = build_characters(tmp_path / "others", **sizes, **records, seed=1)
    arguments = ["--data", data, "--test_data", others, data, "--tower", "idavlm-tiny", "--steps", 1, 2]
    arguments += ["--variants", "with-id-former", "--references", "right", "--out", tmp_path / "two"]
    arguments += ["--test_tasks", "matching", "qa_multi"]
    run_example(monkeypatch, capsys, "train_idformer.py", *arguments)
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    tested = {f"{name}: {kind}": name for name in ("others", "people") for kind in ("right references", "identity map")}
    assert {name.split("/")[0] for name in two["metrics"]} == set(tested)
    assert two["records"] == {column: str(tmp_path / name / "test.jsonl") for column, name in tested.items()}
    tasks = {name.split("/")[1] for name in two["metrics"] if "right references" in name}
    assert tasks == {"matching", "qa_multi"}
    assert two["metrics"]["people: identity map/matching/accuracy"] == tiny["metrics"]["identity map/matching/accuracy"]

    example = runpy.run_path(str(ROOT / "examples" / "train_idformer.py"), run_name="example")
    options = {"seed": 0, "steps": 2, "device": "cpu", "bf16": example["has_fast_bfloat16"]()}
    options |= {"image_size": example["IMAGE_SIZE"], "hidden_size": example["HIDDEN_SIZE"]}
    assert train_shared_tower(tmp_path / "towers", data, **options) == trained
    assert train_shared_tower(tmp_path / "towers", data, **options | {"steps": 1}) != trained
    assert train_shared_tower(tmp_path / "towers", data, **options | {"augment": True}) != trained
    with (data / "train.jsonl").open("a") as file:  # other data, in the same folder
        file.write((data / "train.jsonl").read_text().splitlines()[0] + "\n")
    assert train_shared_tower(tmp_path / "towers", data, **options) != trained
    assert len(list(tmp_path.glob("towers/tower-*"))) == 5
    for wrong, message in (
        (["--export", "x"], "export='x'"),
        (["--tower", "x", "--tower_steps", 2], "tower_steps=2"),
        (["--test_data", "a/x", "b/x"], "test_data="),
        (["--steps", 5], r"steps=\[5\] must be two numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics("wrong", *wrong)
    with pytest.raises(ValueError, match="at least 2 steps"):
        run_example(monkeypatch, capsys, "train_idformer.py", "--steps", 5, 1)


def test_an_id_former_is_attached_to_frozen_models(monkeypatch, capsys, tmp_path):
    """The example reports that general answers stay bit-identical, and its records have the text of the processor."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    out = run_example(monkeypatch, capsys, "attach_idformer.py", "--smoke", "--out", tmp_path / "llava")
    check_attached_run(tmp_path / "llava", "llava", out)
    shutil.copytree(tmp_path / "llava" / "data", tmp_path / "qwen" / "data")
    options = ["--smoke", "--family", "qwen2_5_vl", "--teacher", tmp_path / "llava", "--out", tmp_path / "qwen"]
    out = run_example(monkeypatch, capsys, "attach_idformer.py", *options)
    check_attached_run(tmp_path / "qwen", "qwen2_5_vl", out)
    sizes = {Image.open(path).size for path in (tmp_path / "qwen" / "example").iterdir()}
    assert len(sizes) > 1, "the answer from files is about images of several sizes"
    with pytest.raises(ValueError, match="teacher=None: qwen2_5_vl needs"):
        run_example(monkeypatch, capsys, "attach_idformer.py", "--family", "qwen2_5_vl")


def check_attached_run(folder: Path, family: str, out: str) -> None:
    report = (folder / "report.md").read_text()
    assert report in out
    assert "general logits bit-identical with the ID-Former attached and trained: [True]" in report
    names = [line.split(" | ")[0] for line in report.splitlines() if line.startswith("| ")]
    assert names[2:] == ["| general model", "| ID-Former, model frozen", "| ID-Former and LoRA", "| LoRA alone"]

    example = importlib.import_module("attach_idformer")
    samples = RecordDataset(folder / "data" / "characters" / "train.jsonl")
    train, validation = example.split_characters([sample for sample in samples if example.is_asked(sample)], every=4)
    photos = {path for sample in train for path in sample.images if "photos" in path}
    assert photos
    assert all(int(Path(path).stem.split("-")[0]) % 4 for path in photos), "of training characters alone"
    trained_scenes = {path for sample in train for path in sample.message_images if "scenes" in path}
    assert validation
    assert not trained_scenes & {path for sample in validation for path in sample.message_images}

    family = example.FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenize = example.cached_tokenize(tokenizer)
    wrapped = type(family.wrapped_processor(tokenizer)).from_pretrained(folder / "model")
    processor = IdentityProcessor(wrapped, box_format="bins32")
    model = load_id_former(family.model_class.from_pretrained(folder / "model"), folder / "id-former")
    num_grids = []
    for sample in RecordDataset(folder / "data" / "characters" / "test.jsonl"):
        if example.is_asked(sample):
            shown = {path: (row, family.grid(row)) for row, path in enumerate(sample.images)}
            grids = [grid for _, grid in shown.values()]
            num_grids.append(len(set(grids)))
            images = [Image.open(sample.image_root / path) for path in sample.images]
            record = example.identity_record(sample, shown, tokenize)
            sized = folder / "sized"
            for path, image, grid in zip(sample.images, images, grids, strict=True):
                (sized / path).parent.mkdir(parents=True, exist_ok=True)
                example.resized(image, grid).save(sized / path, format="png")
            encoded = processor.encode(replace(sample, image_root=sized), add_generation_prompt=True)
            assert record.ids == encoded["input_ids"].tolist()
            batch = processor.collate([encoded])
            with torch.no_grad():
                drawn = np.stack([np.asarray(image.convert("RGB")) for image in images])
                features = example.Features.compute(family, model, drawn, grids)
                logits = model(**batch).logits
                tower = family.replace_tower(model, example.StoredTower())
                stored = example.collate([record], features, prompts=True)
                torch.testing.assert_close(model(**stored).logits, logits)
                family.replace_tower(model, tower)
    assert (max(num_grids) > 1) == (len(family.grids) > 1), "images of several sizes in one batch"


def test_general_questions_have_one_answer(monkeypatch, tmp_path):
    """Each box that answers "Where is the red person?" is that of the only painted figure of this colour."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    example = importlib.import_module("general_vlm")
    _, scenes = example.draw_general_images(tmp_path, num_scenes=12, num_figure_scenes=48, num_plans=4)
    tokenizer = example.word_tokenizer()
    tasks = example.GeneralTasks(scenes, example.cached_tokenize(tokenizer), Random(0))
    question = re.compile(r"Where is the (\w+) person \? \w+ (\d+) (\d+) (\d+) (\d+)")
    colours = set()
    for _ in range(100):
        record = tasks.where_word()
        text = tokenizer.decode([token for token in record.ids if token not in tokenizer.all_special_ids])
        for colour, *box in question.findall(text):
            colours.add(colour)
            (found,) = [item for item in scenes[record.photos[0].row].items if item.colour == colour]
            assert example.BOXES.write("", found.box, (128, 128)) == " ".join(box)
    assert len(colours) > 5


def test_a_model_is_fine_tuned_from_parts(monkeypatch, capsys, tmp_path):
    data = small_models.draw_images(tmp_path / "images", small_models.IMAGES).parent
    records = [small_models.record(number) for number in range(4)]
    (data / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--data", data, "--output_dir", tmp_path / "model", "--max_steps", 1, "--save_strategy", "no"]
    arguments += ["--per_device_train_batch_size", 2, "--report_to", "none"]
    arguments += ["--model_options", '{"num_queries": 4, "num_heads": 2, "gate": "none", "null_token": true}']
    run_example(monkeypatch, capsys, "finetune.py", *arguments)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["connector_config"]["gate"] == "none"
    assert json.loads((tmp_path / "model" / "processor_config.json").read_text())["image_seq_length"] == 4


def test_wrong_references_are_checked_before_the_training(monkeypatch, capsys, tmp_path):
    small_models.draw_images(tmp_path / "images", small_models.IMAGES)
    (tmp_path / "test.jsonl").write_text(json.dumps(small_models.record(answer=False)) + "\n")
    with pytest.raises(ValueError, match="wrong references"):
        run_example(monkeypatch, capsys, "train_idformer.py", "--data", tmp_path, "--out", tmp_path / "demo")


def test_generation_benchmark(monkeypatch, capsys, tmp_path):
    """The answers do not depend on the batch size."""
    processor = small_models.small_processor()
    small_models.small_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    small_models.draw_images(tmp_path / "images", small_models.IMAGES)
    records = [small_models.record(number, answer=False) for number in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sizes = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "test.jsonl")]
    sizes += ["--records", "2", "--batch-sizes", "1", "2", "--max-new-tokens", "2", "--rounds", "1"]
    out = run(monkeypatch, capsys, generation.main, *sizes)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows].count("all") == 2
    assert {row[4] for row in rows} == {"1.00", ""}


def test_identity_bank_benchmark(monkeypatch, capsys, tmp_path):
    """Both parts run, and the answers with a bank are those with the photos in the prompt."""
    sizes = ["--cast", "8", "--scenes", "4", "--data", str(tmp_path)]
    out = run(monkeypatch, capsys, identity_bank.main, *sizes)
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert any(row.startswith("| photos in every prompt | 36 |") for row in rows), "four times eight photos and a scene"
    assert any(row.startswith("| bank | 12 |") for row in rows)
    assert "4 of 4 answers are equal" in out


def test_attention_matching_benchmark(monkeypatch, capsys, tmp_path):
    """The scores of the map are printed, of all records of matching and location."""
    records = build_characters(tmp_path / "data", **generation.CHARACTERS) / "test.jsonl"
    samples = list(RecordDataset(records))
    for part in generation.untrained(samples):
        part.save_pretrained(tmp_path / "model")
    out = run(monkeypatch, capsys, attention_matching.main, str(tmp_path / "model"), str(records))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")][2:]
    assert [row[1] for row in rows] == ["accuracy", "refused", "mean_iou", "acc@0.5", "right_box", "refused"]
    for task in ("matching", "location"):
        assert [row[2] for row in rows if row[0] == task] == [str(sum(sample.task == task for sample in samples))]


def test_inner_adaptor_benchmark(monkeypatch, capsys):
    """The program itself checks that the text workflow equals the base."""
    sizes = ["--hidden-size", "64", "--layers", "2", "--batch", "1", "--length", "8", "--steps", "2"]
    out = run(monkeypatch, capsys, inner_adaptor.main, *sizes, "--rounds", "1")
    assert out.count("+0.0%") >= 3, "memory of the text workflow (twice), and the base against itself"


def test_inner_adaptors_are_trained_by_stages(monkeypatch, capsys, tmp_path):
    arguments = ["--tiny", "--steps", 2, 2, 2, 2, "--batch_size", 2, "--out", tmp_path]
    out = run_example(monkeypatch, capsys, "train_inner_adaptors.py", *arguments)
    settings = dict(re.findall(r"\| `perplexity of (\w+)` \| \[(.*)\] \|", out))
    assert settings["base"] == settings["adaptors"] == settings["projector"], "to the last bit"
    assert settings["base"] != settings["LoRA"]


def test_personal_knowledge(monkeypatch, capsys, tmp_path):
    arguments = ["--tiny", "--steps", 2, 2, "--variants", "LoRA + general", "--out", tmp_path]
    out = run_example(monkeypatch, capsys, "personal_knowledge.py", *arguments)
    assert "| public facts |" in out
    assert Image.open(tmp_path / "personal_knowledge.png").width > 100


def test_qlora_benchmark(monkeypatch, capsys):
    """Adapters and 4-bit weights save memory of the optimizer and of the weights."""
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    out = run(monkeypatch, capsys, qlora.main, "--tiny", "--batch-size", "2", "--rounds", "1")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == ["full", "LoRA", "DoRA", "QLoRA (nf4)"]


def test_convert_memory_benchmark(monkeypatch, capsys, tmp_path):
    """The program itself checks tensors of the converted checkpoint."""
    sizes = {"hidden": 128, "inner": 64, "vocab": 1300, "width": 16, "mlp": 32, "heads": 2, "queries": 16}
    monkeypatch.setattr(convert_memory, "SIZES", sizes)
    monkeypatch.setattr(convert_memory, "RANKS", 1000)
    sizes = ["--layers", "2", "--vision-layers", "1", "--shard-gb", "0.0006", "--folder", str(tmp_path)]
    out = run(monkeypatch, capsys, convert_memory.main, *sizes, "--format", "safetensors")
    assert "peak resident memory" in out
    assert not list(tmp_path.iterdir())
