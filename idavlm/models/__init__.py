"""Floor 2: whole models in transformers' conventions."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from idavlm.models.boxes import BoxFormat
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.modeling import IDAVLMForConditionalGeneration, IDAVLMOutput
from idavlm.models.processing import IDAVLMProcessor
from idavlm.models.scatter import scatter_image_tokens

AutoConfig.register("idavlm", IDAVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(IDAVLMConfig, IDAVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(IDAVLMConfig, IDAVLMProcessor, exist_ok=True)

__all__ = [
    "BoxFormat",
    "IDAVLMConfig",
    "IDAVLMForConditionalGeneration",
    "IDAVLMOutput",
    "IDAVLMProcessor",
    "scatter_image_tokens",
]
