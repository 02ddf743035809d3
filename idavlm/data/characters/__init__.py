"""The embedded default data set: a generator of drawn characters, their pictures and records about them."""

from idavlm.data.characters.activities import ACTIVITIES, Activity
from idavlm.data.characters.builder import build_characters
from idavlm.data.characters.look import CharacterLook
from idavlm.data.characters.pictures import draw_people

__all__ = ["ACTIVITIES", "Activity", "CharacterLook", "build_characters", "draw_people"]
