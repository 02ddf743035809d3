"""Inner adaptors for any transformers decoder language model."""

from idavlm.modules.inner_adaptor.adding import InnerAdaptor, add_inner_adaptors, new_inner_adaptor
from idavlm.modules.inner_adaptor.routing import inner_adaptor_of, takes_workflow
from idavlm.modules.inner_adaptor.saving import load_adaptors, save_adaptors

__all__ = [
    "InnerAdaptor",
    "add_inner_adaptors",
    "inner_adaptor_of",
    "load_adaptors",
    "new_inner_adaptor",
    "save_adaptors",
    "takes_workflow",
]
