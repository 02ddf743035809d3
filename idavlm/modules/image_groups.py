"""Which images are read alone, and which look at whose references: worked out once a batch, as indices."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from idavlm.utils import ImageRole, outside_compile


@dataclass(frozen=True)
class ImageGroups:
    """Indices that turn a batch of images into one ragged pass, and back.

    In packed order the plain images (references, general images, scenes whose sample has no reference) stand first,
    the scenes that look at references behind them; each in the order of the batch.

    Attributes:
        order: ``[I]`` batch index of each packed image, or None where both orders are the same.
        inverse: ``[I]`` packed index of each image of the batch, or None.
        num_plain: number of plain images.
        references: ``[R]`` packed index of every reference, sample by sample.
        identities: identity of each of these R references, counted within its sample.
        references_per_sample: one count for each of the N samples that have images.
        scenes_per_sample: the same for the scenes that look at references.
    """

    order: Tensor | None
    inverse: Tensor | None
    num_plain: int
    references: Tensor
    identities: tuple[int, ...]
    references_per_sample: tuple[int, ...]
    scenes_per_sample: tuple[int, ...]


@outside_compile
def group_images(
    image_roles: Tensor,
    sample_index: Tensor,
    identity_index: Tensor | None,
    *,
    num_images: int,
    device: torch.device,
) -> ImageGroups:
    """Check roles, samples and identities of a batch and group its images.

    The three tensors are read on the host: keep them on the CPU and nothing waits for the GPU.

    Raises:
        ValueError: see :meth:`IDFormer.forward`.
    """
    roles = _integers("image_roles", image_roles, num_images)
    samples = _integers("sample_index", sample_index, num_images)
    _check_roles_and_samples(roles, samples)
    numbers = {sample: number for number, sample in enumerate(dict.fromkeys(samples))}
    samples = [numbers[sample] for sample in samples]
    is_reference = [role == ImageRole.REFERENCE for role in roles]
    references_per_sample = [0] * len(numbers)
    for sample, reference in zip(samples, is_reference, strict=True):
        references_per_sample[sample] += reference
    looks = [
        role == ImageRole.SCENE and references_per_sample[sample] > 0
        for role, sample in zip(roles, samples, strict=True)
    ]
    scenes_per_sample = [0] * len(numbers)
    for sample, scene in zip(samples, looks, strict=True):
        scenes_per_sample[sample] += scene

    order = sorted(range(num_images), key=looks.__getitem__)
    inverse = sorted(range(num_images), key=order.__getitem__)
    in_order = order == inverse == list(range(num_images))
    references = [inverse[image] for image in range(num_images) if is_reference[image]]

    if identity_index is None:
        identities = [number for count in references_per_sample for number in range(count)]
    else:
        identities = _identities(_integers("identity_index", identity_index, num_images), is_reference)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)

    return ImageGroups(
        order=None if in_order else tensor(order),
        inverse=None if in_order else tensor(inverse),
        num_plain=num_images - sum(looks),
        references=tensor(references),
        identities=tuple(identities),
        references_per_sample=tuple(references_per_sample),
        scenes_per_sample=tuple(scenes_per_sample),
    )


@outside_compile
def attention_segments(
    groups: ImageGroups, *, num_patches: int, key_length: int, extra_keys: int, device: torch.device
) -> dict[str, Tensor | int]:
    """Segment arguments of the identity cross-attention: each sample's scenes look at each sample's references.

    Args:
        groups: the images of the batch.
        num_patches: queries a scene.
        key_length: keys a reference.
        extra_keys: further keys of every sample.
        device: where ``cu_seqlens`` go.

    Returns:
        ``cu_seqlens_q``, ``cu_seqlens_k``, ``max_seqlen_q``, ``max_seqlen_k`` of :func:`idavlm.ops.cross_attention`.
    """
    segments: dict[str, Tensor | int] = {}
    for name, lengths in (
        ("q", [count * num_patches for count in groups.scenes_per_sample]),
        ("k", [count * key_length + extra_keys for count in groups.references_per_sample]),
    ):
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        segments[f"cu_seqlens_{name}"] = cu_seqlens.to(device, non_blocking=True)
        segments[f"max_seqlen_{name}"] = max(lengths, default=extra_keys)
    return segments


def _check_roles_and_samples(roles: list[int], samples: list[int]) -> None:
    for image, role in enumerate(roles):
        if not 0 <= role <= 2:
            raise ValueError(
                f"image_roles[{image}]={role} is no role; use 0 (reference), 1 (scene) or 2 (general), see ImageRole."
            )
    for image in range(len(samples)):
        if samples[image] < (samples[image - 1] if image else 0):
            raise ValueError(
                f"sample_index[{image}]={samples[image]} follows {samples[image - 1] if image else 'the start'}; it "
                "counts from 0 and never falls: sort the images of the batch by sample."
            )


def _identities(identity_index: list[int], is_reference: list[bool]) -> list[int]:
    """The identities of the references alone."""
    for image, (identity, reference) in enumerate(zip(identity_index, is_reference, strict=True)):
        if reference and identity < 0:
            raise ValueError(
                f"identity_index[{image}]={identity} belongs to a reference; number the identities of each sample from "
                "0 (images that are no references may hold anything)."
            )
    return [identity for identity, reference in zip(identity_index, is_reference, strict=True) if reference]


def _integers(name: str, values: Tensor, num_images: int) -> list[int]:
    if values.is_floating_point() or values.shape != (num_images,):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}; image_features has {num_images} images, "
            f"so expected [{num_images}] integers."
        )
    return values.tolist()
