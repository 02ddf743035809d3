"""Target of the entry point ``lmms_eval.models``."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Manifest of the model ``idavlm``, which takes chat messages."""
    return ModelManifest(model_id="idavlm", chat_class_path="idavlm.evaluation.lmms_eval.model.IDAVLM")
