"""``nn.Module``s with parameters of their own: the ID-Former, connectors, inner adaptors and their building blocks."""

from idavlm.modules.attention import CrossAttention, FeedForward
from idavlm.modules.connectors import build_connector
from idavlm.modules.id_former import IdentityLayer, IdentityTokens, IDFormer
from idavlm.modules.identity_embedding import IdentityEmbedding, ImageIndexEmbedding
from idavlm.modules.identity_map import NULL, identities_of_scenes, identity_map_loss, identity_patch_targets
from idavlm.modules.inner_adaptor import (
    InnerAdaptor,
    add_inner_adaptors,
    load_adaptors,
    save_adaptors,
    train_workflow,
    use_workflow,
)
from idavlm.modules.resampler import Resampler
from idavlm.modules.residual_id_former import ImageTokens, ResidualIDFormer

__all__ = [
    "NULL",
    "CrossAttention",
    "FeedForward",
    "IDFormer",
    "IdentityEmbedding",
    "IdentityLayer",
    "IdentityTokens",
    "ImageIndexEmbedding",
    "ImageTokens",
    "InnerAdaptor",
    "Resampler",
    "ResidualIDFormer",
    "add_inner_adaptors",
    "build_connector",
    "identities_of_scenes",
    "identity_map_loss",
    "identity_patch_targets",
    "load_adaptors",
    "save_adaptors",
    "train_workflow",
    "use_workflow",
]
