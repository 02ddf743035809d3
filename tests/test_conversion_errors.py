"""Errors of conversions name the problem and leave no files; an interrupted conversion resumes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from idavlm.cli.main import main
from idavlm.conversion import ConversionError, checkpoint_files, config_files, convert, converter
from tests.released import released, transformers_llava

PROJECTOR = "model.mm_projector.0.weight"
VANISHED = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def llava(tmp_path):
    return released("llava-1.5", tmp_path)


def change(folder: Path, edit) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    edit(weights)
    torch.save(weights, folder / "pytorch_model.bin")


def configure(folder: Path, name: str = "config.json", section: str | None = None, **entries) -> None:
    """Change entries of a configuration file; None deletes one."""
    path = folder / name
    config = json.loads(path.read_text()) if path.exists() else {}
    part = config if section is None else config[section]
    part.update(entries)
    for entry in [entry for entry, value in entries.items() if value is None]:
        del part[entry]
    path.write_text(json.dumps(config))


def refused(folder: Path, message: str, **options) -> None:
    """Converting raises an error of this message and leaves nothing."""
    before = {path: path.lstat().st_mtime_ns for path in folder.parent.rglob("*")}
    with pytest.raises(ConversionError, match=message):
        convert(folder, folder.parent / "out", progress=False, **options)
    assert before == {path: path.lstat().st_mtime_ns for path in folder.parent.rglob("*")}


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


SYSTEMS = ("llava-1.5", "yi-vl", "iaa", "ida-vlm", "transformers-llava")
TOWER = "clip-vision-tiny/config.json"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """System -> folder of a complete checkpoint, to be copied before it is changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {system: released(system, root) for system in SYSTEMS[:-1]}
    transformers_llava(root / "transformers-llava")
    return {**folders, "transformers-llava": root / "transformers-llava"}


def copy_of(folder: Path, to: Path) -> Path:
    """A copy with links to the weights."""
    if to.exists():
        shutil.rmtree(to)
    shutil.copytree(folder, to, copy_function=os.symlink)
    for path in [path for path in to.rglob("*.json") if path.is_symlink()]:
        text = path.read_text()
        path.unlink()
        path.write_text(text)
    return to


BAD_JSON = {
    b"[]": r"expected an object .*found \[\]",
    b"3": "expected an object .*found 3",
    b"null": "expected an object .*found None",
    b'"config"': "expected an object .*found 'config'",
    b"": "invalid JSON",
    b'{"vocab_size": 320,': "invalid JSON",
    b'{"vocab_size": 320, "vocab_size": 640}': "invalid JSON .'vocab_size' occurs twice",
    b'{"a": {"b": 1, "b": 2}}': "invalid JSON .'b' occurs twice",
    b'{"rms_norm_eps": NaN}': "invalid JSON .NaN is no value",
    b'{"a": "\xff"}': "not UTF-8 .byte 7",
    b'{"a": "\\ud800"}': "contains half of a surrogate pair",
    b'{"a": ' + b"[" * 100_000: "invalid JSON",
    b'{"a": ' + b"9" * 5000 + b"}": "invalid JSON",
}
FILES = {
    "config.json": "llava-1.5",
    TOWER: "llava-1.5",
    "clip-vision-tiny/preprocessor_config.json": "llava-1.5",
    "tokenizer_config.json": "llava-1.5",
    "generation_config.json": "llava-1.5",
    "model.safetensors.index.json": "iaa",
    "lora/adapter_config.json": "llava-1.5",
}


@pytest.mark.parametrize("name", FILES)
def test_every_json_file_is_read_strictly(checkpoints, tmp_path, name):
    """Lists, numbers, cut files, keys that occur twice, NaN, folders and broken links are errors that name the file."""
    folder = copy_of(checkpoints[FILES[name]], tmp_path / "case")
    options = {"adapter": folder / "lora"} if name.startswith("lora") else {}
    if options:
        (folder / "lora").mkdir()
        save_file({}, folder / "lora" / "adapter_model.safetensors")
    for contents, message in BAD_JSON.items():
        (folder / name).write_bytes(contents)
        refused(folder, rf"case/{name}: {message}", **options)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    refused(folder, rf"case/{name}: cannot be read .Too many levels of symbolic links", **options)
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, rf"case/{name}: cannot be read .Is a directory", **options)


