"""Errors of conversions name the problem and leave no files; an interrupted conversion resumes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from idavlm.cli.main import main
from idavlm.conversion import ConversionError, checkpoint_files, convert, converter
from tests.released import released

PROJECTOR = "model.mm_projector.0.weight"
VANISHED = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def llava(tmp_path):
    return released("llava-1.5", tmp_path)


def change(folder: Path, edit) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    edit(weights)
    torch.save(weights, folder / "pytorch_model.bin")


def configure(folder: Path, **entries) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def refused(folder: Path, message: str, **options) -> None:
    """Converting raises an error of this message and leaves nothing."""
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    with pytest.raises(ConversionError, match=message):
        convert(folder, folder.parent / "out", progress=False, **options)
    assert before == {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}


def test_missing_extra_and_misshaped_tensors_are_all_named(llava):
    change(llava, lambda weights: weights.pop(VANISHED))
    change(llava, lambda weights: weights.update({PROJECTOR: torch.zeros(64, 50)}))
    refused(
        llava,
        rf"98 tensors expected, 97 found.*missing: 1 \(language_model\.{VANISHED}\); "
        r"of another shape: 1 \(connector\.0\.weight \(64, 50\) instead of \(64, 48\)\)",
    )
    change(llava, lambda weights: weights.update({"model.strange": torch.zeros(1)}))
    refused(llava, r"tensors that are not part of this format: 1 \(model\.strange\)")
    change(llava, lambda weights: weights.pop("model.strange"))
    change(llava, lambda weights: weights.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(1)}))
    refused(llava, r"unexpected: 1 \(language_model\.model\.layers\.9\.mlp\.up_proj\.weight\)")


def test_fused_tensors_of_another_shape_are_named(tmp_path):
    ida_vlm = released("ida-vlm", tmp_path)
    block, layer = "transformer.visual.transformer.resblocks.1.attn.in_proj.bias", "transformer.h.1.attn.c_attn.bias"
    change(ida_vlm, lambda weights: weights.update({layer: torch.zeros(767)}))
    refused(
        ida_vlm, r"of another shape: 1 \(language_model\.model\.layers\.1\.self_attn\.v_proj\.bias \(255,\) instead"
    )
    change(ida_vlm, lambda weights: weights.update({layer: torch.zeros(768), block: torch.zeros(190)}))
    refused(ida_vlm, rf"{block}: shape \(190,\) cannot become vision_tower\.layers\.1\.self_attn\.q_proj\.bias")


def test_truncated_files(llava, tmp_path):
    tower = llava / "clip-vision-tiny" / "model.safetensors"
    whole = tower.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 4):
        tower.write_bytes(whole[:kept])
        refused(llava, r"clip-vision-tiny/model\.safetensors is not a complete safetensors file")
    tower.write_bytes(whole)
    weights = llava / "pytorch_model.bin"
    whole = weights.read_bytes()
    for kept in (len(whole) - 1000, len(whole) // 2, 100, 0):
        weights.write_bytes(whole[:kept])
        refused(llava, r"pytorch_model\.bin is (not a complete file of torch\.save|refused)")


def test_shards_of_an_index_must_exist(tmp_path):
    iaa = released("iaa", tmp_path)
    (iaa / "model-00002-of-00002.safetensors").unlink()
    refused(iaa, r"names 2 files, of which 1 \(model-00002-of-00002\.safetensors\) are missing")


class Code:
    def __reduce__(self):
        return (os.system, ("touch /tmp/idavlm_code_ran",))


def test_a_pickle_with_code_is_refused_and_not_run(llava):
    marker = Path("/tmp/idavlm_code_ran")
    marker.unlink(missing_ok=True)
    torch.save({"a": Code()}, llava / "pytorch_model.bin")
    refused(llava, "refused because it contains more than tensors .weights_only=True")
    assert not marker.exists()
    torch.save({"step": 3}, llava / "pytorch_model.bin")
    refused(llava, r"expected names and tensors, found 1 \(step\)")


def test_old_pickles_are_read(llava, tmp_path):
    weights = torch.load(llava / "pytorch_model.bin", weights_only=True)
    torch.save(weights, llava / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(llava, tmp_path / "out", progress=False)
    saved = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")
    assert torch.equal(saved["connector.0.weight"], weights[PROJECTOR])


def test_unknown_formats_and_folders(llava, tmp_path):
    change(llava, lambda weights: [weights.pop(name) for name in list(weights) if "mm_projector" in name])
    refused(
        llava,
        r"unknown format. Found model_type='llava_llama'.*39 \(lm_head\.weight, .*formats: Qwen-VL, IDA-VLM",
    )
    (llava / "pytorch_model.bin").unlink()
    refused(llava, r"no weight files; expected one of model\.safetensors, pytorch_model\.bin")
    (llava / "config.json").unlink()
    refused(llava, r"no config\.json")
    refused(tmp_path / "nowhere", "no such folder")


def test_a_configuration_that_lacks_something(tmp_path):
    iaa = released("iaa", tmp_path)
    config = json.loads((iaa / "config.json").read_text())
    del config["num_hidden_layers"]
    (iaa / "config.json").write_text(json.dumps(config))
    refused(iaa, r"config\.json has no 'num_hidden_layers'")
    (iaa / "config.json").write_text("{")
    refused(iaa, r"config\.json: invalid JSON")
    (iaa / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 40}))
    refused(iaa, r"config\.json: num_hidden_layers=40, but the weights have 32 layers")


def test_parts_in_other_folders(llava, tmp_path, capsys):
    configure(llava, mm_vision_tower="openai/clip-vit-large-patch14-336")
    refused(llava, r"its vision tower 'openai/clip-vit-large-patch14-336' is not a local folder.*--vision-tower")
    refused(llava, r"vision_tower='.*nowhere' has no config\.json", vision_tower=tmp_path / "nowhere")
    (llava / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (llava / "tokenizer_config.json").unlink()
    tower = shutil.copytree(llava / "clip-vision-tiny", tmp_path / "tower")
    refused(llava, r"no tokenizer that can be loaded.*--tokenizer", vision_tower=tower)
    assert main(["convert", str(llava), str(tmp_path / "out"), "--vision-tower", str(tower)]) == 2
    assert "idavlm convert: " in capsys.readouterr().err


def test_the_tokenizer_must_belong_to_the_checkpoint(tmp_path):
    ida_vlm = released("ida-vlm", tmp_path)
    lines = (ida_vlm / "qwen.tiktoken").read_text().splitlines()
    (ida_vlm / "qwen.tiktoken").write_text("\n".join(lines[:-1]))
    refused(ida_vlm, "image_start_id=600, but <img> is token 599")
    (ida_vlm / "qwen.tiktoken").write_text("\n".join([*lines[:9], "?", *lines[10:]]))
    refused(ida_vlm, r"qwen\.tiktoken, line 10: expected a token in base 64 and its rank")
    (ida_vlm / "qwen.tiktoken").write_text("\n".join(lines[1:]))
    refused(ida_vlm, r"expected the ranks 0, 1, 2, \.\.\. in order and all 256 bytes")


def test_nothing_is_overwritten_and_disk_space_is_checked_first(llava, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists and is not overwritten"):
        convert(llava, out, progress=False)
    assert (out / "mine.txt").read_text() == "keep"
    shutil.rmtree(out)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    refused(llava, r"needs 0\.07 GB, but only 0\.00 GB are free")
    monkeypatch.undo()
    out.mkdir()
    assert (convert(llava, out, progress=False) / "config.json").exists(), "an empty folder may be there"


def test_an_error_while_writing_leaves_nothing(llava, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        convert(llava, llava.parent / "out", progress=False)
    assert not (llava.parent / "out.partial").exists()
    assert not (llava.parent / "out").exists()


KILLED_AT_THE_SECOND_FILE = """
import os, signal, sys
from idavlm.conversion import convert
from idavlm.conversion import converter
def write(path, header, tensors, real=converter.write_safetensors):
    if path.name.startswith("model-00002"):
        header = dict(header)
        tensors = ((name, tensor) if number < 3 else os.kill(os.getpid(), signal.SIGKILL)
                   for number, (name, tensor) in enumerate(tensors))
    real(path, header, tensors)
