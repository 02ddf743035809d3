"""Training: ``transformers.Trainer`` with two data sources, training stages and per-module learning rates."""

from idavlm.training.arguments import IDTrainingArguments
from idavlm.training.checkpoints import last_complete_checkpoint
from idavlm.training.distributed import fsdp_wrap_classes, fully_shard_model
from idavlm.training.lora import LoRAArguments, add_lora, load_lora, merge_lora, save_lora
from idavlm.training.non_finite import NonFiniteLossError
from idavlm.training.quantization import QuantizationArguments, dequantize, quantization_config
from idavlm.training.trainer import IDTrainer

__all__ = [
    "IDTrainer",
    "IDTrainingArguments",
    "LoRAArguments",
    "NonFiniteLossError",
    "QuantizationArguments",
    "add_lora",
    "dequantize",
    "fsdp_wrap_classes",
    "fully_shard_model",
    "last_complete_checkpoint",
    "load_lora",
    "merge_lora",
    "quantization_config",
    "save_lora",
]