WRONG = ([], {"a": 1}, "no such value", -(10**30), float("inf"))


TABLES = {
    ("llava-1.5", "config.json", None): {**config_files.LANGUAGE_MODEL, **config_files.LLAVA},
    ("yi-vl", "config.json", None): {**config_files.LANGUAGE_MODEL, **config_files.LLAVA},
    ("iaa", "config.json", None): {**config_files.LANGUAGE_MODEL, **config_files.LLAVA},
    ("iaa", "generation_config.json", None): config_files.GENERATION,
    ("iaa", TOWER, None): config_files.VISION_TOWER,
    ("iaa", "clip-vision-tiny/preprocessor_config.json", None): config_files.IMAGE_PROCESSOR,
    ("ida-vlm", "config.json", None): config_files.QWEN,
    ("ida-vlm", "config.json", "visual"): config_files.QWEN_VISUAL,
    ("transformers-llava", "config.json", None): config_files.TRANSFORMERS_LLAVA,
    ("transformers-llava", "config.json", "text_config"): config_files.LANGUAGE_MODEL,
    ("transformers-llava", "config.json", "vision_config"): config_files.VISION_TOWER,
}


@pytest.mark.parametrize(("system", "name", "section"), TABLES)
def test_every_listed_field_is_checked(checkpoints, tmp_path, system, name, section):
    """A value of the wrong type or out of range is an error that names file, field and value."""
    folder = copy_of(checkpoints[system], tmp_path / "case")
    original = (folder / name).read_text() if (folder / name).exists() else "{}"
    prefix = "" if section is None else rf"{section}\."
    changes_format = {"text_config", "vision_config", "visual"} if section is None else set()
    for field, values in TABLES[system, name, section].items():
        wrong = [value for value in WRONG if not values.accepts(value)]
        assert len(wrong) >= 3, field
        # One value each for the systems whose fields are those of llava-1.5.
        for value in wrong[: 1 if field in changes_format or system in ("yi-vl", "iaa") else None]:
            configure(folder, name, section, **{field: value})
            refused(folder, rf"case/{name}: {prefix}{field}=.*; expected {values.expected[:20]}")
            (folder / name).write_text(original)


