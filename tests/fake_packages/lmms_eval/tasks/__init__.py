"""Tasks from YAML files, in which ``!function module.name`` is an object of Python."""

import importlib
from pathlib import Path

import yaml


class _Loader(yaml.SafeLoader):
    pass


def _function(loader, node):
    module, _, name = loader.construct_scalar(node).rpartition(".")
    return getattr(importlib.import_module(module), name)


_Loader.add_constructor("!function", _function)


class TaskManager:
    def __init__(self, verbosity="INFO", include_path=None, include_defaults=True, model_name=None):
        files = Path(include_path).glob("*.yaml")
        self.configs = {config["task"]: config for config in (yaml.load(file.open(), _Loader) for file in files)}
