"""idavlm: identity-aware vision-language models.

The public names are imported on first use: ``import idavlm`` imports neither torch nor transformers. It registers the
classes of idavlm with the Auto classes of transformers, so these load idavlm checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from idavlm._auto_classes import register_when_imported

__version__ = "0.1.0"

_EXPORTS = {
    "idavlm.data": ("DualDataLoader", "RecordDataset", "Sample", "parse_sample"),
    "idavlm.models": (
        "IDAVLMConfig",
        "IDAVLMForConditionalGeneration",
        "IDAVLMModel",
        "IDAVLMProcessor",
        "IdentityBank",
        "IdentityProcessor",
        "ask",
        "attach_id_former",
        "detach_id_former",
        "load_id_former",
        "save_id_former",
    ),
    "idavlm.modules": (
        "CrossAttention",
        "IDFormer",
        "IdentityEmbedding",
        "IdentityTokens",
        "ImageIndexEmbedding",
        "Resampler",
        "add_inner_adaptors",
        "build_connector",
        "identity_map_loss",
        "identity_patch_targets",
        "load_adaptors",
        "save_adaptors",
    ),
    "idavlm.ops": ("cross_attention",),
    "idavlm.training": ("IDTrainer", "IDTrainingArguments"),
    "idavlm.utils": ("ImageRole",),
}
_HOME_OF = {name: package for package, names in _EXPORTS.items() for name in names}

__all__ = [
    "CrossAttention",
    "DualDataLoader",
    "IDAVLMConfig",
    "IDAVLMForConditionalGeneration",
    "IDAVLMModel",
    "IDAVLMProcessor",
    "IDFormer",
    "IDTrainer",
    "IDTrainingArguments",
    "IdentityBank",
    "IdentityEmbedding",
    "IdentityProcessor",
    "IdentityTokens",
    "ImageIndexEmbedding",
    "ImageRole",
    "RecordDataset",
    "Resampler",
    "Sample",
    "__version__",
    "add_inner_adaptors",
    "ask",
    "attach_id_former",
    "build_connector",
    "cross_attention",
    "detach_id_former",
    "identity_map_loss",
    "identity_patch_targets",
    "load_adaptors",
    "load_id_former",
    "parse_sample",
    "save_adaptors",
    "save_id_former",
]

if TYPE_CHECKING:
    from idavlm.data import DualDataLoader, RecordDataset, Sample, parse_sample
    from idavlm.models import (
        IDAVLMConfig,
        IDAVLMForConditionalGeneration,
        IDAVLMModel,
        IDAVLMProcessor,
        IdentityBank,
        IdentityProcessor,
        ask,
        attach_id_former,
        detach_id_former,
        load_id_former,
        save_id_former,
    )
    from idavlm.modules import (
        CrossAttention,
        IdentityEmbedding,
        IdentityTokens,
        IDFormer,
        ImageIndexEmbedding,
        Resampler,
        add_inner_adaptors,
        build_connector,
        identity_map_loss,
        identity_patch_targets,
        load_adaptors,
        save_adaptors,
    )
    from idavlm.ops import cross_attention
    from idavlm.training import IDTrainer, IDTrainingArguments
    from idavlm.utils import ImageRole


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'idavlm' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_imported()
