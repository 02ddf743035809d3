"""Data recipes: ``idavlm data mix`` writes them, and ``idavlm train`` reads them by the key ``data``."""

import json
import shutil
from pathlib import Path

import pytest
from torch.utils.data import ConcatDataset

from idavlm.cli.main import main
from idavlm.training.build import _build_datasets
from idavlm.training.config import read_config, read_data_recipe
from idavlm.training.config_file import OptionFile
from tests.training_runs import train, write_parts, write_records

RECIPES = Path(__file__).parent.parent / "recipes"
OPTIONS = "model: some/model\nuse_cpu: true\noutput_dir: out\n"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Files of records in the current folder."""
    write_records(tmp_path, count=6)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mix(*options):
    return main(["data", "mix", *options])


def test_train_reads_what_mix_writes(data, capsys):
    files = ["train.jsonl,max_records=4", "llava.jsonl,reader=llava"]
    assert mix(*files, "--general", "general.jsonl,max_records=2", "--task", "test.jsonl", "--out", "mix.yaml") == 0
    printed = capsys.readouterr().out
    assert "| train_data | train.jsonl | 6 | 4 | 40.0% |" in printed
    assert "train_data: 10 records" in printed
    (data / "config.yaml").write_text(f"{OPTIONS}data: mix.yaml\n")
    config = read_config("config.yaml")
    first, second = config.data.train_data
    assert (first.path, first.max_records, first.seed) == ("train.jsonl", 4, 0)
    assert (second.path, second.reader, second.max_records) == ("llava.jsonl", "llava", None)
    assert (config.training.mixing_mode, config.training.mixing_ratio) == ("extra", 0.2), "each general record once"
    assert len(config.data.task_data) == 1
    again = data / "again.yaml"
    again.write_text(config.to_yaml())
    assert read_config(again).data == config.data, "train_config.yaml repeats the run"


def test_a_seed_chooses_records_of_the_whole_file(data):
    class Processor:
        encode = staticmethod(lambda sample: {"id": sample.id})

    chosen = {}
    for seed in (0, 0, 1, 2):
        assert (
            mix("train.jsonl,max_records=3", "llava.jsonl,reader=llava", "--seed", str(seed), "--out", "mix.yaml") == 0
        )
        built = _build_datasets(read_data_recipe("mix.yaml"), Processor)["train"]
        assert isinstance(built, ConcatDataset)
        ids = [built[number]["id"] for number in range(3)]
        assert chosen.setdefault(seed, ids) == ids
        assert ids == sorted(ids), "in the order of the file"
    assert len(set(map(tuple, chosen.values()))) > 1


def test_keys_of_the_configuration_and_overrides_replace_those_of_the_recipe(data):
    folder = data / "configs"
    (folder / "data").mkdir(parents=True)
    recipe = "train_data: train.jsonl\ngeneral_data: general.jsonl\nmixing_ratio: 0.3\n"
    (folder / "data" / "mix.yaml").write_text(recipe)
    (folder / "config.yaml").write_text(f"{OPTIONS}data: data/mix.yaml\nmixing_ratio: 0.5\n")
    config = read_config(folder / "config.yaml")
    assert (config.data.train_data[0].path, config.training.mixing_ratio) == ("train.jsonl", 0.5)
    config = read_config(folder / "config.yaml", ["general_data=null", "mixing_ratio=0.1"])
    assert config.data.general_data == []
    shutil.copy(folder / "data" / "mix.yaml", data / "other.yaml")
    config = read_config(folder / "config.yaml", ["data=other.yaml"])
    assert config.data.general_data[0].path == "general.jsonl"


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("train_data: a.jsonl\nlearning_rate: 1\n", [], r"mix\.yaml:2: unknown key 'learning_rate'"),
        ("train_data:\n  - {path: a, seed: 1}\n", [], r"mix\.yaml:1: train_data: seed=1 has no effect without max_rec"),
        ("train_data: ???\n", [], r"needs train_data; pass train_data="),
        ("train_data: a.jsonl\nmixing_ratio: much\n", [], r"mix\.yaml:2: mixing_ratio='much' has the wrong type"),
        ("[1]", [], r"mix\.yaml is not a mapping"),
        ("", ["data=none.yaml"], r"override data=none\.yaml: data='none\.yaml' is not a file"),
        ("", ["data=[1]"], r"override data=\[1\]: data=\[1\] has the wrong type"),
    ],
)
def test_mistakes_in_recipes_name_file_and_line(tmp_path, recipe, overrides, message):
    (tmp_path / "mix.yaml").write_text(recipe)
    (tmp_path / "config.yaml").write_text(f"{OPTIONS}data: mix.yaml\n")
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "config.yaml", overrides)


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        ("mixing_ratio: much", r"mix\.yaml:2: mixing_ratio='much' has the wrong type"),
        ("mixing_ratio: 1.5", r"mix\.yaml:2: mixing_ratio=1\.5 must be in 0\.\.1"),
        ("mixing_mode: stirred", r"mix\.yaml:2: mixing_mode='stirred' is not known"),
        ("mixing_ratio: 1\nmixing_mode: interleave", r"mix\.yaml:2: mixing_ratio=1 with mode='interleave'"),
    ],
)
def test_values_of_mixing_are_checked_with_the_recipe(tmp_path, mixing, message):
    (tmp_path / "mix.yaml").write_text(f"train_data: a.jsonl\n{mixing}\n")
    with pytest.raises(ValueError, match=message):
        read_data_recipe(tmp_path / "mix.yaml")
    (tmp_path / "config.yaml").write_text(f"{OPTIONS}data: mix.yaml\n")
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "config.yaml")


def test_mistakes_of_the_command(data, capsys):
    mistakes = {
        ("train.jsonl,max_records=9",): "train.jsonl has 6 records, fewer than max_records=9",
        ("train.jsonl,count=9",): "'count=9' is not OPTION=VALUE with an option of image_root, reader",
        ("train.jsonl,reader=llama",): "reader='llama' is not known",
        ("llava.jsonl",): "llava.jsonl:1: ",
        ("none.jsonl",): "none.jsonl does not exist",
        ("train.jsonl", "--mixing-ratio", "0.1"): "have no effect without --general",
        (): "at least one file",
    }
    for options, message in mistakes.items():
        assert mix(*options, "--out", "mix.yaml") == 2
        assert message in capsys.readouterr().err
        assert not (data / "mix.yaml").exists()
    assert mix("train.jsonl", "--out", "mix.json") == 2


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_recipes_of_ida_vlm_are_what_their_command_writes(stage, tmp_path, monkeypatch):
    """With files of the sizes that the recipe asks for."""
    import shlex

    recipe = RECIPES / "data" / f"{stage}.yaml"
    values = OptionFile(recipe).values
    monkeypatch.chdir(tmp_path)
    record = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    llava = '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n'
    for file in (*values["train_data"], *values["general_data"]):
        path = Path(file["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((llava if file.get("reader") == "llava" else record) * file["max_records"])
    command = next(line for line in recipe.read_text().splitlines() if "idavlm data mix" in line)
    words = shlex.split(command.partition("idavlm ")[2])
    words[words.index("--out") + 1] = "mix.yaml"
    assert main(words) == 0
    assert OptionFile("mix.yaml").values == values
    totals = {key: sum(file["max_records"] for file in values[key]) for key in ("train_data", "general_data")}
    assert totals == {"train_data": {"stage1": 80_000, "stage2": 60_000}[stage], "general_data": 10_000}
    config = OptionFile(RECIPES / f"ida_vlm_{stage}.yaml")
    assert config.values["data"] == f"data/{stage}.yaml"


def test_a_model_trains_on_a_recipe(data):
    assert mix("train.jsonl", "--general", "general.jsonl", "--out", "mix.yaml") == 0
    config = data / "config.yaml"
    config.write_text("data: mix.yaml\nmodel_options: {num_queries: 4, num_heads: 2}\n")
    options = {**write_parts(data / "parts"), "chat_template": "QWEN_CHATML"}
    assert train(config, **options, output_dir=data / "out", mixing_mode="interleave", mixing_ratio=0.5) == 0
    logged = json.loads((data / "out" / "trainer_state.json").read_text())["log_history"]
    assert sum("loss" in entry for entry in logged) == 2
