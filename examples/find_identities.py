"""Teach an ID-Former to find people it has never seen, and look at where it looks.

    python examples/find_identities.py            # three seeds, under three minutes on two CPU cores

Every person is three colours: hair, shirt and trousers. A sample shows one photo each of two people, and a scene with
both and a stranger. Patches are plain pixels, there is no vision tower and no language model: the identity attention
is all there is, and it learns from boxes alone ("this patch shows person 1, person 2 or nobody"). The people of the
test were never trained on. Writes references, scenes and attention side by side to runs/find_identities/found.png.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from idavlm import IDFormer, ImageRole, identity_patch_targets

SIZE, PATCH = 64, 8
GRID = (SIZE // PATCH, SIZE // PATCH)
ROLES = [ImageRole.REFERENCE, ImageRole.REFERENCE, ImageRole.SCENE]


def draw(people: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture of ``people`` [N, 3 parts, RGB] side by side, in some light, and their boxes [N, 4]."""
    picture = rng.uniform(0, 1, 3) * rng.uniform(0.3, 0.7) + rng.normal(0, 0.05, (SIZE, SIZE, 3))
    width = SIZE // len(people)
    boxes = []
    for place, person in zip(rng.permutation(len(people)), people, strict=True):
        w, h = rng.integers(14, 21), rng.integers(32, 57)
        x, y = place * width + rng.integers(0, width - w + 1), rng.integers(0, SIZE - h + 1)
        for part, colour in enumerate(person):
            top, bottom = y + part * h // 3, y + (part + 1) * h // 3
            picture[top:bottom, x : x + w] = colour + rng.normal(0, 0.05, (bottom - top, w, 3))
        boxes.append([x, y, x + w, y + h])
    light = rng.uniform(0.8, 1.2)
    return (picture * light).clip(0, 1).astype(np.float32), np.array(boxes, np.float32)


def batch(people: np.ndarray, size: int, rng: np.random.Generator, *, wrong: bool = False) -> dict[str, torch.Tensor]:
    """Samples of two photos and a scene. With ``wrong`` the photos show two others, who are not in the scene."""
    pictures, boxes = [], []
    for _ in range(size):
        chosen = people[rng.choice(len(people), 5, replace=False)]
        photographed = chosen[3:] if wrong else chosen[:2]
        scene, where = draw(chosen[:3], rng)
        pictures += [draw(photographed[:1], rng)[0], draw(photographed[1:], rng)[0], scene]
        boxes.append(where[:2])
    pictures = torch.from_numpy(np.stack(pictures))
    patches = pictures.view(-1, GRID[0], PATCH, GRID[1], PATCH, 3).transpose(2, 3).flatten(1, 2).flatten(2)
    roles = torch.tensor(ROLES * size)
    targets = identity_patch_targets(
        torch.from_numpy(np.concatenate(boxes)),
        box_image=torch.arange(size).repeat_interleave(2) * 3 + 2,
        box_identity=torch.tensor([0, 1] * size),
        image_sizes=torch.full((len(pictures), 2), SIZE),
        grid_size=GRID,
        image_roles=roles,
    )
    index = torch.arange(size).repeat_interleave(3)
    return {"pictures": pictures, "patches": patches * 2 - 1, "roles": roles, "index": index, "targets": targets}


@torch.no_grad()
def look(id_former: IDFormer, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """The identity map of the scenes, ``[N, P, 3]``: share of attention for person 1, person 2, nobody."""
    _, maps = id_former(sample["patches"], sample["roles"], sample["index"], output_attentions=True)
    return maps[-1][2::3]


def evaluate(id_former: IDFormer, sample: dict[str, torch.Tensor]) -> float:
    """Share of people in scenes whose patches look more at their own photo than at the other or at nobody."""
    attention, targets = look(id_former, sample), sample["targets"][2::3]
    right = []
    for person in (0, 1):
        on_person = (attention * (targets == person)[..., None]).sum(1)
        right.append(on_person.argmax(-1) == person)
    return torch.cat(right).float().mean().item()


def build() -> IDFormer:
    return IDFormer(
        hidden_size=64,
        num_queries=16,
        num_heads=4,
        vision_hidden_size=PATCH * PATCH * 3,
        gate="none",
        identity_keys="patches",
        null_token=True,
    )


def train(id_former: IDFormer, people: np.ndarray, steps: int, rng: np.random.Generator) -> None:
    optimiser = torch.optim.AdamW(id_former.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        sample = batch(people, 16, rng)
        _, maps = id_former(sample["patches"], sample["roles"], sample["index"], output_attentions=True)
        loss = id_former.identity_map_loss(maps, sample["targets"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"  step {step + 1:5d}  identity loss {loss.item():.3f}", flush=True)


def save_picture(id_former: IDFormer, sample: dict[str, torch.Tensor], path: Path) -> None:
    """A row a sample: photo 1, photo 2, the scene, and the scene lit where it looks at photo 1 and at photo 2."""
    rows = []
    for number, attention in enumerate(look(id_former, sample)):
        pictures = sample["pictures"][3 * number : 3 * number + 3].numpy()
        heat = attention[:, :2].T.reshape(2, *GRID, 1).numpy().repeat(PATCH, 1).repeat(PATCH, 2)
        tiles = [*pictures, *(pictures[2] * (0.15 + 0.85 * heat))]
        rows.append(np.concatenate([np.pad(tile, ((4, 4), (4, 4), (0, 0)), constant_values=1) for tile in tiles], 1))
    sheet = Image.fromarray((np.concatenate(rows) * 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 3, sheet.height * 3), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/find_identities"))
    args = parser.parse_args()
    scores: dict[str, list[float]] = {"right photos": [], "photos of others": [], "untrained": []}
    for seed in range(args.seeds):
        print(f"seed {seed}")
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        everyone = rng.uniform(0, 1, (600, 3, 3))
        known, unseen = everyone[:500], everyone[500:]
        id_former, test = build(), batch(unseen, 300, rng)
        scores["untrained"].append(evaluate(id_former, test))
        train(id_former, known, args.steps, rng)
        scores["right photos"].append(evaluate(id_former, test))
        scores["photos of others"].append(evaluate(id_former, batch(unseen, 300, rng, wrong=True)))
    print("\npeople never trained on who are found in the scene (mean of seeds, lowest to highest):")
    for name, values in scores.items():
        print(f"  {name:16s} {statistics.mean(values):.3f}  ({min(values):.3f} to {max(values):.3f})")
    save_picture(id_former, batch(unseen, 4, rng), args.out / "found.png")
    print(f"\n{args.out / 'found.png'}: photo 1, photo 2, scene, where it looks at photo 1, at photo 2")


if __name__ == "__main__":
    main()
