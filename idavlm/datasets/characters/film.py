"""A drawn film with known truth: characters walk through scenes, stop, do something, and leave; cuts between shots."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from idavlm.datasets.album import PixelBox
from idavlm.datasets.characters.activities import ACTIVITIES, Activity
from idavlm.datasets.characters.body import figure
from idavlm.datasets.characters.drawing import look_of
from idavlm.datasets.characters.images import Placed, draw_characters, in_light, paste_sketch, tight_box
from idavlm.datasets.characters.places import PLACES, VARIANTS, background

SHOT_SECONDS = (4.0, 10.0)
"""Shortest and longest shot."""

MAX_ACTORS = 4
"""Largest number of characters in a shot."""


@dataclass(frozen=True, eq=False)
class FilmFrame:
    """One image of a drawn film.

    Attributes:
        time: seconds.
        shot: number of the shot.
        image: the image, RGB.
        boxes: box of each character that is in the image, clipped to it, with the visible share of the figure
            (what is outside of the image is not visible; what others hide is).
    """

    time: float
    shot: int
    image: Image.Image
    boxes: dict[str, tuple[PixelBox, float]]


@dataclass(frozen=True)
class _Actor:
    """A character in one shot. Positions are shares of the width of the image."""

    identity: str
    start: float
    goal: float
    speed: float
    delay: float
    activity: Activity
    ground: float
    height: float
    seed: int


def draw_film(
    identities: Sequence[str], *, seconds: float, images_per_second: float, size: int = 256, seed: int = 0
) -> Iterator[FilmFrame]:
    """Draw a film of characters.

    In each shot, up to four characters stand or walk at one place. Who walks, walks to a point inside or outside of the
    image, and does something there.

    Args:
        identities: keys of the characters as in the characters data set, such as ``"test-3"``.
        seconds: length of the film.
        images_per_second: number of images per second.
        size: width and height of the images.
        seed: seed of all random choices, also of the looks.

    Yields:
        The images in order.
    """
    rng = np.random.default_rng([seed, 77])
    time, end_of_shot, shot = 0.0, 0.0, -1
    actors: list[_Actor] = []
    for number in range(round(seconds * images_per_second)):
        time = number / images_per_second
        if time >= end_of_shot:
            shot += 1
            start_of_shot, end_of_shot = time, time + rng.uniform(*SHOT_SECONDS)
            actors = _cast_of_shot(identities, rng)
            place, variant = tuple(PLACES)[rng.integers(len(PLACES))], int(rng.integers(VARIANTS))
            seed_of_shot = int(rng.integers(2**31))
            scenery = background(place, variant, size, np.random.default_rng(seed_of_shot))
        yield _draw(scenery.copy(), actors, time - start_of_shot, shot, time, size, seed, seed_of_shot)


def draw_photos(identity: str, folder: Path, *, count: int, size: int = 256, seed: int = 0) -> list[Path]:
    """Draw reference photos of one character of a film, each in another activity."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        rng = np.random.default_rng([seed, 78, number, *identity.encode()])
        activity = ACTIVITIES[int(rng.integers(len(ACTIVITIES)))]
        image, _ = draw_characters([look_of(identity, seed)], [activity], rng, size)
        files.append(folder / f"{number + 1}.jpg")
        image.save(files[-1], quality=95)
    return files


def _cast_of_shot(identities: Sequence[str], rng: np.random.Generator) -> list[_Actor]:
    """Choose who is in a shot, and their ways."""
    count = int(rng.choice(MAX_ACTORS + 1, p=[0.1, 0.25, 0.3, 0.2, 0.15]))
    chosen = rng.permutation(len(identities))[:count]
    columns = rng.permutation(max(count, 1))
    actors = []
    for number, column in zip(chosen, columns, strict=False):
        goal = (column + 0.5) / count + rng.uniform(-0.1, 0.1) / count
        way = rng.choice(["stays", "comes", "leaves"], p=[0.4, 0.35, 0.25])
        outside = -0.25 if rng.random() < 0.5 else 1.25
        start = {"stays": goal, "comes": outside, "leaves": goal}[str(way)]
        actors.append(
            _Actor(
                identity=identities[int(number)],
                start=float(start),
                goal=float(outside if way == "leaves" else goal),
                speed=float(rng.uniform(0.15, 0.35)),
                delay=float(rng.uniform(0, 3) if way != "stays" else 0),
                activity=ACTIVITIES[int(rng.integers(len(ACTIVITIES)))],
                ground=float(rng.uniform(0.86, 0.97)),
                height=float(rng.uniform(0.56, 0.74)),
                seed=int(rng.integers(2**31)),
            )
        )
    return actors


def _draw(
    image: Image.Image,
    actors: Sequence[_Actor],
    time: float,
    shot: int,
    film_time: float,
    size: int,
    seed: int,
    light: int,
) -> FilmFrame:
    boxes = {}
    for actor in sorted(actors, key=lambda actor: actor.ground):
        way = actor.goal - actor.start
        walked = min(max(time - actor.delay, 0) * actor.speed, abs(way))
        x = actor.start + np.sign(way) * walked
        walks = 0 < walked < abs(way)
        activity = _walking(walked, way) if walks else actor.activity
        sketch = figure(look_of(actor.identity, seed), activity, np.random.default_rng(actor.seed))
        scale = actor.height * size / -sketch.bounds()[1]
        drawn = paste_sketch(image, Placed(sketch, scale, float(x * size), actor.ground * size, bool(way < 0)))
        left, top, right, bottom = drawn.layer.getchannel("A").getbbox()
        whole = (right - left) * (bottom - top)
        inside = max(min(right + drawn.left, size) - max(left + drawn.left, 0), 0)
        visible = inside * (bottom - top) / whole
        if visible > 0.05:
            boxes[actor.identity] = (tight_box(drawn, size), float(visible))
    return FilmFrame(film_time, shot, in_light(image, np.random.default_rng(light)), boxes)


def _walking(walked: float, way: float) -> Activity:
    """The pose after a way of ``walked`` image widths: legs and arms swing."""
    swing = float(np.sin(walked * 30))
    standing = Activity("walking", loose=0.0, look=0.8)
    return replace(
        standing,
        feet=((-0.1 - 0.45 * swing, 1.0 - 0.12 * max(swing, 0)), (0.1 + 0.45 * swing, 1.0 - 0.12 * max(-swing, 0))),
        hands=((-0.35 + 0.5 * swing, 0.85), (0.35 - 0.5 * swing, 0.85)),
        knees=(-1, -1),
    )