CONTRADICTIONS = [
    ("llava-1.5", "config.json", None, "vocab_size", 10**9, r"embed_tokens.weight has shape \(320, 64\)"),
    ("llava-1.5", "config.json", None, "vocab_size", 319, r"embed_tokens.weight has shape \(320, 64\)"),
    ("llava-1.5", "config.json", None, "hidden_size", 128, r"embed_tokens.weight has shape \(320, 64\)"),
    ("llava-1.5", "config.json", None, "intermediate_size", 2**40, r"up_proj.weight has shape \(128, 64\)"),
    ("llava-1.5", "config.json", None, "num_hidden_layers", 10**9, "the weights have 4 layers"),
    ("llava-1.5", "config.json", None, "num_hidden_layers", 3, "the weights have 4 layers"),
    ("iaa", "config.json", None, "num_hidden_layers", 31, "the weights have 32 layers"),
    ("iaa", TOWER, None, "num_hidden_layers", 10**9, "the weights have 3 layers"),
    ("iaa", TOWER, None, "num_hidden_layers", None, "the weights have 3 layers"),
    ("iaa", TOWER, None, "hidden_size", 96, r"patch_embedding.weight has shape \(48, 3, 14, 14\)"),
    ("iaa", TOWER, None, "intermediate_size", None, r"fc1.weight has shape \(96, 48\)"),
    ("iaa", TOWER, None, "patch_size", 7, r"patch_embedding.weight has shape \(48, 3, 14, 14\)"),
    ("ida-vlm", "config.json", None, "vocab_size", 10**9, r"wte.weight has shape \(640, 256\)"),
    ("ida-vlm", "config.json", None, "num_hidden_layers", 10**9, "the weights have 2 layers"),
    ("ida-vlm", "config.json", None, "intermediate_size", 258, r"w1.weight has shape \(128, 256\)"),
    ("ida-vlm", "config.json", "visual", "layers", 10**9, "the weights have 2 layers"),
    ("ida-vlm", "config.json", "visual", "width", 128, r"conv1.weight has shape \(64, 3, 14, 14\)"),
    ("ida-vlm", "config.json", "visual", "n_queries", 10**9, r"query has shape \(16, 256\)"),
    ("ida-vlm", "config.json", "visual", "mlp_ratio", 3.0, r"c_fc.weight has shape \(128, 64\)"),
    ("transformers-llava", "config.json", "text_config", "vocab_size", 10**9, r"shape \(300, 32\)"),
    ("transformers-llava", "config.json", "text_config", "num_hidden_layers", 10**9, "the weights have 2 layers"),
    ("transformers-llava", "config.json", "text_config", "num_hidden_layers", 3, "the weights have 2 layers"),
    ("transformers-llava", "config.json", "text_config", "hidden_size", None, r"shape \(300, 32\)"),
    ("transformers-llava", "config.json", "vision_config", "num_hidden_layers", 4, "the weights have 3 layers"),
    ("transformers-llava", "config.json", "vision_config", "num_labels", 10**9, "is more than 100000"),
]


@pytest.mark.parametrize(("system", "name", "section", "field", "value", "found"), CONTRADICTIONS)
def test_a_field_that_contradicts_the_tensors_is_named_with_them(
    checkpoints, tmp_path, system, name, section, field, value, found
):
    """At once and without memory for large numbers, because nothing is built."""
    folder = copy_of(checkpoints[system], tmp_path / "case")
    configure(folder, name, section, **{field: value})
    started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, rf"case/{name}: .*{field}.*{found}")
    assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500 * 2**10


@pytest.mark.parametrize("size", [10**6, 10**9])
def test_large_images_are_refused_before_they_are_made(checkpoints, tmp_path, size):
    for system, name, section in (("iaa", TOWER, None), ("ida-vlm", "config.json", "visual")):
        folder = copy_of(checkpoints[system], tmp_path / "case")
        configure(folder, name, section, image_size=size)
        refused(folder, rf"case/{name}: (visual\.)?image_size={size}; expected an integer from 1 to 4096")
    folder = copy_of(checkpoints["iaa"], tmp_path / "case")
    configure(folder, "clip-vision-tiny/preprocessor_config.json", size={"shortest_edge": size})
    refused(folder, rf"preprocessor_config\.json: size=.'shortest_edge': {size}.; expected")


def test_fields_that_a_checkpoint_must_have(checkpoints, tmp_path):
    for system, name, section, field in (
        ("llava-1.5", "config.json", None, "num_attention_heads"),
        ("yi-vl", "config.json", None, "rms_norm_eps"),
        ("iaa", TOWER, None, "model_type"),
        ("ida-vlm", "config.json", None, "hidden_size"),
        ("ida-vlm", "config.json", "visual", "image_start_id"),
    ):
        folder = copy_of(checkpoints[system], tmp_path / "case")
        configure(folder, name, section, **{field: None})
        refused(folder, rf"case/{name} has no '(visual\.)?{field}'; expected ")


