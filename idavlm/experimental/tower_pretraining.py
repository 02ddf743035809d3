"""Pretraining of a vision tower from the boxes of records: who is in a box, and what its label says."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idavlm.data import Sample
from idavlm.modules import identity_patch_targets
from idavlm.utils import check_positive

TEMPERATURE = 0.1
IMAGES_PER_INDIVIDUAL = 4
NO_LABEL = -100


@dataclass(frozen=True)
class Appearance:
    """An individual in an image: its number, its box in pixels, and the number of the box's label."""

    individual: int
    box: tuple[float, float, float, float]
    label: int = NO_LABEL


def find_appearances(samples: Iterable[Sample]) -> tuple[dict[tuple, list[Appearance]], list[str]]:
    """Find out from training records which boxes show the same individual.

    A record says that its reference photos of Kate and its boxes of Kate show one individual. A photo is often an image
    with a box in other records. Put together, this numbers the individuals, although names differ between records.

    Returns:
        The appearances in each image, by ``(image_root, path)``, and all labels.
    """
    parent: dict[tuple, tuple] = {}

    def representative(key: tuple) -> tuple:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    label_of: dict[tuple, str] = {}  # by image root, path and box
    boxes_of: dict[tuple, set[tuple]] = defaultdict(set)
    for sample in samples:
        for identity in sample.identities:
            photos = [(sample.image_root, path) for path in identity.images]
            shown = [box for box in sample.boxes if box.name == identity.name and not box.relative]
            keys = [(sample.image_root, box.image, tuple(box.box)) for box in shown]
            for key, box in zip(keys, shown, strict=True):
                label_of[key] = box.label
                boxes_of[key[:2]].add(key)
            for key in [*photos, *keys]:
                parent[representative(key)] = representative(photos[0])
    for photo, boxes in boxes_of.items():
        if photo in parent and len(boxes) == 1:
            parent[representative(next(iter(boxes)))] = representative(photo)

    numbers: dict[tuple, int] = {}
    labels = sorted({label for label in label_of.values() if label})
    found: dict[tuple, list[Appearance]] = defaultdict(list)
    for key, label in label_of.items():
        number = numbers.setdefault(representative(key), len(numbers))
        found[key[:2]].append(Appearance(number, key[2], labels.index(label) if label else NO_LABEL))
    return dict(found), labels


