"""Models by name, from the entry points ``lmms_eval.models``."""

import importlib
from importlib.metadata import entry_points


def get_model(model_name, force_simple=False):
    for point in entry_points(group="lmms_eval.models"):
        manifest = point.load()()
        if manifest.model_id == model_name:
            module, _, name = manifest.chat_class_path.rpartition(".")
            return getattr(importlib.import_module(module), name)
    raise ValueError(model_name)
