"""Pretraining from the boxes of records: who is in a box, and what its label says.

:func:`pretrain_tower` trains a vision tower, and :class:`LabelLoss` the image tokens of an ID-Former.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import compress
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idavlm.data import Sample
from idavlm.data.record_splits import connected_components
from idavlm.modules import identity_patch_targets
from idavlm.modules.positions import square_grid
from idavlm.utils import check_positive

ZOOM, SHIFT = 0.15, 0.1
"""Largest change of the size, and largest shift from the centre in half widths and heights of the image."""
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
    groups: list[list[tuple]] = []  # images and boxes that show the same individual
    references: set[tuple] = set()
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
            references.update(photos)
            groups.append([*photos, *keys])
    groups += [[photo, *boxes] for photo, boxes in boxes_of.items() if photo in references and len(boxes) == 1]
    components = connected_components(groups)
    component_of = {key: component for component, group in zip(components, groups, strict=True) for key in group}

    numbers: dict[int, int] = {}
    labels = sorted({label for label in label_of.values() if label})
    found: dict[tuple, list[Appearance]] = defaultdict(list)
    for key, label in label_of.items():
        number = numbers.setdefault(component_of[key], len(numbers))
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
    augment: bool = False,
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
        augment: mirror every second image, enlarge or reduce it by up to 15 %, and shift it by up to 5 % of its width
            and height. Helps with a few hundred individuals; labels take longer to learn.
        logging_steps: steps between two entries of the log.

    Returns:
        Mean losses: ``step``, ``individual_loss`` and, with labels, ``label_loss``.

    Raises:
        ValueError: no individual has boxes in two images.
    """
    check_positive(steps=steps, batch_size=batch_size, logging_steps=logging_steps)
    appearances, labels = find_appearances(samples)
    images = list(appearances)
    numbers_of = defaultdict(list)  # images of each individual
    for number, image in enumerate(images):
        for appearance in appearances[image]:
            numbers_of[appearance.individual].append(number)
    groups = [numbers for numbers in numbers_of.values() if len(numbers) > 1]
    if not groups:
        raise ValueError("samples have no individual with boxes in two images; add boxes, or images.")
    with ThreadPoolExecutor() as pool:  # decoding releases Python's lock
        loaded = list(pool.map(lambda image: processor.load_image(*image), images))
    pixels, sizes = torch.stack([image for image, _ in loaded]), torch.tensor([size for _, size in loaded])

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
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        batch = _draw_images(groups, batch_size, rng)
        found = [(row, each) for row, number in enumerate(batch) for each in appearances[images[number]]]
        rows, boxes = torch.tensor([row for row, _ in found]), torch.tensor([each.box for _, each in found])
        views = pixels[batch]
        if augment:
            drawn = _draw_views(len(batch), generator)
            views = _viewed(views, drawn)
            boxes, shares = _seen(boxes, sizes[batch][rows], drawn[rows])
            is_seen = shares >= 0.5
            rows, boxes, found = rows[is_seen], boxes[is_seen], list(compress(found, is_seen))
        inside = _inside(rows, boxes, sizes[batch], grid_size).flatten(1).to(model.device)  # [N, P], N boxes
        individuals = torch.tensor([each.individual for _, each in found], device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            features, _ = model.image_features(views.to(model.device))
        features = features.float()[rows.to(model.device)]  # [N, P, C]
        losses = {"individual_loss": individual_loss(embed(features), inside, individuals)}
        if labels:
            numbers = torch.tensor([each.label for _, each in found], device=model.device)
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


class LabelLoss:
    """Trains the image tokens of an ID-Former on the labels of boxes during identity pretraining.

    Identity pretraining gives the resampler no gradient. Here, a linear layer classifies the label of each box from the
    mean of the image tokens at the box. The model holds the layer as ``label_classifier``, so that an optimizer finds
    its parameters, until :meth:`remove` throws it away. Keep the norms and the projection after the resampler's
    attention fixed: otherwise they grow, and the contents of image tokens hide their identity embeddings.

    Args:
        model: a model with an ID-Former.
        samples: the training records. Their ids must differ, and are those of the batches.
        weight: factor of the loss.
    """

    def __init__(self, model, samples: Iterable[Sample], *, weight: float = 2.0):
        samples = list(samples)
        self.model, self.weight = model, weight
        self.appearances, self.labels = find_appearances(samples)
        self.images_of = {sample.id: [(sample.image_root, path) for path in sample.images] for sample in samples}
        if len(self.images_of) < len(samples):
            raise ValueError(
                f"{len(samples)} samples have {len(self.images_of)} ids; give every record an id of its own."
            )
        width = model.id_former.resampler.output_size
        model.label_classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, max(len(self.labels), 1)))
        self._hook = model.id_former.register_forward_hook(self._keep_tokens)

    def _keep_tokens(self, module: nn.Module, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        self._tokens = output[0]

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of the batch that the model has just encoded; 0 if no box in its images has a label.

        ``batch`` holds ``sample_ids``, ``image_sizes`` and ``image_features``.
        """
        images = [image for name in batch["sample_ids"] for image in self.images_of[name]]
        found = [
            (number, each)
            for number, image in enumerate(images)
            for each in self.appearances.get(image, ())
            if each.label != NO_LABEL
        ]
        tokens = self._tokens.float()
        if not found:
            return tokens.sum() * 0
        grid_size = square_grid("P, the number of patches,", batch["image_features"].shape[1])
        rows, boxes = torch.tensor([row for row, _ in found]), torch.tensor([each.box for _, each in found])
        inside = _inside(rows, boxes, batch["image_sizes"].cpu(), grid_size)
        shares = F.adaptive_avg_pool2d(inside.float(), self.model.id_former.resampler.query_grid).flatten(1)
        has_tokens = shares.sum(1) > 0
        rows = rows[has_tokens].to(tokens.device)
        labels = torch.tensor([each.label for _, each in found])[has_tokens].to(tokens.device)
        weights = F.normalize(shares[has_tokens], p=1, dim=1).to(tokens.device)
        logits = (weights[..., None] * self.model.label_classifier(tokens[rows])).sum(1)
        return self.weight * F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)

    def remove(self) -> None:
        """Throw away the classifier, before the model is saved."""
        self._hook.remove()
        del self.model.label_classifier


def _inside(rows: Tensor, boxes: Tensor, sizes: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Whether each patch of its image is in a box, ``[N, rows, columns]``.

    ``rows`` ``[N]`` are the images of the boxes ``[N, 4]``, ``sizes`` their heights and widths.
    """
    own = torch.arange(len(boxes))
    targets = identity_patch_targets(boxes, rows, own, sizes, grid_size)
    return (targets[rows] == own[:, None]).unflatten(1, grid_size)


def _draw_views(count: int, generator: torch.Generator) -> Tensor:
    """Random views of images, ``[count, 2, 2]``: horizontal and vertical scale, horizontal and vertical shift.

    A view shows at ``u`` what the image has at ``scale * u + shift``, in coordinates from -1 to 1.
    """
    zoom, shift, mirror = torch.rand(3, count, 2, generator=generator).mul(2).sub(1)
    scale = 1 + ZOOM * zoom[:, :1].repeat(1, 2)
    scale[mirror[:, 0] < 0, 0] *= -1
    return torch.stack([scale, SHIFT * shift], dim=1)


def _viewed(pixels: Tensor, views: Tensor) -> Tensor:
    """What views show of images ``[N, 3, H, W]``. Beyond its edge, an image continues with the pixels of the edge."""
    scale, shift = views.unbind(1)
    matrix = torch.cat([torch.diag_embed(scale), shift[..., None]], dim=2)
    grid = F.affine_grid(matrix, pixels.shape, align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _seen(boxes: Tensor, sizes: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    """Where views ``[N, 2, 2]`` show boxes ``[N, 4]``, in pixels of images of ``sizes`` ``[N, 2]`` (height, width).

    Also the share of the area of each box that is in its view, ``[N]``.
    """
    half = sizes.flip(1)[:, None] / 2  # width, height
    scale, shift = views[:, :1], views[:, 1:]
    corners = ((boxes.view(-1, 2, 2) / half - 1 - shift) / scale).sort(1).values
    seen = corners.clamp(-1, 1)
    share = seen.diff(dim=1).prod(2) / corners.diff(dim=1).prod(2)
    return ((seen + 1) * half).flatten(1), share[:, 0]


def _draw_images(groups: list[list[int]], batch_size: int, rng: Random) -> list[int]:
    """Distinct images, several of each individual that is drawn."""
    batch: dict[int, None] = {}
    for _ in range(batch_size):
        group = rng.choice(groups)
        batch.update(dict.fromkeys(rng.sample(group, min(IMAGES_PER_INDIVIDUAL, len(group)))))
        if len(batch) >= batch_size:
            break
    return list(batch)[:batch_size]
