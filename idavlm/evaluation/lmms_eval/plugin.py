"""What the entry point ``lmms_eval.models`` gives."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The model ``idavlm``, read in chat messages."""
    return ModelManifest(model_id="idavlm", chat_class_path="idavlm.evaluation.lmms_eval.model.IDAVLM")
