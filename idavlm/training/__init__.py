"""Floor 3: training. A thin Trainer over two sources of data."""

from idavlm.experimental.muon import MuonAdamW
from idavlm.training.arguments import IDTrainingArguments
from idavlm.training.trainer import IDTrainer, last_complete_checkpoint

__all__ = ["IDTrainer", "IDTrainingArguments", "MuonAdamW", "last_complete_checkpoint"]
