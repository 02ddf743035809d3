"""Planning of photos and scenes: which identity does what in which image, before any image is drawn."""

from collections.abc import Sequence
from random import Random

from idavlm.datasets.album import AlbumImage, Appearance
from idavlm.datasets.characters.activities import ACTIVITIES

SPLITS = ("train", "test")
"""Training identities and held-out identities. The key of an identity is its split and number, ``"train-17"``."""


def plan_photos(split: str, num_identities: int, num_photos: int, rng: Random) -> list[AlbumImage]:
    """Plan photos of each identity alone, in different activities as long as there are enough of them."""
    plan = []
    for identity in range(num_identities):
        activities = rng.sample(ACTIVITIES, len(ACTIVITIES))
        for photo in range(num_photos):
            appearance = Appearance(f"{split}-{identity}", activities[photo % len(activities)].name)
            plan.append(AlbumImage(f"{split}/photos/{identity:04d}-{photo}.jpg", (appearance,)))
    return plan


def plan_scenes(split: str, num_identities: int, sizes: Sequence[int], rng: Random) -> list[AlbumImage]:
    """Plan one scene per entry of ``sizes``, its number of identities. All identities appear about equally often."""
    plan: list[AlbumImage] = []
    waiting: list[int] = []
    for size in sizes:
        if len(waiting) < size:
            shuffled = rng.sample(range(num_identities), num_identities)
            waiting += [identity for identity in shuffled if identity not in waiting]
        chosen, waiting = waiting[:size], waiting[size:]
        appearances = tuple(
            Appearance(f"{split}-{identity}", activity.name)
            for identity, activity in zip(chosen, rng.sample(ACTIVITIES, size), strict=True)
        )
        plan.append(AlbumImage(f"{split}/scenes/{len(plan):04d}.jpg", appearances))
    return plan
