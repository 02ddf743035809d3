"""Drawing the planned images to files, with several processes."""

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

from idavlm.datasets.album import AlbumImage
from idavlm.datasets.characters.activities import ACTIVITIES
from idavlm.datasets.characters.general import GeneralImage
from idavlm.datasets.characters.images import draw_characters, draw_objects
from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.planning import SPLITS
from idavlm.datasets.dataset_folder import save_jpeg

PlannedImage = AlbumImage | GeneralImage

_ACTIVITY = {activity.name: activity for activity in ACTIVITIES}


@lru_cache(maxsize=4096)
def look_of(identity: str, seed: int) -> CharacterLook:
    """Return the look of an identity, such as ``"train-17"``, in the data set with the given seed."""
    split, number = identity.rsplit("-", 1)
    return CharacterLook.from_seed(seed, SPLITS.index(split), int(number))


def draw(plan: PlannedImage, image_root: Path, *, size: int, seed: int) -> PlannedImage:
    """Draw an image, write it below ``image_root``, and return its plan with the boxes of the identities.

    The image depends only on its path, its plan and ``seed``, so any process can draw it at any time.
    """
    rng = np.random.default_rng([seed, zlib.crc32(plan.path.encode())])
    if isinstance(plan, GeneralImage):
        image = draw_objects(plan.thing, plan.colour, plan.count, plan.place, rng, size)
    else:
        looks = [look_of(appearance.identity, seed) for appearance in plan.appearances]
        activities = [_ACTIVITY[appearance.activity] for appearance in plan.appearances]
        image, boxes = draw_characters(looks, activities, rng, size)
        appearances = tuple(
            replace(appearance, box=box) for appearance, box in zip(plan.appearances, boxes, strict=True)
        )
        plan = replace(plan, appearances=appearances)
    save_jpeg(image, image_root / plan.path)
    return plan


def draw_all(
    plans: Sequence[PlannedImage], image_root: Path, *, size: int, seed: int, num_workers: int
) -> list[PlannedImage]:
    """Draw images with ``num_workers`` processes, including this one, and return the plans with boxes, in order."""
    for folder in {(image_root / plan.path).parent for plan in plans}:
        folder.mkdir(parents=True, exist_ok=True)
    # Forked processes start at once and need no guarded main module. Without fork, this process draws all images.
    num_forks = num_workers - 1 if sys.platform == "linux" else 0
    context = multiprocessing.get_context("fork") if num_forks else None
    shares = [plans[start :: num_forks + 1] for start in range(num_forks + 1)]
    running = []
    for share in shares[1:]:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_draw_share, args=(sender, share, image_root, size, seed, os.getpid()), daemon=True
        )
        process.start()
        sender.close()
        running.append((process, receiver))
    try:
        drawn = [[draw(plan, image_root, size=size, seed=seed) for plan in shares[0]]]
        drawn += [_receive(process, receiver) for process, receiver in running]
    finally:
        for process, _ in running:
            process.terminate()
            process.join()
    return [drawn[i % len(drawn)][i // len(drawn)] for i in range(len(plans))]


def _receive(process: BaseProcess, receiver: Connection) -> list[PlannedImage]:
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a drawing process ended early (exit code {process.exitcode}); see its error above."
        ) from None


def _draw_share(
    sender: Connection, plans: Sequence[PlannedImage], image_root: Path, size: int, seed: int, parent: int
) -> None:
    """Draw a share of the images in a forked process. Stop if the parent process has ended."""
    drawn = []
    for plan in plans:
        if os.getppid() != parent:
            return
        drawn.append(draw(plan, image_root, size=size, seed=seed))
    sender.send_bytes(pickle.dumps(drawn))
