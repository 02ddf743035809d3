"""Mutated configurations, index files and weights through ``convert``: a model that runs, or a ConversionError."""

import atexit
import copy
import functools
import json
import os
import random
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers.utils import logging

from idavlm import IDAVLMForConditionalGeneration, IDAVLMProcessor
from idavlm.conversion import ConversionError, convert
from tests.fuzz import fuzz_settings
from tests.released import released, transformers_llava

SYSTEMS = ("llava-1.5", "yi-vl", "iaa", "ida-vlm", "transformers-llava")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1000, -(10**9), 10**6, 10**9, 2**31, 2**63, 10**30, 0.0, 0.5, -0.5, 1e-300),
    *(1e300, float("nan"), float("inf"), -float("inf"), "", "1", "default", "../../x", "/etc/passwd", "\0", "\ud800"),
    *("x" * 5000, [], [1], [None], ["x"], [[]], {}, {"a": 1}, {"model_type": "llama"}, {"type": "linear", "factor": 2}),
)
WEIGHTS = (".safetensors", ".bin", ".tiktoken", ".jinja")
SECONDS = 60
"""Bound of one conversion of a tiny checkpoint; it takes a fraction of a second on a free machine."""
MEGABYTES = 2000
"""Bound of the memory that one conversion adds to the largest so far."""


@functools.cache
def checkpoints() -> dict[str, Path]:
    """System -> folder of a complete tiny checkpoint; that of transformers has a LoRA adapter in ``lora``."""
    root = Path(tempfile.mkdtemp(prefix="idavlm_fuzz_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folders = {system: released(system, root) for system in SYSTEMS[:-1]}
    folders[SYSTEMS[-1]] = root / "transformers-llava"
    llava = transformers_llava(folders[SYSTEMS[-1]])
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, lora_alpha=8, init_lora_weights=False)
    get_peft_model(llava, lora).save_pretrained(folders[SYSTEMS[-1]] / "lora")
    return folders


def json_files(folder: Path) -> list[str]:
    """Paths of the JSON files below ``folder``; ``generation_config.json`` may be new."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.json")}
    return sorted(found | {"generation_config.json"})


def nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to all values inside a JSON value, the value itself included; long lists only in part."""
    children = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [path] + [inner for key, child in list(children)[:400] for inner in nodes(child, (*path, key))]


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy with one entry deleted, replaced or nested."""
    value = copy.deepcopy(value)
    path = rng.choice(nodes(value))
    kind = rng.choice(("delete", "replace", "replace", "replace", "nest", "scale"))
    if not path:
        return rng.choice(VALUES)
    parent = functools.reduce(lambda part, key: part[key], path[:-1], value)
    if kind == "delete":
        del parent[path[-1]]
        return value
    old = parent[path[-1]]
    if kind == "nest":
        parent[path[-1]] = rng.choice(([old], {"value": old}, {path[-1]: old}))
    elif kind == "scale" and isinstance(old, (int, float)):
        parent[path[-1]] = rng.choice((old + 1, old - 1, old * 2, -old, old / 2, str(old), old * 10**7))
    else:
        parent[path[-1]] = rng.choice(VALUES)
    return value


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, or with other bytes somewhere."""
    kind = rng.choice(("cut", "bytes", "prefix", "empty"))
    at = rng.randrange(max(len(data), 1)) if rng.random() < 0.5 else rng.randrange(min(max(len(data), 1), 400))
    if kind == "cut":
        return data[:at]
    if kind == "bytes":
        return data[:at] + rng.randbytes(rng.choice((1, 2, 8))) + data[at + 1 :]
    return b"\xef\xbb\xbf" + data if kind == "prefix" else b""


def mutate_file(path: Path, original: Path, rng: random.Random) -> str:
    """Write a mutated copy of ``original`` to ``path``; returns what was done."""
    data = original.read_bytes() if original.is_file() else b'{"eos_token_id": 2, "bos_token_id": 1}'
    roll = rng.random()
    if roll < 0.03:
        path.mkdir()
        return "a folder"
    if roll < 0.05:
        path.symlink_to(path)
        return "a circular link"
    if path.suffix != ".json" or roll < 0.1:
        path.write_bytes(mutated_bytes(data, rng))
        return "other bytes"
    if roll < 0.13:
        first = data.index(b"{")
        path.write_bytes(data[: first + 1] + b'"x": 1, "x": 2, ' + data[first + 1 :])
        return "a key twice"
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = mutated(value, rng) if isinstance(value, (dict, list)) else value
    path.write_text(json.dumps(value), encoding="utf-8")
    return "other values"


def example(seed: int, folder: Path) -> tuple[str, str]:
    """Convert one mutated checkpoint; returns the outcome and a description. Raises what must not happen."""
    rng = random.Random(seed)
    system = rng.choice(SYSTEMS)
    source = checkpoints()[system]
    files = json_files(source)
    others = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.suffix in WEIGHTS)
    configs = [name for name in files if name.endswith("/config.json") or name == "config.json"]
    name = rng.choice(configs * 4 + files + others)
    copied = folder / "case"
    shutil.copytree(source, copied, copy_function=os.symlink)
    (copied / name).unlink(missing_ok=True)
    done = mutate_file(copied / name, source / name, rng)
    adapter = (
        copied / "lora" if (copied / "lora").is_dir() and (name.startswith("lora") or rng.random() < 0.2) else None
    )
    described = f"seed {seed}: {system}, {name}: {done}"
    started, memory = time.monotonic(), peak_memory()
    try:
        out = convert(copied, folder / "out", adapter=adapter, progress=False)
    except ConversionError as error:
        message = str(error)
        assert str(folder) in message, f"{described}: names no file: {message}"
        assert "\n" not in message, f"{described}: more than one line: {message!r}"
        assert len(message) < 3000, f"{described}: {len(message)} characters: {message[:300]}"
        assert not [path for path in folder.iterdir() if path != copied], f"{described}: left files"
        outcome = "refused"
    else:
        check_runs(out)
        outcome = "converted"
    seconds = time.monotonic() - started
    assert seconds < SECONDS, f"{described}: took {seconds:.0f} s"
    assert peak_memory() - memory < MEGABYTES, f"{described}: took {peak_memory() - memory} MB"
    return outcome, described


def peak_memory() -> int:
    """Largest memory of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


@torch.no_grad()
def check_runs(folder: Path) -> None:
    """The converted model loads and reads an image and text."""
    processor = IDAVLMProcessor.from_pretrained(folder)
    model = IDAVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = processor(images=[Image.new("RGB", (40, 30), "red")], text=f"{processor.image_token} Who is this?")
    logits = model(**inputs).logits
    assert logits.isfinite().all(), "logits are not finite"


def run(count: int, seed: int) -> Counter:
    """Convert ``count`` mutated checkpoints; returns the number of examples of each outcome."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    outcomes: Counter = Counter()
    for number in range(count):
        with tempfile.TemporaryDirectory(prefix="idavlm_fuzz_") as folder:
            try:
                outcome, _ = example(seed + number, Path(folder))
            except Exception as error:
                outcome = f"{type(error).__name__} at seed {seed + number}"
                traceback.print_exc()
            outcomes[outcome] += 1
    return outcomes


@fuzz_settings(25)
@given(seed=st.integers(0, 2**32))
def test_mutated_checkpoints_convert_or_are_refused(seed):
    with tempfile.TemporaryDirectory(prefix="idavlm_fuzz_") as folder:
        example(seed, Path(folder))
