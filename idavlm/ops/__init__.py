"""Floor 0: functions without parameters; a readable reference stands beside every fast path."""

from idavlm.ops.cross_attention import cross_attention
from idavlm.ops.identity_supervision import IGNORE, NULL, identity_map_loss, identity_patch_targets

__all__ = ["IGNORE", "NULL", "cross_attention", "identity_map_loss", "identity_patch_targets"]
