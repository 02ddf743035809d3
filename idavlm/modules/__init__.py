"""Floor 1: ``nn.Module``s with parameters of their own."""

from idavlm.modules.connectors import build_connector
from idavlm.modules.cross_attention import CrossAttention
from idavlm.modules.id_former import IdentityTokens, IDFormer
from idavlm.modules.identity_layer import IdentityLayer
from idavlm.modules.image_index_embedding import ImageIndexEmbedding
from idavlm.modules.inner_adaptor import InnerAdaptor, add_inner_adaptors, load_adaptors, save_adaptors
from idavlm.modules.resampler import Resampler

__all__ = [
    "CrossAttention",
    "IDFormer",
    "IdentityLayer",
    "IdentityTokens",
    "ImageIndexEmbedding",
    "InnerAdaptor",
    "Resampler",
    "add_inner_adaptors",
    "build_connector",
    "load_adaptors",
    "save_adaptors",
]
