"""The report, its plots and the contact sheet: files can be opened, numbers are those of the results."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from idavlm.evaluation import (
    EvaluationResult,
    Example,
    draw_contact_sheet,
    evaluate,
    make_example,
    pick_examples,
    plot_bars,
    plot_curves,
    score_table,
    write_report,
)
from idavlm.evaluation.report import format_seconds
from idavlm.utils import ImageRole
from tests.evaluation_fakes import FakeModel, FakeProcessor, box_at, draw_images, samples

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def results():
    full = evaluate(FakeModel(), FakeProcessor(), samples())
    halves = [EvaluationResult(full.predictions[start::2]) for start in (0, 1)]
    guessed = evaluate(FakeModel(), FakeProcessor(), samples(), references="none")
    return {"ID-Former": [full, *halves], "no references": [guessed], "mute": [mute()]}


def mute() -> EvaluationResult:
    return evaluate(FakeModel(mute=True), FakeProcessor(), samples())


def history(steps: int = 60) -> list[dict]:
    entries = [{"step": step, "loss_identity": 2 / step, "learning_rate": 1e-3 / step} for step in range(1, steps)]
    for entry in entries[::5]:
        entry["loss_general"] = 3 / entry["step"]
    return [*entries, {"step": steps, "train_runtime": 1.0}, {"loss_identity": 1.0}]


def size(path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def image(width: int = 128, height: int = 128) -> Image.Image:
    return Image.new("RGB", (width, height), "teal")


def test_table_of_means_and_spread(results):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in score_table(results).splitlines()]
    assert rows[0] == ["task", "metric", "records", "ID-Former", "no references", "mute", "chance"]
    assert rows[2] == ["matching", "accuracy", "8", "1.00 (1.00 to 1.00)", "0.25", "0.00", "0.25"]
    assert rows[3] == ["", "refused", "", "0.00 (0.00 to 0.00)", "0.00", "1.00", "-"], "I cannot say"
    assert rows[4] == ["", "unparsed", "", "0.00 (0.00 to 0.00)", "0.00", "1.00", "-"]
    assert [row[0] for row in rows[2:] if row[0]] == ["matching", "location", "qa_single", "caption_single"]
    assert [row[1] for row in rows if row[0] == "location"] == ["mean_iou"]


def test_a_task_that_a_seed_lacks_leaves_a_gap(results):
    """Not a zero."""
    only_matching = EvaluationResult([p for p in results["mute"][0].predictions if p.task == "matching"])
    table = score_table({"all": results["ID-Former"][:1], "some": [only_matching]})
    assert "| location | mean_iou | 8 | 1.00 | - | 0.25 |" in table


def test_report_is_complete(tmp_path, results):
    draw_images(tmp_path / "images", samples())
    examples = [
        make_example(sample, prediction)
        for sample, prediction in zip(
            samples(image_root=tmp_path / "images"), results["mute"][0].predictions, strict=True
        )
    ]
    path = write_report(
        tmp_path / "report",
        results,
        model="Fake",
        data="fakes",
        logs={"ID-Former": [history(), history()], "without": [history()]},
        examples=examples[:4],
        settings={"steps": 60, "note": "a|b"},
        command="python run.py",
        seconds=431,
        machine="a machine",
    )
    report = path.read_text()
    for line in (
        "# Fake on fakes: 32 records, 1 to 3 seeds\n",
        "command: `python run.py`",
        "time: 7 min 11 s",
        "machine: a machine",
        "| `note` | a\\|b |",
    ):
        assert line in report
    assert score_table(results) in report
    assert "Mean of 1 to 3 seeds (lowest to highest)." in report
    for name in ("scores.png", "examples.png", "curves.png"):
        assert f"({name})" in report
        assert min(size(path.parent / name)) > 300


def test_sections_without_content_are_left_out(tmp_path, results):
    path = write_report(tmp_path, {"mute": results["mute"]}, model="Fake", data="fakes", logs={"mute": [[]]})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.md", "results.json", "scores.png"]
    report = path.read_text()
    assert "Training" not in report
    assert "1 seed\n" in report
    assert "torch" in report  # the machine
    with pytest.raises(ValueError, match="is empty"):
        write_report(tmp_path, {"mute": []}, model="Fake", data="fakes")


def test_curves_of_a_trainer_without_sources_and_of_nothing(tmp_path):
    assert plot_curves(tmp_path / "none.png", {"a": [[{"step": 1, "train_runtime": 2.0}]]}) is None
    assert plot_bars(tmp_path / "none.png", {"a": [EvaluationResult([])]}) is None
    plain = plot_curves(tmp_path / "plain.png", {"a": [[{"step": step, "loss": 1.0} for step in (1, 2, 3)]]})
    both = plot_curves(tmp_path / "both.png", {"a": [history()]})
    assert size(both)[0] > size(plain)[0]


def test_examples_show_question_answer_and_boxes(tmp_path):
    given = samples(image_root=tmp_path)
    draw_images(tmp_path, given)
    result = evaluate(FakeModel(), FakeProcessor(), given)
    matching, location = (make_example(given[i], result.predictions[i]) for i in (0, 1))
    assert (matching.question, matching.answer, matching.right) == ("Which picture shows Kate?", "Picture 1", True)
    assert (matching.true_image, matching.predicted_image, len(matching.images)) == (1, 1, 4)
    assert [name for name, _ in matching.references] == ["Kate", "Kate"]
    assert location.true_box == location.predicted_box == box_at(0)
    assert location.answer == "0 20 30 110 (IoU 1.00)"
    assert location.names == ["Kate"]


def test_rows_with_and_without_attention(tmp_path):
    rng = np.random.default_rng(0)
    maps = rng.dirichlet([1, 1, 1], 12).astype(np.float32)
    box = [5.0, 5.0, 60.0, 90.0]
    common = {"question": "Where?", "answer": "x" * 300, "gold": "$5 & 7_2", "right": False, "true_box": box}
    one = Example([("Kate", image()), ("A very long name indeed", image())], [image(200, 90)], **common)
    with_maps = Example(one.references, one.images, attention=[maps], grid_size=(3, 4), predicted_box=box, **common)
    many = Example([], [image(), image(90, 200), image()], predicted_image=7, true_image=2, **common)
    plain = size(draw_contact_sheet(tmp_path / "plain.png", [one]))
    full = size(draw_contact_sheet(tmp_path / "full.png", [one, with_maps, many]))
    assert full[0] > plain[0] + 300
    assert full[1] > 2 * plain[1]
    wrong = Example(one.references, one.images, attention=[maps], grid_size=(4, 4), **common)
    with pytest.raises(ValueError, match=r"attention has shapes \[\(12, 3\)\] and grid_size=\(4, 4\)"):
        wrong.attention_grids()
    twice = Example(one.references, one.images, attention=[maps, maps], grid_size=(3, 4), **common)
    with pytest.raises(ValueError, match="attention has 2 maps for 1 images"):
        twice.attention_grids()


def test_attention_of_the_model_reaches_the_example(tmp_path):
    """Maps are computed for the whole sample, and those of scenes are kept."""

    class Processor(FakeProcessor):
        def collate(self, encoded, *, padding_side):
            roles = [ImageRole.REFERENCE] * 2 + [ImageRole.SCENE] * (len(encoded[0]["image_sizes"]) - 2)
            images = {"image_roles": torch.tensor(roles), "pixel_values": torch.zeros(len(roles), 3, 4, 4)}
            index = torch.zeros(len(roles), dtype=torch.long)
            return (
                super().collate(encoded, padding_side=padding_side)
                | images
                | dict.fromkeys(("sample_index", "identity_index"), index)
            )

    def encode_images(pixel_values, image_roles, sample_index, identity_index, output_identity_maps):
        number = torch.arange(len(image_roles)).float()
        layers = [number[:, None, None].expand(-1, 6, 2) + shift for shift in (0, 1)]
        return None, tuple(layers), (2, 3)

    given = samples(image_root=tmp_path)
    draw_images(tmp_path, given)
    model = FakeModel()
    result = evaluate(model, FakeProcessor(), given)
    bare = pick_examples(model, Processor(), given, result)
    assert [len(row.images) for row in bare] == [1] * 5 + [4] * 3 + [1, 1]
    assert all(row.attention is None for row in bare)
    model.id_former, model.encode_images = SimpleNamespace(), encode_images
    (row,) = pick_examples(model, Processor(), given, result, count={"matching": 1})
    assert row.grid_size == (2, 3)
    assert [map_.mean() for map_ in row.attention] == [2.5, 3.5, 4.5, 5.5]
    assert row.attention_grids()[0].shape == (2, 2, 3)


@pytest.mark.parametrize(("seconds", "text"), [(45.4, "45 s"), (425, "7 min 5 s"), (3720, "1 h 2 min")])
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_without_matplotlib_the_report_is_written_and_the_remedy_is_named(tmp_path, results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"scores.png: ImportError: .*pip install 'idavlm\[eval\]'"):
        write_report(tmp_path, results, model="Fake", data="fakes")
    report = (tmp_path / "report.md").read_text()
    assert score_table(results) in report
    assert "**Could not be drawn:** scores.png: ImportError: plots need matplotlib" in report


def test_a_report_that_fails_half_way_keeps_what_it_has(tmp_path, results, monkeypatch):
    """The contact sheet fails: tables, results and the other figures are kept, an older contact sheet is not."""
    path = tmp_path / "report.md"

    def fail(*_):
        assert score_table(results) in path.read_text(), "tables are written before figures"
        raise OSError("no space left")

    (tmp_path / "examples.png").write_text("of an earlier run")
    monkeypatch.setattr("idavlm.evaluation.report.draw_contact_sheet", fail)
    options = {"logs": {"a": [history()]}, "examples": [None], "settings": {"steps": 60}}
    with pytest.raises(RuntimeError, match=r"report\.md is written, but 1 of its figures .*OSError: no space left"):
        write_report(tmp_path, results, model="Fake", data="fakes", **options)
    report = path.read_text()
    assert "## Examples\n\n**Could not be drawn:** examples.png: OSError: no space left" in report
    assert "(scores.png)" in report
    assert "(curves.png)" in report
    assert "| `steps` | 60 |" in report
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "report.md", "results.json", "scores.png"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert {variant: len(seeds) for variant, seeds in stored.items()} == {"ID-Former": 3, "no references": 1, "mute": 1}
    assert EvaluationResult.from_dict(stored["ID-Former"][0]) == results["ID-Former"][0]


@pytest.mark.parametrize(
    ("seeds", "title"), [([1], "Fake on fakes: 32 records, 1 seed"), ([2, 2], "Fake on fakes: 32 records, 2 seeds")]
)
def test_the_title_says_what_was_evaluated(tmp_path, results, seeds, title):
    found = {str(number): [results["mute"][0]] * count for number, count in enumerate(seeds)}
    report = write_report(tmp_path, found, model="Fake", data="fakes").read_text()
    assert report.splitlines()[0] == f"# {title}"
