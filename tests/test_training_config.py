"""Configuration files of ``idavlm train``: every mistake is an error that names the file and the line."""

import pytest

from idavlm.training.config import ModelArguments, read_config
from idavlm.training.config_file import OptionFile


@pytest.fixture
def write(tmp_path):
    """Write a configuration with the keys that every run needs; returns its path."""

    def write_config(text: str = "", *, complete: bool = True):
        path = tmp_path / "config.yaml"
        needed = f"model: some/model\ntrain_data: train.jsonl\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\n"
        path.write_text((needed if complete else "") + text)
        return path

    return write_config


def test_scalars_are_those_of_yaml_1_2(write):
    """``no`` is a string and ``1e-5`` a number, which PyYAML alone reads the other way round."""
    path = write("save_strategy: no\nlearning_rate: 1e-5\nadam_beta2: .95\nbf16: False\nseed: 010\nrun_name: null\n")
    values = OptionFile(path).values
    assert values["save_strategy"] == "no"
    assert (values["learning_rate"], values["adam_beta2"]) == (1e-5, 0.95)
    assert values["bf16"] is False
    assert values["seed"] == 10, "no octal number"
    assert values["run_name"] is None


def test_values_and_overrides(write):
    path = write("learning_rate: 1e-5\nfreeze: [vision_tower]\nmodel_options: {num_queries: 4}\n")
    overrides = ["learning_rate=2e-5", "freeze=[connector]", "model_options.num_heads=2", "max_steps=3"]
    config = read_config(path, overrides)
    assert config.training.learning_rate == 2e-5
    assert config.training.freeze == ["connector"]
    assert config.training.max_steps == 3
    assert config.model.model_options == {"num_queries": 4, "num_heads": 2}
    assert config.data.train_data[0].path == "train.jsonl"
    assert read_config(path, ["model_options={num_heads: 4}"]).model.model_options == {"num_heads": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nlearning_rat: 1e-5\n", r"config\.yaml:6: unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
        ("learning_rate: fast\n", r"config\.yaml:5: learning_rate='fast' has the wrong type; expected float"),
        ("max_steps: 1.5\n", r"config\.yaml:5: max_steps=1\.5 has the wrong type; expected int"),
        ("bf16: yes\n", r"config\.yaml:5: bf16='yes' has the wrong type; expected bool"),
        ("bf16: 1\n", r"config\.yaml:5: bf16=1 has the wrong type; expected bool"),
        ("freeze: vision_tower\n", r"config\.yaml:5: freeze='vision_tower' has the wrong type; expected list\[str\]"),
        ("freeze: [1]\n", r"config\.yaml:5: freeze=\[1\] has the wrong type"),
        ("freeze: [tower]\n", r"config\.yaml:5: freeze='tower' is not known; choose one of 'vision_tower'"),
        ("model_options: [1]\n", r"config\.yaml:5: model_options=\[1\] has the wrong type; expected dict"),
        ("lr_scheduler_type: cosin\n", r"config\.yaml:5: lr_scheduler_type='cosin' is not known; .*'cosine'"),
        ("save_strategy: often\n", r"config\.yaml:5: save_strategy='often' is not known; choose one of .*'steps'"),
        ("stage: looks\n", r"config\.yaml:5: stage='looks' is not known"),
        ("dtype: float8\n", r"config\.yaml:5: dtype='float8' is not known"),
        ("max_new_tokens: 0\n", r"config\.yaml:5: max_new_tokens=0 must be an integer of at least 1"),
        ("quantization: {bits: 4}\n", r"config\.yaml:5: unknown key 'quantization\.bits'; did you mean"),
        ("vision_tower: a\n", r"config\.yaml:1: model='some/model' is a whole model; leave out vision_tower"),
        ("freeze_model: false\n", r"config\.yaml:5: freeze_model=False has no effect"),
        ("label_smoothing_factor: 0.1\n", r"config\.yaml:5: label_smoothing_factor=0\.1 has no effect"),
        ("seed: 1\nseed: 2\n", r"config\.yaml:6: the key 'seed' is already at .*config\.yaml:5"),
        ("freeze: [vision_tower\n", r"config\.yaml:\d: this is not valid YAML"),
        ("general_data: {pth: a}\n", r"config\.yaml:5: general_data: unknown key 'pth'; did you mean 'path'\?"),
        ("general_data: {path: a, reader: lava}\n", r"config\.yaml:5: .*reader='lava' is not known"),
        ("general_data: {path: a, max_records: all}\n", r"general_data: max_records='all' has the wrong type"),
        ("general_data: [{image_root: a}]\n", r"general_data: .* has no 'path'"),
        ("lora: {tower: {r: 4}}\n", r"config\.yaml:5: unknown key 'lora\.tower'; did you mean 'vision_tower'\?"),
        ("lora:\n  language_model:\n    rank: 4\n", r"config\.yaml:7: unknown key 'lora\.language_model\.rank'"),
        ("lora:\n  language_model:\n    r: many\n", r"config\.yaml:7: lora\.language_model\.r='many' has the wr"),
    ],
)  # fmt: skip
def test_mistakes_name_file_and_line(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_config(write(text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_step=3", r"override max_step=3: unknown key 'max_step'; did you mean 'max_steps'\?"),
        ("max_steps=many", r"override max_steps=many: max_steps='many' has the wrong type; expected int"),
        ("max_steps", r"override 'max_steps' is not key=value"),
        ("freeze=[a", r"override 'freeze=\[a': the value is not valid YAML"),
    ],
)
def test_mistakes_in_overrides_name_the_override(write, override, message):
    with pytest.raises(ValueError, match=message):
        read_config(write(), [override])


def test_placeholders_must_be_passed(write):
    path = write("model: ???\ntrain_data: ???\noutput_dir: out\n", complete=False)
    with pytest.raises(ValueError, match=r"needs model, train_data; pass model=\.\.\. train_data=\.\.\. on"):
        read_config(path)
    assert read_config(path, ["model=a", "train_data=b", "use_cpu=true"]).model.model == "a"


def test_a_file_that_is_no_mapping(write):
    with pytest.raises(ValueError, match=r"config\.yaml is not a mapping of options"):
        read_config(write("- a\n- b\n", complete=False))


def test_a_model_or_parts():
    with pytest.raises(ValueError, match=r"model is not set; pass model=\.\.\., or vision_tower"):
        ModelArguments(vision_tower="a")
    with pytest.raises(ValueError, match="attached to a whole model"):
        ModelArguments(vision_tower="a", language_model="b", attach_id_former={})
    with pytest.raises(ValueError, match="leave out attach_id_former"):
        ModelArguments(model="a", attach_id_former={}, id_former="folder")


def test_what_was_set_can_be_read_again(write, tmp_path):
    text = "learning_rate: 3e-5\nfreeze: [vision_tower]\ngeneral_data: {path: g.jsonl, image_root: images}\n"
    config = read_config(write(text), ["mixing_ratio=0.2"])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert read_config(again).values == config.values
    assert config.values["mixing_ratio"] == 0.2