def test_values_that_transformers_refuses(checkpoints, tmp_path):
    for system, name, section, entries, message in (
        ("llava-1.5", "config.json", None, {"pad_token_id": "x"}, "describes no Llama of transformers"),
        ("llava-1.5", "config.json", None, {"rope_scaling": {"type": "linear"}}, "describes no Llama of transformers"),
        ("llava-1.5", "config.json", None, {"rope_scaling": {"type": "huge"}}, "rope_scaling.type='huge'; expected"),
        ("iaa", TOWER, None, {"model_type": "no such model"}, "describes no vision tower of transformers"),
        ("iaa", TOWER, None, {"num_attention_heads": 5}, "describes no vision tower of transformers"),
        ("ida-vlm", "config.json", "visual", {"heads": 5}, "describes no vision transformer of Qwen-VL"),
        ("ida-vlm", "config.json", None, {"num_attention_heads": 4}, "hidden_size=256 is not num_attention_heads=4"),
        ("ida-vlm", "config.json", None, {"no_bias": False}, "expected no_bias=True"),
        (
            "llava-1.5",
            "config.json",
            None,
            {"mm_projector_type": "mlp0x_gelu"},
            "mm_projector_type='mlp0x_gelu' is not",
        ),
        ("llava-1.5", "config.json", None, {"mm_vision_select_layer": -9}, "feature layer is -9, but .* has 3 layers"),
        ("transformers-llava", "config.json", None, {"image_token_index": 999}, "image_token_index=999 is not a token"),
        ("transformers-llava", "config.json", None, {"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        (
            "transformers-llava",
            "config.json",
            None,
            {"vision_feature_layer": [-1]},
            "vision_feature_layer=.-1.; expected",
        ),
        (
            "transformers-llava",
            "config.json",
            "text_config",
            {"model_type": "none"},
            "describes no LLaVA of transformers",
        ),
        (
            "iaa",
            "generation_config.json",
            None,
            {"eos_token_id": 10**6},
            "eos_token_id has 1000000, which is not a token",
        ),
        ("iaa", "tokenizer_config.json", None, {"bos_token": {"a": 1}}, "has no tokenizer that can be loaded"),
    ):
        folder = copy_of(checkpoints[system], tmp_path / "case")
        configure(folder, name, section, **entries)
        refused(folder, rf"case(/{name})?:? .*{message}|case/{name}: {message}")


def test_an_image_processor_of_another_tower(checkpoints, tmp_path):
    name = "clip-vision-tiny/preprocessor_config.json"
    for entries, message in (
        ({"crop_size": {"height": 42, "width": 42}}, r"pixels of shape \(1, 3, 42, 42\); expected \(1, 3, 56, 56\)"),
        ({"do_center_crop": False}, r"pixels of shape \(1, 3, 56, 112\)"),
        ({"image_std": [0, 0, 0]}, "values that are not finite"),
        ({"rescale_factor": 1e300}, r"rescale_factor=1e\+300; expected a number"),
        ({"resample": ["x"]}, r"resample=\['x'\]; expected an integer from 0 to 5"),
        ({"image_mean": [0.5, 0.5]}, "describes an image processor that fails"),
        ({"image_processor_type": "NoSuchProcessor"}, "describes no image processor of transformers"),
    ):
        folder = copy_of(checkpoints["iaa"], tmp_path / "case")
        configure(folder, name, **entries)
        refused(folder, rf"case/{name}:? .*{message}")


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map=None; expected an object"),
        ({"weight_map": {}}, r"weight_map=\{\}; expected an object"),
        ({"weight_map": ["model.safetensors"]}, "weight_map=.'model.safetensors'.; expected an object"),
        ({"weight_map": {"a": 3}}, "weight_map has 3 for 'a'; expected a file in"),
        ({"weight_map": {"a": ""}}, "weight_map has '' for 'a'"),
        ({"weight_map": {"a": "../outside.safetensors"}}, "weight_map has '../outside.safetensors' for 'a'"),
        ({"weight_map": {"a": "sub/../../outside.safetensors"}}, "weight_map has .*; expected a file in"),
        ({"weight_map": {"a": "/etc/passwd"}}, "weight_map has '/etc/passwd'"),
        ({"weight_map": {"a": "..\\outside.safetensors"}}, "weight_map has .*; expected a file in"),
        ({"weight_map": {"a": "C:\\outside.safetensors"}}, "weight_map has .*; expected a file in"),
        ({"weight_map": {"a": "x" * 5000}}, "names 1 files, of which 1 .x*. are missing"),
        ({"weight_map": {"a": "\0"}}, "names 1 files, of which 1 .* are missing"),
        ({"weight_map": {"a": "clip-vision-tiny"}}, "names 1 files, of which 1 .clip-vision-tiny. are missing"),
    ],
)
def test_an_index_names_files_of_its_folder(checkpoints, tmp_path, index, message):
    folder = copy_of(checkpoints["iaa"], tmp_path / "case")
    shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, rf"case/{INDEX}: {message}")


