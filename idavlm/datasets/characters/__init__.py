"""The default data set, which needs no download: drawn characters, images of them, and records."""

from idavlm.datasets.characters.activities import ACTIVITIES, Activity
from idavlm.datasets.characters.builder import build_characters
from idavlm.datasets.characters.images import draw_characters
from idavlm.datasets.characters.look import CharacterLook

__all__ = ["ACTIVITIES", "Activity", "CharacterLook", "build_characters", "draw_characters"]
