"""An ID-Former class of one's own: building, saving, loading, and errors."""

import json
import sys

import pytest
import torch

from idavlm import IDAVLMConfig, IDAVLMForConditionalGeneration, IDFormer
from idavlm.cli.main import main
from idavlm.evaluation import load_checkpoint
from idavlm.models import import_id_former
from tests import small_models

PACKAGE = """
import torch
from torch import nn
from idavlm import IDFormer


class Scaled(IDFormer):
    def __init__(self, *, scale: float = 1.0, **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, *arguments, **options):
        result = super().forward(*arguments, **options)
        if isinstance(result, tuple):
            return result[0] * self.scale, result[1]
        return result * self.scale


class Narrow(IDFormer):
    def __init__(self, hidden_size, num_queries, num_heads):
        super().__init__(hidden_size=hidden_size, num_queries=num_queries, num_heads=num_heads)


class Other(nn.Module):
    pass


def build():
    pass
"""


@pytest.fixture(autouse=True)
def _package(tmp_path, monkeypatch):
    (tmp_path / "my_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_package", None)
    yield
    sys.modules.pop("my_package", None)


def build(**options):
    processor = small_models.small_processor()
    return small_models.small_model(processor, **options), processor


def test_a_model_has_the_class_and_its_checkpoint_loads_once_it_is_imported(tmp_path):
    torch.manual_seed(0)
    model, _processor = build(id_former_class="my_package.Scaled", scale=0.5)
    assert type(model.id_former).__name__ == "Scaled"
    assert model.id_former.scale.item() == 0.5
    features = torch.randn(3, 16, model.id_former.resampler.vision_hidden_size)
    index = torch.tensor([0, 0, 0]), torch.tensor([0, 0, -1])
    plain = IDFormer(**model.id_former.to_config())
    plain.load_state_dict(model.id_former.state_dict(), strict=False)
    roles = torch.tensor([0, 0, 1])
    torch.testing.assert_close(model.id_former(features, roles, *index), 0.5 * plain(features, roles, *index))

    model.id_former.scale.data.fill_(0.25)
    model.save_pretrained(tmp_path / "model")
    loaded = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.id_former.scale.item() == 0.25
    assert loaded.config.connector_config["scale"] == 0.5

    del sys.modules["my_package"]  # as in a new process
    with pytest.raises(ValueError, match=r"code that has not been imported; if you trust it, run `import my_package`"):
        IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert "my_package" not in sys.modules, "a checkpoint does not choose which code is run"


def test_commands_import_the_class_that_the_user_names(tmp_path, capsys):
    """`idavlm eval` loads a checkpoint with a class of one's own; another class is an error."""
    model, processor = build(id_former_class="my_package.Scaled")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    small_models.draw_images(tmp_path / "images", small_models.IMAGES)
    (tmp_path / "test.jsonl").write_text(json.dumps(small_models.record(answer=False)) + "\n")
    command = ["eval", "records", str(tmp_path / "test.jsonl"), "--model", str(tmp_path / "model")]
    command += ["--max-new-tokens", "2", "--out", str(tmp_path / "out")]
    del sys.modules["my_package"]
    assert main(command) == 2
    assert "code that has not been imported" in capsys.readouterr().err
    assert main([*command, "--id-former-class", "my_package.Scaled"]) == 0
    assert (tmp_path / "out" / "report.md").is_file()
    plain, processor = build()
    plain.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"'my_package.Scaled' is not the class of .*model, which was trained with"):
        load_checkpoint(tmp_path / "model", id_former_class="my_package.Scaled")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_package.Scald", "the module my_package has no class 'Scald'"),
        ("my_package.build", "has no class 'build'"),
        ("my_package.Other", r"is no subclass of idavlm.IDFormer; derive it"),
        (
            "my_package.Narrow",
            r"does not take vision_hidden_size, output_size, attn_implementation; accept \*\*options",
        ),
        ("my_pakage.Scaled", r"cannot be imported \(No module named 'my_pakage'\); is its folder in .* PYTHONPATH"),
        ("Scaled", "names no module"),
    ],
)
def test_errors_name_the_class_and_the_remedy(path, message):
    with pytest.raises(ValueError, match=f"id_former_class={path!r}.*{message}"):
        import_id_former(path)


def test_options_of_the_class_are_checked():
    with pytest.raises(ValueError, match=r"'scal' is not an argument of Scaled; known: .*hidden_size.*scale"):
        build(id_former_class="my_package.Scaled", scal=0.5)
    with pytest.raises(ValueError, match="connector_config: scale='x' has the wrong type"):
        build(id_former_class="my_package.Scaled", scale="x")
    import_id_former("my_package.Scaled")
    with pytest.raises(ValueError, match="has no effect with connector='resampler'"):
        IDAVLMConfig(connector="resampler", id_former_class="my_package.Scaled")


def test_the_loss_reaches_the_parameters_of_the_class(tmp_path):
    model, processor = build(id_former_class="my_package.Scaled")
    small_models.draw_images(tmp_path, small_models.IMAGES)
    batch = processor.collate([processor.encode(small_models.sample(tmp_path))])
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    model.train()(**inputs).loss.backward()
    assert model.id_former.scale.grad.abs() > 0
