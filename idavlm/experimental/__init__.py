"""Tools for training small models from scratch within minutes. Not part of the stable API."""

from idavlm.experimental.muon import MuonAdamW, muon_adamw
from idavlm.experimental.small_models import small_language_model, small_processor, small_vision_tower
from idavlm.experimental.tower_pretraining import pretrain_tower

__all__ = ["MuonAdamW", "muon_adamw", "pretrain_tower", "small_language_model", "small_processor", "small_vision_tower"]
