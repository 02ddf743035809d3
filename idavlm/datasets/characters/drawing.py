"""Drawing an album's pictures to files, on several processes."""

import multiprocessing
import os
import pickle
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from idavlm.datasets.album import Picture
from idavlm.datasets.characters.activities import ACTIVITIES
from idavlm.datasets.characters.general import Still
from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.pictures import draw_people, draw_things
from idavlm.datasets.characters.planning import SPLITS
from idavlm.datasets.jpeg import save_jpeg

Drawing = Picture | Still

_ACTIVITY = {activity.name: activity for activity in ACTIVITIES}


@lru_cache(maxsize=4096)
def look_of(identity: str, seed: int) -> CharacterLook:
    """The look of an identity like ``"train-17"`` in the data set of a seed."""
    split, number = identity.rsplit("-", 1)
    return CharacterLook.from_seed(seed, SPLITS.index(split), int(number))


def draw(picture: Drawing, image_root: Path, *, size: int, seed: int) -> Drawing:
    """Draw a picture, write it under ``image_root`` and return it, with the boxes of its people.

    Its path and ``seed`` decide every detail, so that it does not matter which process draws it, and when.
    """
    rng = np.random.default_rng([seed, zlib.crc32(picture.path.encode())])
    if isinstance(picture, Still):
        image = draw_things(picture.thing, picture.colour, picture.count, picture.place, rng, size)
    else:
        looks = [look_of(person.identity, seed) for person in picture.people]
        image, boxes = draw_people(looks, [_ACTIVITY[person.activity] for person in picture.people], rng, size)
        people = tuple(replace(person, box=box) for person, box in zip(picture.people, boxes, strict=True))
        picture = replace(picture, people=people)
    save_jpeg(image, image_root / picture.path)
    return picture


def draw_all(pictures: Sequence[Drawing], image_root: Path, *, size: int, seed: int, num_workers: int) -> list[Drawing]:
    """Draw pictures with ``num_workers`` processes (this one among them) and return them with boxes, in order."""
    for folder in {(image_root / picture.path).parent for picture in pictures}:
        folder.mkdir(parents=True, exist_ok=True)
    # Forked helpers start at once and need no guarded main module; where there is no fork, this process draws all.
    helpers = num_workers - 1 if sys.platform == "linux" else 0
    context = multiprocessing.get_context("fork") if helpers else None
    shares = [pictures[start :: helpers + 1] for start in range(helpers + 1)]
    running = []
    for share in shares[1:]:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_help, args=(sender, share, image_root, size, seed, os.getpid()), daemon=True)
        process.start()
        sender.close()
        running.append((process, receiver))
    try:
        drawn = [[draw(picture, image_root, size=size, seed=seed) for picture in shares[0]]]
        drawn += [_received(process, receiver) for process, receiver in running]
    finally:
        for process, _ in running:
            process.terminate()
            process.join()
    return [drawn[i % len(drawn)][i // len(drawn)] for i in range(len(pictures))]


def _received(process: BaseProcess, receiver: Connection) -> list[Drawing]:
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join()
        raise RuntimeError(f"a drawing process ended early (exit code {process.exitcode}); see its error.") from None


def _help(sender: Connection, pictures: Sequence[Drawing], image_root: Path, size: int, seed: int, parent: int) -> None:
    """Draw a share of the pictures; stop when the process that asked for it is gone."""
    drawn = []
    for picture in pictures:
        if os.getppid() != parent:
            return
        drawn.append(draw(picture, image_root, size=size, seed=seed))
    sender.send_bytes(pickle.dumps(drawn))
