"""Inner adaptors for any transformers decoder language model."""

from idavlm.modules.inner_adaptor.adaptor import (
    InnerAdaptor,
    add_inner_adaptors,
    inner_adaptor_of,
    new_inner_adaptor,
)
from idavlm.modules.inner_adaptor.saving import load_adaptors, save_adaptors
from idavlm.modules.inner_adaptor.workflow import WorkflowMixin, takes_workflow, train_workflow, use_workflow

__all__ = [
    "InnerAdaptor",
    "WorkflowMixin",
    "add_inner_adaptors",
    "inner_adaptor_of",
    "load_adaptors",
    "new_inner_adaptor",
    "save_adaptors",
    "takes_workflow",
    "train_workflow",
    "use_workflow",
]
