"""Floor 1: ``nn.Module``s with parameters of their own."""

from idavlm.modules.connectors import build_connector
from idavlm.modules.cross_attention import CrossAttention
from idavlm.modules.id_former import IdentityTokens, IDFormer
from idavlm.modules.identity_layer import IdentityLayer
from idavlm.modules.picture_slots import PictureSlots
from idavlm.modules.resampler import Resampler

__all__ = [
    "CrossAttention",
    "IDFormer",
    "IdentityLayer",
    "IdentityTokens",
    "PictureSlots",
    "Resampler",
    "build_connector",
]
