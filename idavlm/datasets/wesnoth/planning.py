"""Who is in which picture: identities made of characters and palettes, and the pictures planned of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from idavlm.datasets.album import Cast, Person, Picture
from idavlm.datasets.wesnoth.recolouring import Recolouring
from idavlm.datasets.wesnoth.sprites import Character, Frame

PLAIN_SHARE = 2
"""Photos of a training identity in the game's own colours, against one in new colours: there are fewer of the former,
and they look like the characters of the test."""


@dataclass(frozen=True)
class Role:
    """An identity: a character in one palette."""

    key: str
    character: Character
    recolouring: Recolouring

    @property
    def plain(self) -> bool:
        """Whether it has the game's own colours."""
        return self.recolouring == Recolouring()

    def sprite(self, file: str) -> np.ndarray:
        """The frame of that file in this palette, ``[H, W, 4]`` uint8."""
        return self.recolouring.apply(next(one for one in self.character.frames if one.file == file).pixels)


def split_characters(characters: Sequence[Character], rng: Random) -> dict[str, list[Character]]:
    """About three in five characters for training, one in five each for the test and for validation."""
    shuffled = rng.sample(list(characters), len(characters))
    fifth = max(round(len(shuffled) / 5), 1)
    return {"test": shuffled[:fifth], "validation": shuffled[fifth : 2 * fifth], "train": shuffled[2 * fifth :]}


def cast_roles(characters: Sequence[Character], num_palettes: int, rng: Random) -> list[Role]:
    """Every character in its own colours and in ``num_palettes - 1`` others."""
    return [
        Role(f"{character.key}-{palette}", character, Recolouring.draw(rng) if palette else Recolouring())
        for character in characters
        for palette in range(num_palettes)
    ]


def cast_of(roles: Sequence[Role]) -> Cast:
    """Two palettes of one character never meet; half of the meetings are of roles in the game's own colours."""
    everybody, plain = [role.key for role in roles], [role.key for role in roles if role.plain]
    families = {role.key: role.character.key for role in roles}
    return Cast(everybody, families, [everybody] if len(plain) == len(everybody) else [everybody, plain])


def plan_photos(split: str, roles: Sequence[Role], num_photos: int, rng: Random) -> list[Picture]:
    """Photos of each role, in different frames as far as there are enough."""
    plan = []
    for role in roles:
        frames = role.character.frames
        count = num_photos * (PLAIN_SHARE if role.plain else 1)
        chosen = [frame for _ in range(-(-count // len(frames))) for frame in rng.sample(frames, len(frames))][:count]
        for number, frame in enumerate(chosen):
            plan.append(Picture(f"{split}/photos/{role.key}-{number}.jpg", (_person(role, frame),)))
    return plan


def plan_scenes(split: str, roles: Sequence[Role], sizes: Sequence[int], rng: Random) -> list[Picture]:
    """A scene of so many roles for every entry of ``sizes``."""
    by_key, cast = {role.key: role for role in roles}, cast_of(roles)
    plan = []
    for number, size in enumerate(sizes):
        people = [by_key[key] for key in cast.draw(size, rng)]
        frames = [_frame_of_any_activity(role.character, rng) for role in people]
        plan.append(Picture(f"{split}/scenes/{number}.jpg", tuple(map(_person, people, frames))))
    return plan


def _frame_of_any_activity(character: Character, rng: Random) -> Frame:
    """A frame of an activity drawn first: most frames show fights, and the answer should not be "fighting" mostly."""
    activity = rng.choice(sorted({frame.activity for frame in character.frames}))
    return rng.choice([frame for frame in character.frames if frame.activity == activity])


def _person(role: Role, frame: Frame) -> Person:
    return Person(role.key, frame.activity, shot=frame.file)
