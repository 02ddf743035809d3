"""The import of idavlm: what it loads, its lazy names, and its registration with the Auto classes of transformers."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import idavlm
from tests.small_models import small_model, small_processor
from tests.test_public_api import PACKAGES

ROOT = Path(__file__).parent.parent


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A folder of a small model with its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = small_processor()
    small_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("code", ["import idavlm", "from idavlm import IDFormer, cross_attention, build_connector"])
def test_import_loads_neither_transformers_nor_triton(code):
    loaded = run(f"{code}; import sys; print(*sys.modules)").split()
    assert not {"transformers", "triton", "timm", "peft", "deepspeed", "flash_attn", "torch._dynamo"} & set(loaded)
    assert ("torch" in loaded) is ("from" in code), "import idavlm alone must not import torch"


def test_extras_are_optional():
    """The package, all of its subpackages and the commands import without the packages of the extras."""
    hidden = ("peft", "timm", "matplotlib", "deepspeed", "flash_attn", "sentencepiece", "lmms_eval", "vlmeval")
    imports = "".join(f"import idavlm.{package}\n" for package in [*PACKAGES, "cli.main"])
    run(f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n{imports}")


def test_names_are_lazy():
    assert set(idavlm._HOME_OF) | {"__version__"} == set(idavlm.__all__)
    for name, home in idavlm._HOME_OF.items():
        assert getattr(idavlm, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match=r"no attribute 'IDFomer'; it offers .*IDFormer"):
        _ = idavlm.IDFomer


@pytest.mark.parametrize(
    ("imports", "auto", "expected"),
    [
        ("import idavlm; from transformers import {auto}", "AutoConfig", "IDAVLMConfig"),
        ("import idavlm; from transformers import {auto}", "AutoProcessor", "IDAVLMProcessor"),
        (
            "import idavlm; from transformers import {auto}",
            "AutoModelForImageTextToText",
            "IDAVLMForConditionalGeneration",
        ),
        (
            "from transformers import GenerationMixin, {auto}; import idavlm",
            "AutoModelForImageTextToText",
            "IDAVLMForConditionalGeneration",
        ),
    ],
)
def test_importing_idavlm_registers_the_auto_classes(checkpoint, imports, auto, expected):
    """In a process of its own: no class may depend on another one having been imported or used before."""
    code = f"{imports.format(auto=auto)}\nimport sys\nassert 'idavlm.models' not in sys.modules"
    assert run(f"{code}\nprint(type({auto}.from_pretrained(sys.argv[1])).__name__)", checkpoint).split() == [expected]


def test_a_pipeline_loads_a_checkpoint_and_a_processor_loads_without_a_model(checkpoint, tmp_path):
    small_processor().save_pretrained(tmp_path)
    code = """
import sys, idavlm, transformers
print(type(transformers.AutoProcessor.from_pretrained(sys.argv[2])).__name__)
print(type(transformers.pipeline('image-text-to-text', model=sys.argv[1]).model).__name__)
"""
    assert run(code, checkpoint, str(tmp_path)).split() == ["IDAVLMProcessor", "IDAVLMForConditionalGeneration"]


def test_registration_leaves_the_modules_as_they_are():
    """Modules keep their loader, a second import adds no second finder, and the real classes replace the deferred ones.

    Threads that import the registries at the same time must not disturb this.
    """
    run(
        """
import importlib, inspect, sys, threading
import idavlm, transformers
from idavlm import _auto_classes
threads = [
    threading.Thread(target=importlib.import_module, args=(f"transformers.models.auto.{name}",))
    for name in ("configuration_auto", "processing_auto", "modeling_auto") * 2
]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
from transformers.models.auto import configuration_auto
assert not isinstance(configuration_auto.__loader__, _auto_classes._RegisteringLoader)
assert configuration_auto.__spec__.loader is configuration_auto.__loader__
assert "class AutoConfig" in inspect.getsource(configuration_auto)
importlib.reload(idavlm)
assert sum(isinstance(finder, _auto_classes._RegistryFinder) for finder in sys.meta_path) == 1
deferred = configuration_auto.CONFIG_MAPPING["idavlm"]
assert deferred.__name__ == "IDAVLMConfig" and not isinstance(deferred, type)
assert deferred.model_type == "idavlm"  # the first use imports idavlm.models
assert configuration_auto.CONFIG_MAPPING["idavlm"] is idavlm.IDAVLMConfig
idavlm._auto_classes.register_when_imported()
assert configuration_auto.CONFIG_MAPPING["idavlm"] is idavlm.IDAVLMConfig
"""
    )
