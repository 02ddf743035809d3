"""Registration with transformers' Auto classes that costs nothing until a checkpoint is loaded.

``import idavlm`` must be enough for ``AutoModelForImageTextToText.from_pretrained(checkpoint)``, but it must import
neither torch nor transformers. A finder on ``sys.meta_path`` adds deferred entries to the registries of transformers
right after the modules that hold them were executed. The first use of an entry imports ``idavlm.models``, which
registers the real classes. Importing it earlier would meet modules of transformers that are half imported.
"""

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _DeferredClass:
    """A class of ``idavlm.models`` by name. Its first use imports ``idavlm.models``."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def _load(self) -> type:
        return getattr(importlib.import_module("idavlm.models"), self.__name__)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self._load(), attribute)

    def __call__(self, *args, **kwargs) -> Any:
        return self._load()(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<idavlm.models.{self.__name__}, not imported yet>"


def _register_configs(module: ModuleType) -> None:
    for model_type, name in (("idavlm", "IDAVLMConfig"), ("qwen_vl_vision", "QwenVisionConfig")):
        if model_type not in module.CONFIG_MAPPING:
            module.CONFIG_MAPPING.register(model_type, _DeferredClass(name))


def _register_processors(module: ModuleType) -> None:
    # AutoProcessor finds these entries by the __name__ of the processor, and by the key only where a config exists,
    # which means that idavlm.models has registered the real classes. keys(): the mapping iterates only over these.
    registered = {getattr(key, "__name__", None) for key in module.PROCESSOR_MAPPING.keys()}  # noqa: SIM118
    if "IDAVLMConfig" not in registered:
        module.PROCESSOR_MAPPING.register(_DeferredClass("IDAVLMConfig"), _DeferredClass("IDAVLMProcessor"))


_REGISTRIES = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.processing_auto": _register_processors,
}


class _RegisteringLoader(importlib.abc.Loader):
    """Executes a module with its own loader and then adds our entries to the registry in it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader: inspect and pkgutil ask it for the source.
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _REGISTRIES[module.__name__](module)


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of ``_REGISTRIES`` where the other finders find them, and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTRIES:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _RegistryFinder))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_when_imported() -> None:
    """Register idavlm with transformers: now, where transformers is imported already, or as soon as it is."""
    if not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
    for name, register in _REGISTRIES.items():
        if name in sys.modules:
            register(importlib.import_module(name))  # waits where another thread is still importing it
