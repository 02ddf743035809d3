"""Registration in VLMEvalKit, whose registries are a dictionary of models and a list of data set classes."""

import vlmeval.dataset
from vlmeval.config import supported_VLM

from idavlm.evaluation.vlmevalkit.benchmark import IdentityBenchmark
from idavlm.evaluation.vlmevalkit.model import IDAVLM


def register() -> None:
    """Add the model ``idavlm`` and the data sets ``idavlm_<task>`` to those that VLMEvalKit knows."""
    supported_VLM["idavlm"] = IDAVLM
    if IdentityBenchmark not in vlmeval.dataset.DATASET_CLASSES:
        vlmeval.dataset.DATASET_CLASSES.append(IdentityBenchmark)
        vlmeval.dataset.SUPPORTED_DATASETS.extend(IdentityBenchmark.supported_datasets())