converter.write_safetensors = write
convert(sys.argv[1], sys.argv[2], progress=False)
"""


def test_a_killed_conversion_resumes(llava, tmp_path, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", KILLED_AT_THE_SECOND_FILE, str(llava), str(out)], cwd=root)
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    first = partial / "model-00001-of-00002.safetensors"
    assert first.exists()
    assert not (partial / "model-00002-of-00002.safetensors").exists()
    with pytest.raises(FileExistsError, match="belongs to another conversion"):
        convert(llava, out, dtype="float32", progress=False)
    made = first.stat().st_mtime_ns
    written = []
    real = converter.write_safetensors
    monkeypatch.setattr(
        converter, "write_safetensors", lambda path, *rest: written.append(path.name) or real(path, *rest)
    )
    convert(llava, out, progress=False)
    assert written == ["model-00002-of-00002.safetensors"]
    assert (out / first.name).stat().st_mtime_ns == made
    assert not partial.exists()
    assert not {"conversion.json"} & {path.name for path in out.iterdir()}
    assert not list(out.glob("*.unfinished"))
    monkeypatch.undo()
    again = convert(llava, tmp_path / "again", progress=False)
    for path in again.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (out / path.relative_to(again)).read_bytes(), path


def test_files_are_read_by_the_library_and_kept_in_type(tmp_path):
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(2, 5, dtype=torch.float64),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 6).mT,
    }
    checkpoint_files.write_safetensors(tmp_path / "a.safetensors", tensors, tensors.items())
    loaded = load_file(tmp_path / "a.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_dtype_is_applied_to_every_floating_tensor(llava, tmp_path):
    convert(llava, tmp_path / "out", dtype="float16", progress=False)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    with pytest.raises(ValueError, match="dtype='int7' is not supported"):
        convert(llava, tmp_path / "other", dtype="int7")


def test_a_duplicate_file(llava):
    shutil.copy(llava / "clip-vision-tiny" / "model.safetensors", llava / "second.safetensors")
    found = checkpoint_files.SourceCheckpoint(llava, {})
    files = [
        checkpoint_files.WeightFile(llava / name)
        for name in ("second.safetensors", "clip-vision-tiny/model.safetensors")
    ]
    with pytest.raises(ConversionError, match="which another file contains as well"):
        found.add(files)
    save_file({"x": torch.zeros(1)}, llava / "model.safetensors")
    refused(llava, "unknown format")
