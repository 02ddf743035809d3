"""An identity bank against photos in every prompt: images that the vision tower encodes, time, and shortlists.

    python -m benchmarks.identity_bank --model runs/train_idformer/characters/seed-0/with-id-former

Part 1 asks for four identities of two photos each in 100 scenes, one prompt per scene, with the photos in every prompt
and with a bank, and compares the answers. Part 2 fills a bank with the whole cast and ranks it for every scene. The
recall at k is the share of identities of a scene that are among the first k. The cast is drawn (--data-set
characters), or it is units of Battle for Wesnoth (--data-set wesnoth, for a checkpoint that was trained on them). No
model has seen the identities of the scenes. Wesnoth has 78 of them; identities of the training data fill up the cast.
"""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from idavlm import IdentityBank, RecordDataset, ask
from idavlm.datasets import build_characters, build_wesnoth
from idavlm.evaluation import load_checkpoint
from idavlm.utils import describe_machine, markdown_table

SPLITS = {"characters": ("test", "train"), "wesnoth": ("test", "validation", "train")}
"""Splits of each data set whose identities fill up the cast."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="idavlm-tiny", help="checkpoint with an ID-Former")
    parser.add_argument("--data-set", choices=list(SPLITS), default="characters")
    parser.add_argument("--data", type=Path, default=Path("runs/identity_bank"), help="folder of the data")
    parser.add_argument("--cast", type=int, default=200, help="number of identities")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7, help="seed of the data")
    arguments = parser.parse_args()

    model, processor = load_checkpoint(arguments.model)
    if arguments.data_set == "wesnoth":
        folder = build_wesnoth(arguments.data / "wesnoth", num_train_records=4000, seed=arguments.seed)
    else:
        folder = build_characters(
            arguments.data / "characters",
            num_train=8,
            num_test=arguments.cast,
            num_train_scenes=8,
            num_test_scenes=arguments.scenes,
            num_train_records=8,
            num_test_records=4 * arguments.scenes,
            num_general=4,
            num_general_records=4,
            seed=arguments.seed,
        )
    photos, scenes = cast_of(folder, SPLITS[arguments.data_set], arguments.cast)
    scenes = dict(list(scenes.items())[: arguments.scenes])
    print(describe_machine(model.device))
    compare_with_photos(model, processor, photos, list(scenes))
    rank_the_cast(model, processor, photos, scenes)


def cast_of(folder: Path, splits: Iterable[str], count: int) -> tuple[dict[str, list[Path]], dict[Path, set[str]]]:
    """Two photos of each of ``count`` identities, and the identities in each test scene, by the names of their photos.

    The identities come from the records of ``splits``, in this order.
    """
    root = folder / "images"
    photos: dict[str, list[Path]] = {}
    scenes: dict[Path, set[str]] = {}
    for split in splits:
        for sample in RecordDataset(folder / f"{split}.jsonl"):
            identity_of = {}
            for identity in sample.identities:
                key = Path(identity.images[0]).stem.rpartition("-")[0]  # photos are <identity>-<number>.jpg
                identity_of[identity.name] = key
                if len(photos) < count:
                    photos.setdefault(key, [root / image for image in identity.images[:2]])
            for box in sample.boxes if split == "test" else ():
                if box.name in identity_of and "scenes" in box.image:
                    scenes.setdefault(root / box.image, set()).add(identity_of[box.name])
    return photos, scenes


def compare_with_photos(model, processor, photos: dict[str, list[Path]], scenes: list[Path]) -> None:
    """Part 1."""
    cast = dict(list(photos.items())[:4])
    encoded = []
    hook = model.vision_tower.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    rows, answers = [], {}
    for name in ("photos in every prompt", "bank"):
        encoded.clear()
        start = time.perf_counter()
        bank = None
        if name == "bank":
            bank = IdentityBank(model, processor)
            for identity, images in cast.items():
                bank.add(identity, images)
        answers[name] = [ask_about(model, processor, scene, cast, bank) for scene in scenes]
        rows.append([name, sum(encoded), f"{time.perf_counter() - start:.1f} s"])
    hook.remove()
    equal = sum(a == b for a, b in zip(*answers.values(), strict=True))
    print(f"\n{len(scenes)} scenes, {len(cast)} identities of two photos; {equal} of {len(scenes)} answers are equal\n")
    print(markdown_table(["references", "images encoded", "time"], rows))


def ask_about(model, processor, scene: Path, cast: dict[str, list[Path]], bank: IdentityBank | None) -> str:
    question = f"\nWhere is {next(iter(cast))}?"
    return ask(model, processor, question, images=[scene], identities=cast, bank=bank, max_new_tokens=12)


def rank_the_cast(model, processor, photos: dict[str, list[Path]], scenes: dict[Path, set[str]]) -> None:
    """Part 2."""
    bank = IdentityBank(model, processor)
    for identity, images in photos.items():
        bank.add(identity, images)
    ranks = []
    start = time.perf_counter()
    for scene, shown in scenes.items():
        order = [name for name, _ in bank.shortlist(scene, count=len(bank))]
        ranks += [order.index(name) for name in shown]
    seconds = (time.perf_counter() - start) / len(scenes)
    ranks = torch.tensor(ranks)
    print(f"\ncast of {len(bank)}; {len(scenes)} scenes, {len(ranks)} identities; {1000 * seconds:.0f} ms per scene\n")
    recalls = [[k, f"{(ranks < k).float().mean():.3f}", f"{k / len(bank):.3f}"] for k in (5, 10, 20)]
    print(markdown_table(["k", "recall at k", "chance"], recalls))


if __name__ == "__main__":
    main()
