"""Inner adaptors for any transformers decoder language model."""

from idavlm.modules.inner_adaptor.adding import InnerAdaptor, add_inner_adaptors, new_inner_adaptor
from idavlm.modules.inner_adaptor.routing import WorkflowMixin, takes_workflow
from idavlm.modules.inner_adaptor.saving import load_adaptors, save_adaptors

__all__ = [
    "InnerAdaptor",
    "WorkflowMixin",
    "add_inner_adaptors",
    "load_adaptors",
    "new_inner_adaptor",
    "save_adaptors",
    "takes_workflow",
]