def pretrain_tower(
    model,
    processor,
    samples: Iterable[Sample],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    bf16: bool = False,
    logging_steps: int = 100,
) -> list[dict[str, float]]:
    """Train the vision tower of a model so that its patches tell individuals apart, and what the labels of boxes say.

    Identity: each patch in a box is compared with the mean patch of all boxes of the batch; those of the same
    individual in other images should be most similar (a supervised contrastive loss, Khosla et al., arXiv 2004.11362).
    Label: a linear layer classifies each patch in a box and the mean of these patches. Without labels there is only the
    first loss, and the tower learns to ignore whatever does not identify. Both layers are thrown away afterwards.

    Args:
        model: an :class:`idavlm.IDAVLMForConditionalGeneration`; only its vision tower is trained.
        processor: its processor.
        samples: training records.
        steps: number of steps.
        batch_size: images per step.
        learning_rate: largest learning rate of AdamW, which rises and falls once.
        seed: seed of the batches.
        bf16: run the tower in bfloat16.
        logging_steps: steps between two entries of the log.

    Returns:
        Mean losses: ``step``, ``individual_loss`` and, with labels, ``label_loss``.

    Raises:
        ValueError: no individual has boxes in two images.
    """
    check_positive(steps=steps, batch_size=batch_size, logging_steps=logging_steps)
    appearances, labels = find_appearances(samples)
    images = list(appearances)
    loaded = [processor.load_image(*image) for image in images]
    pixels, sizes = torch.stack([image for image, _ in loaded]), torch.tensor([size for _, size in loaded])
    numbers_of = defaultdict(list)  # images of each individual
    for number, image in enumerate(images):
        for appearance in appearances[image]:
            numbers_of[appearance.individual].append(number)
    groups = [numbers for numbers in numbers_of.values() if len(numbers) > 1]
    if not groups:
        raise ValueError("samples have no individual with boxes in two images; add boxes, or images.")

    was_training = model.training
    model.train()
    with torch.no_grad():
        features, grid_size = model.image_features(pixels[:2].to(model.device))
    width = features.shape[-1]
    embed, classify = nn.Linear(width, width).to(model.device), nn.Linear(width, max(len(labels), 1)).to(model.device)
    parameters = [*model.vision_tower.parameters(), *embed.parameters(), *classify.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    rng, log, sums = Random(seed), [], defaultdict(float)
    for step in range(1, steps + 1):
        batch = _draw_images(groups, batch_size, rng)
        found = [(row, number, each) for row, number in enumerate(batch) for each in appearances[images[number]]]
        rows = torch.tensor([row for row, _, _ in found])
        targets = identity_patch_targets(
            torch.tensor([each.box for _, _, each in found]),
            rows,
            torch.arange(len(found)),
            sizes[batch],
            grid_size,
        )
        inside = (targets[rows] == torch.arange(len(found))[:, None]).to(model.device)  # [N, P], N boxes
        individuals = torch.tensor([each.individual for _, _, each in found], device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            features, _ = model.image_features(pixels[batch].to(model.device))
        features = features.float()[rows.to(model.device)]  # [N, P, C]
        losses = {"individual_loss": individual_loss(embed(features), inside, individuals)}
        if labels:
            numbers = torch.tensor([each.label for _, _, each in found], device=model.device)
            losses["label_loss"] = label_loss(classify(features), inside, numbers)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
        for name, loss in losses.items():
            sums[name] += loss.item()
        if step % logging_steps == 0 or step == steps:
            count = (step - 1) % logging_steps + 1
            log.append({"step": step, **{name: round(total / count, 4) for name, total in sums.items()}})
            sums.clear()
            print(log[-1], flush=True)
    model.train(was_training)
    return log


def individual_loss(patches: Tensor, inside: Tensor, individuals: Tensor) -> Tensor:
    """Contrast of the patches in each box with the mean patches of the other boxes.

    Args:
        patches: ``[N, P, C]`` embedded patches of the image of each box.
        inside: ``[N, P]`` whether a patch is in the box.
        individuals: ``[N]`` number of the individual in each box.

    Returns:
        Mean over the patches whose individual is in another box, too; 0 if there is none.
    """
    count = inside.sum(1, keepdim=True)
    means = (patches * inside[..., None]).sum(1) / count.clamp(min=1)
    box, patch = inside.nonzero(as_tuple=True)
    similarity = F.normalize(patches[box, patch], dim=-1) @ F.normalize(means, dim=-1).T / TEMPERATURE
    others = (torch.arange(len(inside), device=box.device) != box[:, None]) & (count[:, 0] > 0)
    same = others & (individuals == individuals[box][:, None])
    similarity = similarity.masked_fill(~others, -torch.inf)
    has_same = same.any(1)
    of_same = similarity[has_same].masked_fill(~same[has_same], -torch.inf).logsumexp(1)
    return (similarity[has_same].logsumexp(1) - of_same).sum() / has_same.sum().clamp(min=1)


def label_loss(logits: Tensor, inside: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labels of boxes, from the mean logits of each box and, half as strong, from each patch.

    The mean alone would be satisfied by the few patches that show an object, such as a ball. Each patch of the
    individual should know, because the identity attention of a scene may miss the ball.

    Args:
        logits: ``[N, P, K]`` for the patches of the image of each box.
        inside: ``[N, P]`` whether a patch is in the box.
        labels: ``[N]`` number of the label of each box, -100 without one.
    """
    has_patches = inside.any(1)
    means = (logits * inside[..., None]).sum(1) / inside.sum(1, keepdim=True).clamp(min=1)
    box, patch = inside.nonzero(as_tuple=True)
    if not (labels[has_patches] != NO_LABEL).any():
        return logits.sum() * 0
    of_box = F.cross_entropy(means[has_patches], labels[has_patches], ignore_index=NO_LABEL)
    return of_box + 0.5 * F.cross_entropy(logits[box, patch], labels[box], ignore_index=NO_LABEL)


def _draw_images(groups: list[list[int]], batch_size: int, rng: Random) -> list[int]:
    """Distinct images, several of each individual that is drawn."""
    batch: dict[int, None] = {}
    for _ in range(batch_size):
        group = rng.choice(groups)
        batch.update(dict.fromkeys(rng.sample(group, min(IMAGES_PER_INDIVIDUAL, len(group)))))
        if len(batch) >= batch_size:
            break
    return list(batch)[:batch_size]
