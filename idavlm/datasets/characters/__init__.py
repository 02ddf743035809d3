"""The embedded default data set: a generator of drawn characters, their pictures and records about them."""

from idavlm.datasets.characters.activities import ACTIVITIES, Activity
from idavlm.datasets.characters.builder import build_characters
from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.pictures import draw_people

__all__ = ["ACTIVITIES", "Activity", "CharacterLook", "build_characters", "draw_people"]