def test_files_that_cannot_be_read(llava):
    tower, weights = llava / "clip-vision-tiny" / "model.safetensors", llava / "pytorch_model.bin"
    for path, message in (
        (tower, r"model\.safetensors is not a complete safetensors file"),
        (weights, "cannot be read"),
    ):
        path.unlink()
        path.mkdir()
        refused(llava, rf"{path.name}.*{message}.*Is a directory" if path == weights else message)
        path.rmdir()
        path.symlink_to(path)
        refused(llava, message)


def test_the_type_of_every_tensor_is_checked(llava, tmp_path):
    weights = torch.load(llava / "pytorch_model.bin", weights_only=True)
    embeddings = weights["model.embed_tokens.weight"]

    def embed(tensor):
        change(llava, lambda changed: changed.update({"model.embed_tokens.weight": tensor}))

    embed(embeddings.long())
    refused(
        llava, r"of another type: 1 \(language_model\.model\.embed_tokens\.weight int64 instead of floating point\)"
    )
    refused(llava, "int64 instead of floating point", dtype="float32")
    embed(embeddings.to(torch.complex64))
    refused(
        llava, r"pytorch_model\.bin: model\.embed_tokens\.weight is a tensor of type torch\.complex64; expected one of"
    )
    embed(embeddings.float().to_sparse())
    refused(llava, r"model\.embed_tokens\.weight is a tensor of type torch\.sparse_coo")
    embed(embeddings.to(torch.float8_e4m3fn))
    refused(llava, r"float8_e4m3fn instead of floating point")
    convert(llava, tmp_path / "out", dtype="bfloat16", progress=False)
    saved = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")["language_model.model.embed_tokens.weight"]
    assert torch.equal(saved[:320], embeddings.to(torch.float8_e4m3fn).bfloat16())


def test_a_tokenizer_of_another_model(checkpoints, tmp_path):
    folder = copy_of(checkpoints["iaa"], tmp_path / "case")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    longest = max(vocabulary, key=len)
    number = vocabulary[longest]
    vocabulary[longest] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(folder, r"config\.json: vocab_size=320, but the tokenizer has ids up to 500[01]; pass the tokenizer")
    vocabulary[longest] = number - 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(folder, rf"case: its tokenizer gives .* and .* the same id {number - 1}")


def test_the_command_prints_one_line(checkpoints, tmp_path, capsys):
    for system, entries in (
        ("llava-1.5", {"hidden_act": "x" * 10_000}),
        ("iaa", {"pad_token_id": ["\n"] * 1000}),
        ("ida-vlm", {"visual": ["\n"] * 1000}),
        ("transformers-llava", {"image_seq_length": "\n" * 1000}),
    ):
        folder = copy_of(checkpoints[system], tmp_path / "case")
        configure(folder, **entries)
        assert main(["convert", str(folder), str(tmp_path / "out"), "--quiet"]) == 2
        error = capsys.readouterr().err.splitlines()
        (line,) = [line for line in error if line.startswith("idavlm convert: ")]
        assert error[-1] == line
        assert str(folder / "config.json") in line
        assert len(line) < 1000
