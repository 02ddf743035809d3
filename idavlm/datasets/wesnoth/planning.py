"""Planning: identities from characters and palettes, and which of them appear in which image."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from idavlm.datasets.album import AlbumImage, Appearance, IdentitySampler
from idavlm.datasets.wesnoth.recolouring import Recolouring
from idavlm.datasets.wesnoth.sprites import Character, Frame

ORIGINAL_FACTOR = 2
"""Photos of a training identity in the original palette, relative to one in another palette. Identities in the original
palette are fewer, and they look like the characters of the test split."""


@dataclass(frozen=True)
class Variant:
    """An identity: a character in one palette."""

    key: str
    character: Character
    recolouring: Recolouring

    @property
    def is_original(self) -> bool:
        """Whether the palette is the game's own."""
        return self.recolouring == Recolouring()

    def sprite(self, file: str) -> np.ndarray:
        """Return the frame of ``file`` in this palette, ``[H, W, 4]`` uint8."""
        return self.recolouring.apply(next(frame for frame in self.character.frames if frame.file == file).pixels)


def split_characters(characters: Sequence[Character], rng: Random) -> dict[str, list[Character]]:
    """Split characters randomly: about 3/5 for training, 1/5 for test, 1/5 for validation."""
    shuffled = rng.sample(list(characters), len(characters))
    fifth = max(round(len(shuffled) / 5), 1)
    return {"test": shuffled[:fifth], "validation": shuffled[fifth : 2 * fifth], "train": shuffled[2 * fifth :]}


def make_variants(characters: Sequence[Character], num_palettes: int, rng: Random) -> list[Variant]:
    """Return every character in its original palette and in ``num_palettes - 1`` random palettes."""
    return [
        Variant(f"{character.key}-{palette}", character, Recolouring.draw(rng) if palette else Recolouring())
        for character in characters
        for palette in range(num_palettes)
    ]


def variant_sampler(variants: Sequence[Variant]) -> IdentitySampler:
    """Sampler that never draws two variants of one character, and draws only original palettes in half of the draws."""
    everything = [variant.key for variant in variants]
    original = [variant.key for variant in variants if variant.is_original]
    families = {variant.key: variant.character.key for variant in variants}
    pools = [everything] if len(original) == len(everything) else [everything, original]
    return IdentitySampler(everything, families, pools)


def plan_photos(split: str, variants: Sequence[Variant], num_photos: int, rng: Random) -> list[AlbumImage]:
    """Plan photos of each variant, in different frames as long as there are enough of them."""
    plan = []
    for variant in variants:
        frames = variant.character.frames
        count = num_photos * (ORIGINAL_FACTOR if variant.is_original else 1)
        chosen = [frame for _ in range(-(-count // len(frames))) for frame in rng.sample(frames, len(frames))][:count]
        for number, frame in enumerate(chosen):
            plan.append(AlbumImage(f"{split}/photos/{variant.key}-{number}.jpg", (_appearance(variant, frame),)))
    return plan


def plan_scenes(split: str, variants: Sequence[Variant], sizes: Sequence[int], rng: Random) -> list[AlbumImage]:
    """Plan one scene per entry of ``sizes``, its number of variants."""
    by_key, sampler = {variant.key: variant for variant in variants}, variant_sampler(variants)
    plan = []
    for number, size in enumerate(sizes):
        shown = [by_key[key] for key in sampler.draw(size, rng)]
        frames = [_random_frame(variant.character, rng) for variant in shown]
        plan.append(AlbumImage(f"{split}/scenes/{number}.jpg", tuple(map(_appearance, shown, frames))))
    return plan


def _random_frame(character: Character, rng: Random) -> Frame:
    """Draw an activity, then a frame. Most frames show fights; otherwise "fighting" would be the most common answer."""
    activity = rng.choice(sorted({frame.activity for frame in character.frames}))
    return rng.choice([frame for frame in character.frames if frame.activity == activity])


def _appearance(variant: Variant, frame: Frame) -> Appearance:
    return Appearance(variant.key, frame.activity, shot=frame.file)
