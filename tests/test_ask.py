"""``idavlm ask``: an answer and a drawn box from a shell, for own and attached models; mistakes are one line."""

import pytest
import torch
from PIL import Image

from idavlm import IdentityProcessor, ask, attach_id_former, save_id_former
from idavlm.cli.main import main
from tests.small_models import small_model
from tests.vlm_families import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("own")
    small_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def arguments(checkpoint, root, *more):
    identity = f"Kate={root / 'kate.png'},{root / 'other.png'}"
    model = ["ask", "--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "4"]
    return [*model, "--identity", identity, *more, str(root / "scene.png"), "Where is Kate?"]


def test_the_answer_is_that_of_python(checkpoint, processor, root, capsys):
    assert main(arguments(checkpoint, root)) == 0
    expected = ask(
        small_model(processor),
        processor,
        "Where is Kate?",
        images=[root / "scene.png"],
        identities={"Kate": [root / "kate.png", root / "other.png"]},
        max_new_tokens=4,
    )
    assert capsys.readouterr().out.strip() == expected


def test_the_box_of_the_answer_is_drawn(checkpoint, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("idavlm.models.ask", lambda *args, **kwargs: "8 8 24 24")
    assert main(arguments(checkpoint, root, "--draw", str(tmp_path / "out.png"))) == 0
    drawn, scene = Image.open(tmp_path / "out.png"), Image.open(root / "scene.png")
    assert drawn.size == scene.size
    width, height = scene.size
    assert drawn.getpixel((width // 2, round(height * 8 / 31))) == (255, 40, 40)
    assert str(tmp_path / "out.png") in capsys.readouterr().out


def test_a_model_with_an_attached_id_former(root, tmp_path, capsys):
    model, processor = tiny_model("gemma3"), tiny_processor("gemma3")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    attach_id_former(model, num_heads=4, gate="none")
    save_id_former(model, tmp_path / "id-former")
    status = main(arguments(tmp_path / "base", root, "--id-former", str(tmp_path / "id-former")))
    assert status == 0
    expected = ask(
        model.eval(),
        IdentityProcessor(processor),
        "Where is Kate?",
        images=[root / "scene.png"],
        identities={"Kate": [root / "kate.png", root / "other.png"]},
        max_new_tokens=4,
    )
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--identity", "Kate"], "--identity 'Kate' is not NAME=PHOTO"),
        (["--identity", "Tom=nowhere.png"], "nowhere.png does not exist"),
        (["--id-former", "nowhere"], "id_former.json does not exist"),
        (["--device", "gpu"], "device='gpu' cannot be used"),
    ],
)
def test_mistakes_are_one_line(checkpoint, root, more, message, capsys):
    assert main(arguments(checkpoint, root, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_answer_without_a_box_is_not_drawn(checkpoint, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("idavlm.models.ask", lambda *args, **kwargs: "by the door")
    assert main(arguments(checkpoint, root, "--draw", str(tmp_path / "out.png"))) == 2
    assert "the answer 'by the door' holds no box" in capsys.readouterr().err
    assert main(["ask", "--model", str(checkpoint), "--draw", "out.png", "Where is Kate?"]) == 2
    assert "needs an image to draw on" in capsys.readouterr().err


def test_the_model_of_the_package_is_the_default(root, capsys):
    """It needs no --model; an ID-Former of one's own does."""
    images = ["--identity", f"Kate={root / 'kate.png'}", str(root / "scene.png"), "What is Kate doing?"]
    assert main(["ask", "--device", "cpu", "--max-new-tokens", "8", *images]) == 0
    assert capsys.readouterr().out.startswith("Kate is ")
    assert main(["ask", "--id-former", "mine", *images]) == 2
    assert "pass that model as --model" in capsys.readouterr().err
