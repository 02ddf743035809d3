"""Training: ``transformers.Trainer`` with two data sources, training stages and per-module learning rates."""

from idavlm.training.arguments import IDTrainingArguments
from idavlm.training.trainer import IDTrainer, last_complete_checkpoint

__all__ = ["IDTrainer", "IDTrainingArguments", "last_complete_checkpoint"]
