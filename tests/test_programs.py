"""Benchmarks and examples run, at sizes that take seconds. Their measurements are not asserted."""

import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import (
    attention_backends,
    attention_matching,
    convert_memory,
    cross_attention,
    generation,
    id_former,
    inner_adaptor,
    loss_curves,
    measure,
    resampler_designs,
)
from idavlm.data import RecordDataset
from idavlm.datasets.characters import build_characters
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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_cross_attention_benchmark(monkeypatch, capsys):
    """Every backend is measured in every case, or the reason is printed."""
    sizes = ["--samples", "2", "--queries", "4", "--patches", "9", "--num-heads", "2", "--head-dim", "16"]
    out = run(monkeypatch, capsys, cross_attention.main, *sizes, "--rounds", "1")
    rows = [line.split("|")[2].strip() for line in out.splitlines() if line.startswith("|")]
    for name in attention_backends.BACKENDS:
        missing = out.count(f": {name} does not run here: ")
        assert rows.count(name) == 2 * (len(cross_attention.CASES) - missing), name
    assert {"sdpa", "released", "one call per segment"} <= set(rows)
    assert "triton does not run here: the kernels need a GPU" in out


def test_loss_curves(monkeypatch, capsys, tmp_path):
    """Two runs with one backend are equal, and a run with the reference is close to them."""
    tiny = {"num_train": 6, "num_test": 5, "num_train_scenes": 6, "num_test_scenes": 4, "num_general": 2}
    monkeypatch.setattr(loss_curves, "build_characters", partial(build_characters, **tiny, num_test_records=2))
    sizes = ["--steps", "3", "--batch-size", "2", "--records", "20", "--out", str(tmp_path)]
    out = run(monkeypatch, capsys, loss_curves.main, *sizes, "--implementations", "sdpa", "sdpa", "eager")
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 + 1
    same, reference = map(float, rows[-1][2:])
    assert same == 0
    assert 0 <= reference < 1e-3


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


def test_find_identities_writes_its_picture(monkeypatch, capsys, tmp_path):
    arguments = ["program", "--steps", "3", "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "examples" / "find_identities.py"), run_name="__main__")
    assert "right photos" in capsys.readouterr().out
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.size == (1080, 864)


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


def test_attention_matching_benchmark(monkeypatch, capsys, tmp_path):
    """The accuracy is printed for both methods, of all matching records."""
    records = build_characters(tmp_path / "data", **generation.CHARACTERS) / "test.jsonl"
    samples = list(RecordDataset(records))
    for part in generation.untrained(samples):
        part.save_pretrained(tmp_path / "model")
    out = run(monkeypatch, capsys, attention_matching.main, str(tmp_path / "model"), str(records))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == ["eight strongest patches", "all patches"]
    assert {row[2] for row in rows} == {str(sum(sample.task == "matching" for sample in samples))}


def test_inner_adaptor_benchmark(monkeypatch, capsys):
    """The program itself checks that the text workflow equals the base."""
    sizes = ["--hidden-size", "64", "--layers", "2", "--batch", "1", "--length", "8", "--steps", "2"]
    out = run(monkeypatch, capsys, inner_adaptor.main, *sizes, "--rounds", "1")
    assert out.count("+0.0%") >= 3, "memory of the text workflow (twice), and the base against itself"


def test_inner_adaptors_are_trained_by_stages(monkeypatch, capsys, tmp_path):
    arguments = ["program", "--tiny", "--steps", "1", "1", "1", "1", "--batch-size", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "examples" / "train_inner_adaptors.py"), run_name="__main__")
    settings = dict(re.findall(r"\| `perplexity of (\w+)` \| \[(.*)\] \|", capsys.readouterr().out))
    assert settings["base"] == settings["adaptors"] == settings["projector"], "to the last bit"
    assert settings["base"] != settings["LoRA"]


def test_convert_memory_benchmark(monkeypatch, capsys, tmp_path):
    """The program itself checks tensors of the converted checkpoint."""
    sizes = {"hidden": 128, "inner": 64, "vocab": 1300, "width": 16, "mlp": 32, "heads": 2, "queries": 16}
    monkeypatch.setattr(convert_memory, "SIZES", sizes)
    monkeypatch.setattr(convert_memory, "RANKS", 1000)
    sizes = ["--layers", "2", "--vision-layers", "1", "--shard-gb", "0.0006", "--folder", str(tmp_path)]
    out = run(monkeypatch, capsys, convert_memory.main, *sizes, "--format", "safetensors")
    assert "peak resident memory" in out
    assert not list(tmp_path.iterdir())
