"""``idavlm ablate``: studies, runs that are killed, fail or are finished, tables, pages, engines, recipes."""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from transformers import HfArgumentParser

from idavlm.ablation import RunFolder, execution, read_study
from idavlm.ablation.figures import plot_study
from idavlm.ablation.programs import command, flags
from idavlm.ablation.summary import summarize_study
from idavlm.ablation.tables import escape_latex
from idavlm.cli import ablate_train
from idavlm.cli.main import main
from idavlm.evaluation import EvaluationResult, read_metrics
from idavlm.evaluation.comparison import compare_scores, pair_predictions
from tests import small_models
from tests.training_runs import QUICK, write_records

ROOT = Path(__file__).parent.parent
PROGRAM = str(ROOT / "tests" / "ablation_program.py")
RECIPES = ROOT / "recipes" / "ablations"
NOT_STUDIES = ("inner_adaptors_train", "real_parts_align", "real_parts_identities", "real_parts_train")
"""Configurations of ``idavlm train`` that studies share."""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_study(file="study", **keys) -> str:
    keys = {"program": PROGRAM, "out": file, "grid": {"width": [1, 2, 3, 4]}, "seeds": [0, 1, 2], **keys}
    Path(f"{file}.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    return f"{file}.yaml"


def finished(folder) -> int:
    return sum(RunFolder(path.parent).state == "finished" for path in Path(folder).glob("*/seed-*/run.json"))


def scores(folder, *, without=("seconds",)) -> list[dict]:
    with (Path(folder) / "scores.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in without} for row in csv.DictReader(file)]


# --- Runs ------------------------------------------------------------------------------------------------------------


def test_a_killed_study_resumes_to_the_same_table(capfd):
    """12 runs, killed twice by SIGKILL, with a run that fails: the table is that of an uninterrupted study."""
    options = {"base": {"seconds": 0.15}, "grid": {}, "baseline": "width 1"}
    options["variants"] = {f"width {width}": {"width": width} for width in (1, 2, 3)}
    options["variants"]["fails with seed 1"] = {"width": 4, "fail": [1]}
    whole, killed = write_study("whole", **options, name="study"), write_study("killed", **options, name="study")
    assert main(["ablate", whole]) == 1, "a failed run is reported by the exit status"
    out = capfd.readouterr().out
    assert "1 runs failed: fails_with_seed_1" in out
    assert "RuntimeError: seed 1 fails on purpose" in out

    for enough in (3, 7):
        child = os.fork()
        if child == 0:
            os._exit(main(["ablate", killed, "--jobs", "2"]))
        while finished("killed") < enough:
            time.sleep(0.01)
        time.sleep(0.07)  # into the next runs
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert enough <= finished("killed") < 11
    before = {path: path.stat().st_mtime_ns for path in Path("killed").glob("*/seed-*/output/metrics.json")}
    assert main(["ablate", killed, "--jobs", "2"]) == 1
    assert finished("killed") == 11
    assert scores("killed") == scores("whole")
    assert len(scores("killed")) == 2 * 4
    kept = [path for path, changed in before.items() if path.stat().st_mtime_ns == changed]
    assert len(kept) >= 7, "finished runs are not repeated"
    attempts = [RunFolder(path.parent).record["attempts"] for path in Path("killed").glob("*/seed-*/run.json")]
    assert max(attempts) > 1, "a killed run started again"

    before = {path: path.read_text() for path in Path("killed").glob("scores.*") if path.suffix != ".png"}
    for path in before:
        path.unlink()
    assert main(["ablate", killed, "--report-only"]) == 1
    assert {path: path.read_text() for path in before} == before


def test_the_record_of_a_run_says_what_it_was(capsys):
    assert main(["ablate", write_study(grid={"width": [2]}, seeds=[5], base={"depth": [1, 2]})]) == 0
    run = RunFolder("study/width=2/seed-5")
    record = run.record
    assert record["settings"] == {"program": PROGRAM, "options": {"depth": [1, 2], "width": 2}, "seed": 5}
    assert record["command"][1:7] == [PROGRAM, "--depth", "1", "2", "--width", "2"]
    assert record["packages"]["torch"]
    assert re.fullmatch("[0-9a-f]{40}", record["git"]["program"]["revision"])
    assert record["exit_status"] == 0
    assert record["started"] <= record["ended"]
    assert run.end_of_log() == "width 2, seed 5"


def test_changed_settings_of_a_finished_run_are_an_error(capsys):
    """For the run, its dry run and its report; a failed run starts again with the new settings."""
    assert main(["ablate", write_study(seeds=[0, 1], grid={"width": [1]}, base={"fail": [1]})]) == 1
    changed = write_study(seeds=[1], grid={"width": [1]}, base={"fail": []})
    assert main(["ablate", changed]) == 0
    for option in ("--jobs=1", "--dry-run", "--report-only"):
        assert main(["ablate", changed, "--set", "base.rate=0.2", option]) == 2
        message = capsys.readouterr().err
        assert "study/width=1/seed-1 is finished, but the study has changed since" in message
        assert "options was" in message
        assert "'rate': 0.2" in message


def test_a_killed_run_continues_from_its_files_where_the_study_says_so():
    study = read_study(write_study(resume={"resume": True}, grid={"width": [1]}, seeds=[0]))
    folder = RunFolder("study/width=1/seed-0")
    (job,) = execution.jobs_of(study, study.runs())
    assert "--resume" not in job.command
    folder.output.mkdir(parents=True)
    folder._write({"settings": job.settings, "state": "running"})
    (folder.output / "old").touch()
    (job,) = execution.jobs_of(study, study.runs())
    assert job.command[-6:-4] == ["--resume", "True"]
    study.resume = None
    (job,) = execution.jobs_of(study, study.runs())
    assert job.execute({}) == "finished"
    assert not (folder.output / "old").exists(), "without resume, it starts in an empty folder"


def test_a_report_tells_a_run_that_runs_from_one_that_was_killed(capsys):
    study = write_study(grid={"width": [1]}, seeds=[0, 1], base={"seconds": 60})
    folder = RunFolder("study/width=1/seed-0")
    child = os.fork()
    if child == 0:
        os._exit(main(["ablate", study]))
    while folder.state != "running":
        time.sleep(0.01)
    assert main(["ablate", study, "--report-only"]) == 0
    assert "2 runs have not finished" in capsys.readouterr().out
    assert "runs: 1 running, 1 new" in Path("study/report.md").read_text()
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    assert main(["ablate", study, "--report-only"]) == 0
    assert "runs: 1 killed, 1 new" in Path("study/report.md").read_text()


def test_a_program_without_metrics_has_failed():
    Path("empty.py").write_text(
        "import argparse; p = argparse.ArgumentParser(); p.add_argument('--seed'); "
        "p.add_argument('--out'); p.parse_args(); print('done')"
    )
    assert main(["ablate", write_study(program="empty.py", grid={}, seeds=[0])]) == 1
    record = RunFolder("study/base/seed-0").record
    assert record["state"] == "failed"
    assert "no valid metrics.json" in record["problem"]


def test_runs_side_by_side_see_one_gpu_each(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert main(["ablate", write_study(base={"seconds": 0.1}, seeds=[0]), "--jobs", "2"]) == 0
    seen = {json.loads(path.read_text())["gpu"] for path in Path("study").glob("*/seed-0/output/metrics.json")}
    assert seen == {"4", "6"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert execution.device_environment(1, 2) == {"OMP_NUM_THREADS": str(max(1, cores // 2))}


def test_ray_gives_the_same_numbers(monkeypatch):
    pytest.importorskip("ray.tune")
    options = {"grid": {"width": [1, 2]}, "seeds": [0, 1], "base": {"fail": [1]}, "name": "study"}
    assert main(["ablate", write_study("local", **options)]) == 1
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert main(["ablate", write_study("ray", **options), "--engine", "ray"]) == 1
    assert scores("ray") == scores("local")
    assert len(scores("ray")) == 4


def test_missing_matplotlib_is_an_error_before_the_first_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["ablate", write_study()]) == 2
    assert "pip install 'idavlm[eval]'" in capsys.readouterr().err
    assert not Path("study").exists()


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"idavlm\[ray\]"):
        main(["ablate", write_study(), "--engine", "ray"])


# --- Studies ---------------------------------------------------------------------------------------------------------


def test_variants_are_combined_with_the_grid():
    study = read_study(write_study(grid={"width": [1, 2], "rate": [0.1]}, variants={"a": {}, "b": {"mode": "x"}}))
    names = ["a, width=1, rate=0.1", "a, width=2, rate=0.1", "b, width=1, rate=0.1", "b, width=2, rate=0.1"]
    runs = study.runs()
    assert list(dict.fromkeys(run.variant for run in runs)) == names
    assert study.baseline == names[0]
    assert runs[-1].settings == {"mode": "x", "width": 2, "rate": 0.1}
    assert len({run.name for run in runs}) == len(runs) == 12
    assert flags({"a": True, "b": None, "c": {"d": 1}, "e": [1, 2]}) == [
        "--a",
        "True",
        "--c",
        '{"d": 1}',
        "--e",
        "1",
        "2",
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gird": {}}, r"study.yaml:\d+: unknown key 'gird'; did you mean 'grid'"),
        ({"program": "none.py"}, r"study.yaml:1: program='none.py' is no file in the current folder"),
        ({"program": "train"}, "needs config"),
        ({"config": "x.yaml"}, "config has no effect with program="),
        ({"grid": {"width": 3}}, r"grid: width=3 is not a list of values"),
        ({"grid": {"width": [1, 1]}}, "has 1 twice"),
        ({"seeds": []}, "seeds=.* is not a list of values"),
        ({"seeds": ["a"]}, "seeds=.* has the wrong type"),
        ({"baseline": "width=9"}, r"baseline='width=9' is no variant; the variants are 'width=1'"),
        ({"base": {"seed": 1}}, "the study sets seed of each run"),
        ({"variants": {"a": {"width": 3}}}, "width is varied in two places"),
        ({"variants": {"a": 3}}, "not a mapping of options"),
        ({"choose": {"values": {"rate": [1]}}}, "must have the keys 'values'"),
        ({"choose": {"values": {"rate": [1]}, "by": "x", "seeds": [7]}}, r"choose.seeds=\[7\] must be some of seeds"),
        ({"base": {"widht": 3}}, r"has no option --widht \(see its --help\); did you mean '--width'"),
        ({"resume": {"continue": True}}, "has no option --continue"),
        ({"metrics": ["*/recall"]}, r"'\*/recall' is no metric of the runs; they have test/matching/accuracy, loss_%"),
    ],
)
def test_errors_name_the_key_and_the_remedy(keys, message, capsys):
    assert main(["ablate", write_study(**{"seeds": [0], "grid": {"width": [1]}, **keys})]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_dry_run_starts_nothing(capsys):
    assert main(["ablate", write_study(), "--dry-run", "--set", "seeds=[7]"]) == 0
    out = capsys.readouterr().out
    assert "width=4/seed-7 (new)" in out
    assert "--width 4 --seed 7 --out study/width=4/seed-7/output" in out
    assert "4 runs in study" in out
    assert not Path("study").exists()


# --- Tables ----------------------------------------------------------------------------------------------------------


def test_tables_hold_means_deviations_and_paired_differences(capsys):
    assert main(["ablate", write_study(metrics=["test/*", "loss*"], baseline="width=2")]) == 0
    summary = summarize_study(read_study("study.yaml"))
    metrics = [
        json.loads(path.read_text()) for path in sorted(Path("study/width=4").glob("seed-*/output/metrics.json"))
    ]
    accuracy = [found["metrics"]["test/matching/accuracy"] for found in metrics]
    row = next(
        row
        for row in scores("study", without=())
        if (row["variant"], row["metric"]) == ("width=4", "test/matching/accuracy")
    )
    assert float(row["mean"]) == pytest.approx(statistics.fmean(accuracy))
    assert float(row["standard_deviation"]) == pytest.approx(statistics.stdev(accuracy))
    assert (row["n"], row["parameters"], row["records"]) == ("3", "4000", "40")
    assert float(row["seconds"]) > 0

    # One seed: the comparison is that of `idavlm eval compare`.
    assert (
        main(["ablate", write_study(seeds=[0], name="one", metrics=["test/*"], baseline="width=2"), "--report-only"])
        == 0
    )
    a, b = (EvaluationResult.load(f"study/width={width}/seed-0/output/answers.json") for width in (2, 4))
    (expected,) = compare_scores(pair_predictions(a, b))
    variant = summarize_study(read_study("study.yaml")).variants[3]
    assert variant.scores["test/matching/accuracy"].comparison == expected
    # Several seeds: the score of a record is its mean over the seeds.
    several = summary.variants[3].scores["test/matching/accuracy"].comparison
    assert several.difference.n == 40
    assert several.difference.mean == pytest.approx(
        summary.variants[3].scores["test/matching/accuracy"].mean
        - summary.baseline.scores["test/matching/accuracy"].mean
    )
    assert several.difference.high - several.difference.low < expected.difference.high - expected.difference.low

    report = Path("study/report.md").read_text()
    assert "| variant | n | parameters | time | matching accuracy |" in report
    assert "\n| chance level |  |  |  | 0.250 |" in report
    assert row["chance"] == "0.25"
    assert Image.open("study/scores.png").size[0] > 300
    latex = Path("study/scores.tex").read_text()
    assert r"\toprule" in latex
    assert r"width=4 & 1 & 4,000 &" in latex
    assert escape_latex("a_b & 5 % {~}") == r"a\_b \& 5 \% \{\textasciitilde{}\}"
    assert "width=2" not in re.search(r"difference from width=2(.*)", latex, re.DOTALL)[1].partition("midrule")[2]


def test_the_figure_has_a_panel_for_each_metric(monkeypatch):
    """Six metrics fill six of two rows of four panels; the others are hidden."""
    assert main(["ablate", write_study(seeds=[0])]) == 0
    summary, drawn = summarize_study(read_study("study.yaml")), []
    monkeypatch.setattr("idavlm.ablation.figures.save", lambda figure, path: drawn.append(figure))
    plot_study("scores.png", replace(summary, metrics=summary.metrics[:2] * 3))
    assert [bool(ax.get_visible()) for ax in drawn[0].axes] == [True] * 6 + [False] * 2
    assert all(ax.lines or ax.patches for ax in drawn[0].axes[:6])


def test_long_titles_of_panels_have_several_lines(monkeypatch):
    assert main(["ablate", write_study(seeds=[0])]) == 0
    summary, drawn = summarize_study(read_study("study.yaml")), []
    monkeypatch.setattr("idavlm.ablation.figures.save", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr("idavlm.ablation.figures.label", lambda *_: "faces: identity map, wrong references matching")
    plot_study("scores.png", summary)
    assert drawn[0].axes[0].get_title(loc="left") == "faces: identity map, wrong references\nmatching"


def test_runs_on_other_records_are_not_paired():
    Path("other.jsonl").write_text('{"id": "other"}\n')
    variants = {"a": {}, "b": {"records": "other.jsonl"}}
    assert main(["ablate", write_study(grid={}, variants=variants, seeds=[0])]) == 0
    summary = summarize_study(read_study("study.yaml"))
    assert summary.variants[1].scores["test/matching/accuracy"].comparison is None
    assert summary.notes == [
        "b, test: no comparison by record. A and b have no item in common; compare runs on the same data."
    ]


def test_values_are_chosen_on_some_seeds():
    """The other seeds run with the chosen value alone, also if the study is killed between."""
    choose = {"values": {"rate": [0.1, 0.3]}, "by": "test/matching/accuracy"}
    study = write_study(choose={**choose, "seeds": [0]}, grid={"width": [2, 3]}, seeds=[0, 1])
    assert len(read_study(study).runs()) == 4
    assert main(["ablate", study, "--dry-run"]) == 0
    assert main(["ablate", study]) == 0
    assert finished("study") == 6
    first = summarize_study(read_study(study))
    assert first.notes == []
    for variant in first.variants:
        assert len(variant.scores["test/matching/accuracy"].values) == 2
        runs = [run for run in read_study(study).runs() if run.variant == variant.name]
        values = {run.choice["rate"]: RunFolder(f"study/{run.name}").metrics().metrics for run in runs}
        assert variant.choice["rate"] == max(values, key=lambda rate: values[rate]["test/matching/accuracy"])
    for folder in list(Path("study").glob("*/seed-1")):
        shutil.rmtree(folder)
    assert main(["ablate", study]) == 0
    assert finished("study") == 6
    again = summarize_study(read_study(study))
    assert [each.scores for each in again.variants] == [each.scores for each in first.variants]
    with open("study/runs.csv") as file:
        assert len(list(csv.DictReader(file))) == 6


def test_each_variant_is_shown_at_its_best_value():
    choose = {"values": {"rate": [0.1, 0.3]}, "by": "test/matching/accuracy"}
    assert main(["ablate", write_study(choose=choose, grid={"width": [2, 3]}, seeds=[0, 1])]) == 0
    summary = summarize_study(read_study("study.yaml"))
    for variant in summary.variants:
        runs = [run for run in read_study("study.yaml").runs() if run.variant == variant.name]
        means = {
            rate: statistics.fmean(
                RunFolder(f"study/{run.name}").metrics().metrics["test/matching/accuracy"]
                for run in runs
                if run.choice["rate"] == rate
            )
            for rate in (0.1, 0.3)
        }
        assert variant.scores["test/matching/accuracy"].mean == max(means.values()) > min(means.values())
        assert means[variant.choice["rate"]] == max(means.values())


def test_pages_show_the_records_where_variants_differ():
    images = small_models.draw_images(Path("images"), small_models.IMAGES)
    records = [small_models.record(number, answer=False) for number in range(6)]
    Path("test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    base = {"records": str(Path("test.jsonl").absolute())}
    assert images.exists()
    assert main(["ablate", write_study(base=base, grid={"width": [1, 4]}, seeds=[0])]) == 0
    (page,) = Path("study/differences").glob("*.html")
    assert page.read_text().count("data:image/jpeg;base64,") > 0
    assert f'<a href="differences/{page.name}">' in Path("study/report.html").read_text().replace("%3D", "=")


def test_a_study_of_train_configurations(tmp_path, monkeypatch, capsys):
    """A run of the study trains a tiny model, answers records, and counts the parameters."""
    processor = small_models.small_processor()
    small_models.small_model(processor).save_pretrained("model")
    processor.save_pretrained("model")
    data = write_records(tmp_path / "data")
    config = {"model": "model", "train_data": str(data / "train.jsonl"), **QUICK, "max_steps": 1}
    Path("train.yaml").write_text(yaml.safe_dump(config))
    records = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    records.append({**records[0], "id": "t2", "type": "caption_single", "answer": "Kate is reading."})
    (data / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    test = {"data": str(data / "test.jsonl"), "max_new_tokens": 4}
    evaluate = {"test": test, "one": {**test, "tasks": ["location"], "max_records_per_task": 1}}
    keys = {"program": "train", "config": "train.yaml", "evaluate": evaluate, "seeds": [3], "grid": {}}
    study = write_study(**keys, variants={"all": {}, "LoRA": {"lora.language_model.r": 2}})
    for wrong, message in (
        ("base.learning_rat=1", "'learning_rat'"),
        ("evaluate.test.dat=x", "'dat' is not known"),
        ("evaluate.one.tasks=[where]", "test.jsonl has records of caption_single, location; name some of these"),
    ):
        assert main(["ablate", study, "--set", wrong, "--dry-run"]) == 2
        assert message in capsys.readouterr().err
    assert main(["ablate", study, "--dry-run"]) == 0
    trained = {}
    for run in read_study(study).runs():
        monkeypatch.setattr(sys, "argv", command(read_study(study), run.settings, run.seed, run.variant)[2:])
        ablate_train.main()
        found = read_metrics(run.variant)
        assert any(name.startswith("test/") for name in found.metrics)
        assert len(found.answers["test"][0].predictions) == 3
        assert len(found.answers["one"][0].predictions) == 1
        trained[run.variant] = found.facts["trained_parameters"]
        assert trained["all"] <= found.facts["parameters"]
        assert "seed: 3" in Path(run.variant, "model", "train_config.yaml").read_text()
    assert 0 < trained["LoRA"] < trained["all"]


# --- Recipes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser():
    """The argument parser of examples/train_idformer.py."""
    example = runpy.run_path(str(ROOT / "examples" / "train_idformer.py"), run_name="example")
    return HfArgumentParser(
        [value for name, value in example.items() if name.endswith("Arguments") and name != "IDTrainingArguments"]
        + [example["RecordOptions"]]
    )


def recipe_overrides(path: Path) -> list[str]:
    """Values for the placeholders of a recipe."""
    text = path.read_text()
    values = yaml.safe_load(text)
    return [
        f"{outer}.{key}={Path(__file__)}" if not isinstance(value, dict) else f"{outer}.{key}.id_former_class=tests.x.Y"
        for outer, found in values.items()
        if isinstance(found, dict)
        for key, value in found.items()
        if value == "???" or (isinstance(value, dict) and "???" in value.values())
    ]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path, parser, tmp_path, monkeypatch):
    """Every option of every run is one that the program takes, and the baseline is a variant."""
    if path.stem in NOT_STUDIES:
        assert any(path.name in other.read_text() for other in RECIPES.glob("*.yaml") if other != path)
        return
    for folder in ("recipes", "examples"):
        Path(folder).symlink_to(ROOT / folder)
    study = read_study(path, recipe_overrides(path))
    runs = study.runs()
    assert len(study.seeds) >= (2 if path.stem == "quick" else 3)
    assert study.folder == Path("runs/ablations") / path.stem
    if study.program == "train":
        for evaluation in study.evaluate.values():
            Path(evaluation["data"]).parent.mkdir(parents=True, exist_ok=True)
            with open(evaluation["data"], "a") as file:
                for number, task in enumerate(evaluation.get("tasks", ())):
                    record = {**small_models.record(number, answer=False), "type": task, "answer": "x"}
                    file.write(json.dumps(record) + "\n")
        assert main(["ablate", str(path), "--dry-run", *(f"--set={each}" for each in recipe_overrides(path))]) == 0
        return
    assert study.program == "examples/train_idformer.py"
    for run in runs:
        parser.parse_args_into_dataclasses(command(study, run.settings, run.seed, "out")[2:])


def test_every_study_has_a_recipe():
    names = {path.stem for path in RECIPES.glob("*.yaml")} - set(NOT_STUDIES)
    assert names == {
        *("id_former_options", "num_queries", "depth", "photos", "identities", "distractors", "supervision"),
        "answers",
        *(
            "mixing",
            "inner_adaptors",
            "training_identities",
            "transfer",
            "real_parts",
            "not_here",
            "own_id_former",
            "quick",
        ),
    }
