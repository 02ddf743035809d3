"""Whole models in the conventions of transformers: configuration, model, processor."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from idavlm.models.asking import ask
from idavlm.models.attach import (
    AttachedOutput,
    IdentityInputs,
    attach_id_former,
    detach_id_former,
    load_id_former,
    save_id_former,
)
from idavlm.models.boxes import BoxFormat
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.id_former_class import import_id_former
from idavlm.models.identity_bank import IdentityBank
from idavlm.models.identity_processor import IdentityProcessor
from idavlm.models.image_features import ImageFeatures
from idavlm.models.modeling import (
    IDAVLMForConditionalGeneration,
    IDAVLMModel,
    IDAVLMModelOutput,
    IDAVLMOutput,
)
from idavlm.models.placeholders import scatter_image_tokens
from idavlm.models.processing import IDAVLMProcessor
from idavlm.models.qwen_vision import QwenVisionConfig, QwenVisionModel
from idavlm.models.stored_photos import SelectedIdentities

AutoConfig.register("qwen_vl_vision", QwenVisionConfig, exist_ok=True)
AutoModel.register(QwenVisionConfig, QwenVisionModel, exist_ok=True)
AutoConfig.register("idavlm", IDAVLMConfig, exist_ok=True)
AutoModel.register(IDAVLMConfig, IDAVLMModel, exist_ok=True)
AutoModelForImageTextToText.register(IDAVLMConfig, IDAVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(IDAVLMConfig, IDAVLMProcessor, exist_ok=True)

__all__ = [
    "AttachedOutput",
    "BoxFormat",
    "IDAVLMConfig",
    "IDAVLMForConditionalGeneration",
    "IDAVLMModel",
    "IDAVLMModelOutput",
    "IDAVLMOutput",
    "IDAVLMProcessor",
    "IdentityBank",
    "IdentityInputs",
    "IdentityProcessor",
    "ImageFeatures",
    "QwenVisionConfig",
    "QwenVisionModel",
    "SelectedIdentities",
    "ask",
    "attach_id_former",
    "detach_id_former",
    "import_id_former",
    "load_id_former",
    "save_id_former",
    "scatter_image_tokens",
]
