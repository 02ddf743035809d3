"""Data sets that build themselves, and the composer of their records."""

from idavlm.datasets.characters import build_characters
from idavlm.datasets.faces import build_faces
from idavlm.datasets.record_composer import RecordOptions
from idavlm.datasets.wesnoth import build_wesnoth

__all__ = ["RecordOptions", "build_characters", "build_faces", "build_wesnoth"]
