"""Who does what in which picture, before any is drawn."""

from collections.abc import Sequence
from random import Random

from idavlm.datasets.album import Person, Picture
from idavlm.datasets.characters.activities import ACTIVITIES

SPLITS = ("train", "test")
"""Identities to train on, and identities held out. An identity is ``"train-17"``, the eighteenth of its split."""


def plan_photos(split: str, num_identities: int, num_photos: int, rng: Random) -> list[Picture]:
    """Photos of each identity alone, in different activities as far as there are enough."""
    plan = []
    for identity in range(num_identities):
        activities = rng.sample(ACTIVITIES, len(ACTIVITIES))
        for photo in range(num_photos):
            person = Person(f"{split}-{identity}", activities[photo % len(activities)].name)
            plan.append(Picture(f"{split}/photos/{identity:04d}-{photo}.jpg", (person,)))
    return plan


def plan_scenes(split: str, num_identities: int, sizes: Sequence[int], rng: Random) -> list[Picture]:
    """A scene of so many people for every entry of ``sizes``; everybody appears about equally often."""
    plan: list[Picture] = []
    waiting: list[int] = []
    for size in sizes:
        if len(waiting) < size:
            waiting += [one for one in rng.sample(range(num_identities), num_identities) if one not in waiting]
        chosen, waiting = waiting[:size], waiting[size:]
        people = zip(chosen, rng.sample(ACTIVITIES, size), strict=True)
        persons = tuple(Person(f"{split}-{one}", activity.name) for one, activity in people)
        plan.append(Picture(f"{split}/scenes/{len(plan):04d}.jpg", persons))
    return plan
