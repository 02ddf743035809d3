"""The public API: every public name is importable and documented, and the top level changes only on purpose."""

import importlib
import inspect

import pytest

import idavlm

# Changing this list changes the API: add the change to CHANGELOG.md.
TOP_LEVEL = [
    "CrossAttention",
    "DualDataLoader",
    "IDAVLMConfig",
    "IDAVLMForConditionalGeneration",
    "IDAVLMModel",
    "IDAVLMProcessor",
    "IDFormer",
    "IDTrainer",
    "IDTrainingArguments",
    "IdentityBank",
    "IdentityEmbedding",
    "IdentityProcessor",
    "IdentityTokens",
    "ImageIndexEmbedding",
    "ImageRole",
    "RecordDataset",
    "Resampler",
    "Sample",
    "__version__",
    "add_inner_adaptors",
    "ask",
    "attach_id_former",
    "build_connector",
    "cross_attention",
    "detach_id_former",
    "identity_map_loss",
    "identity_patch_targets",
    "load_adaptors",
    "load_id_former",
    "parse_sample",
    "save_adaptors",
    "save_id_former",
]
# idavlm.cli has commands, not names.
PACKAGES = [
    "conversion",
    "data",
    "datasets",
    "evaluation",
    "experimental",
    "inference",
    "models",
    "modules",
    "ops",
    "training",
    "utils",
]


def public_names() -> list[tuple[str, str]]:
    """(package, name) of every public name."""
    names = [("idavlm", name) for name in idavlm.__all__ if name != "__version__"]
    for package in PACKAGES:
        module = importlib.import_module(f"idavlm.{package}")
        names += [(module.__name__, name) for name in getattr(module, "__all__", ())]
    return names


def own(value: object) -> bool:
    """Whether the docstring of a value is idavlm's business: constants and type aliases have none of their own."""
    return inspect.isclass(value) or inspect.isroutine(value)


def public_methods(cls: type) -> set[str]:
    """Methods and properties that idavlm adds; one that overrides a method of another library is documented there."""
    ours, theirs = set(), set()
    for base in cls.__mro__:
        if base.__module__.startswith("idavlm."):
            ours |= {
                name
                for name, member in vars(base).items()
                if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property))
            }
        else:
            theirs |= set(vars(base))
    return ours - theirs


def test_the_top_level_is_the_checked_in_list():
    assert sorted(idavlm.__all__) == sorted(TOP_LEVEL)
    assert dir(idavlm) == sorted(TOP_LEVEL)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_what_they_export(package):
    module = importlib.import_module(f"idavlm.{package}")
    assert module.__doc__, f"idavlm.{package} has no docstring"
    assert getattr(module, "__all__", None), f"idavlm.{package} has no __all__"
    assert len(module.__all__) == len(set(module.__all__)), "a name is there twice"


@pytest.mark.parametrize("path", [f"{package}.{name}" for package, name in public_names()])
def test_public_names_are_documented(path):
    package, name = path.rsplit(".", 1)
    value = getattr(importlib.import_module(package), name)
    if not own(value):
        return
    # inspect.getdoc would also find the docstring of a base class; a dataclass without one gets its signature.
    doc = value.__doc__
    assert doc, f"{package}.{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{package}.{name} has no docstring but the signature of a dataclass"
    if inspect.isclass(value):
        missing = [method for method in sorted(public_methods(value)) if not inspect.getdoc(getattr(value, method))]
        assert not missing, f"{package}.{name} has methods without a docstring: {', '.join(missing)}"
