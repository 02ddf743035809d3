"""Train identity attention to find identities that it has never seen, and draw what it attends to.

    python examples/find_identities.py            # three seeds, a few minutes on two CPU cores

An identity is three colours: hair, shirt and trousers. A sample has one reference of each of two identities, and a
scene that shows both and a third identity. There is no vision tower and no language model: the patches are pixels, and
the ID-Former is trained from boxes alone. The identities of the test do not occur in the training. References, scenes
and identity maps are drawn side by side in runs/find_identities/found.png.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from idavlm import IDFormer, ImageRole, identity_patch_targets

IMAGE_SIZE, PATCH_SIZE = 64, 8
GRID_SIZE = (IMAGE_SIZE // PATCH_SIZE, IMAGE_SIZE // PATCH_SIZE)
ROLES = [ImageRole.REFERENCE, ImageRole.REFERENCE, ImageRole.SCENE]  # the images of a sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/find_identities"))
    args = parser.parse_args()

    scores = {"right references": [], "wrong references": [], "untrained": []}
    for seed in range(args.seeds):
        print(f"seed {seed}")
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        identities = rng.uniform(0, 1, (600, 3, 3))  # three RGB colours each
        train_identities, test_identities = identities[:500], identities[500:]

        id_former = IDFormer(
            hidden_size=64,
            num_queries=16,
            num_heads=4,
            vision_hidden_size=PATCH_SIZE * PATCH_SIZE * 3,
            gate="none",
            identity_keys="patches",
            null_token=True,
        )
        test = make_batch(test_identities, 300, rng)
        scores["untrained"].append(evaluate(id_former, test))
        train(id_former, train_identities, args.steps, rng)
        scores["right references"].append(evaluate(id_former, test))
        wrong = make_batch(test_identities, 300, rng, wrong_references=True)
        scores["wrong references"].append(evaluate(id_former, wrong))

    print("\nshare of test identities that are found in their scene (mean over seeds, lowest to highest):")
    for name, values in scores.items():
        print(f"  {name:16s} {statistics.mean(values):.3f}  ({min(values):.3f} to {max(values):.3f})")
    path = args.out / "found.png"
    draw_examples(id_former, make_batch(test_identities, 4, rng), path)
    print(f"\n{path}: two references, the scene, and the scene lit by attention to each reference")


def train(id_former: IDFormer, identities: np.ndarray, steps: int, rng: np.random.Generator) -> None:
    optimizer = torch.optim.AdamW(id_former.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = make_batch(identities, 16, rng)
        _, maps = id_former(batch["patches"], batch["image_roles"], batch["sample_index"], output_attentions=True)
        loss = id_former.identity_map_loss(maps, batch["targets"], batch["image_roles"], batch["sample_index"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % 200 == 0:
            print(f"  step {step + 1:5d}  identity map loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def scene_maps(id_former: IDFormer, batch: dict[str, Tensor]) -> Tensor:
    """Return the identity maps ``[B, P, 3]`` of the scenes: attention to the two references and to null."""
    _, maps = id_former(batch["patches"], batch["image_roles"], batch["sample_index"], output_attentions=True)
    return maps[-1][batch["image_roles"] == ImageRole.SCENE]


def evaluate(id_former: IDFormer, batch: dict[str, Tensor]) -> float:
    """Return the share of identities whose patches attend most to their own reference, summed over the patches."""
    maps, targets = scene_maps(id_former, batch), batch["targets"][batch["image_roles"] == ImageRole.SCENE]
    is_found = []
    for identity in (0, 1):
        attention = (maps * (targets == identity)[..., None]).sum(1)
        is_found.append(attention.argmax(-1) == identity)
    return torch.cat(is_found).float().mean().item()


def make_batch(
    identities: np.ndarray, batch_size: int, rng: np.random.Generator, *, wrong_references: bool = False
) -> dict[str, Tensor]:
    """Draw samples of two references and a scene. Wrong references show two identities that are not in the scene."""
    images, boxes = [], []
    for _ in range(batch_size):
        chosen = identities[rng.choice(len(identities), 5, replace=False)]
        references = chosen[3:] if wrong_references else chosen[:2]
        scene, scene_boxes = draw_image(chosen[:3], rng)
        images += [draw_image(references[:1], rng)[0], draw_image(references[1:], rng)[0], scene]
        boxes.append(scene_boxes[:2])
    images = torch.from_numpy(np.stack(images))
    rows, columns = GRID_SIZE
    patches = images.view(-1, rows, PATCH_SIZE, columns, PATCH_SIZE, 3).transpose(2, 3).flatten(1, 2).flatten(2)
    image_roles = torch.tensor(ROLES * batch_size)
    targets = identity_patch_targets(
        torch.from_numpy(np.concatenate(boxes)),
        box_image=torch.arange(batch_size).repeat_interleave(2) * 3 + 2,
        box_identity=torch.tensor([0, 1] * batch_size),
        image_sizes=torch.full((len(images), 2), IMAGE_SIZE),
        grid_size=GRID_SIZE,
        image_roles=image_roles,
    )
    return {
        "images": images,
        "patches": patches * 2 - 1,
        "image_roles": image_roles,
        "sample_index": torch.arange(batch_size).repeat_interleave(3),
        "targets": targets,
    }


def draw_image(identities: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``identities`` ``[N, 3, RGB]`` side by side in random order. Returns the image and boxes ``[N, 4]``."""
    background = rng.uniform(0, 1, 3) * rng.uniform(0.3, 0.7)
    image = background + rng.normal(0, 0.05, (IMAGE_SIZE, IMAGE_SIZE, 3))
    column_width = IMAGE_SIZE // len(identities)
    boxes = []
    for column, colours in zip(rng.permutation(len(identities)), identities, strict=True):
        width, height = rng.integers(14, 21), rng.integers(32, 57)
        x = column * column_width + rng.integers(0, column_width - width + 1)
        y = rng.integers(0, IMAGE_SIZE - height + 1)
        for part, colour in enumerate(colours):
            top, bottom = y + part * height // 3, y + (part + 1) * height // 3
            image[top:bottom, x : x + width] = colour + rng.normal(0, 0.05, (bottom - top, width, 3))
        boxes.append([x, y, x + width, y + height])
    brightness = rng.uniform(0.8, 1.2)
    return (image * brightness).clip(0, 1).astype(np.float32), np.array(boxes, np.float32)


def draw_examples(id_former: IDFormer, batch: dict[str, Tensor], path: Path) -> None:
    """Draw one row per sample: both references, the scene, and the scene lit by attention to each reference."""
    rows = []
    samples = batch["images"].view(-1, len(ROLES), IMAGE_SIZE, IMAGE_SIZE, 3).numpy()
    for images, identity_map in zip(samples, scene_maps(id_former, batch), strict=True):
        heat = identity_map[:, :2].T.reshape(2, *GRID_SIZE, 1).numpy().repeat(PATCH_SIZE, 1).repeat(PATCH_SIZE, 2)
        tiles = [*images, *(images[2] * (0.15 + 0.85 * heat))]
        rows.append(np.concatenate([np.pad(tile, ((4, 4), (4, 4), (0, 0)), constant_values=1) for tile in tiles], 1))
    sheet = Image.fromarray((np.concatenate(rows) * 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 3, sheet.height * 3), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main()
