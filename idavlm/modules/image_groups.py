"""The images of a batch, grouped once on the host into the indices of one ragged pass over scenes and references."""

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from torch import Tensor

from idavlm.utils import ImageRole, outside_compile


@dataclass(frozen=True, eq=False)
class ImageGroups:
    """Indices that turn a batch of images into one ragged pass, and back.

    The packed order starts with the images that are resampled independently: references, general images and scenes of
    samples without references. The scenes that attend to references follow. Both parts keep the order of the batch.

    Attributes:
        order: ``[I]`` batch index of each packed image, or None if both orders are equal.
        inverse: ``[I]`` packed index of each image of the batch, or None if both orders are equal.
        num_independent: number of images that are resampled independently.
        identities: identity of each of the R references within its sample, sample by sample.
        references_per_sample: number of references for each of the N samples that have images.
        scenes_per_sample: number of scenes that attend to references, for each of these samples.
        references: ``[R]`` packed index of each reference, or None if the references are not among the images.
    """

    order: Tensor | None
    inverse: Tensor | None
    num_independent: int
    identities: tuple[int, ...]
    references_per_sample: tuple[int, ...]
    scenes_per_sample: tuple[int, ...]
    references: Tensor | None = None


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

    The three tensors are read on the host. Keep them on the CPU to avoid a synchronisation with the GPU.

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
    attends = [
        role == ImageRole.SCENE and references_per_sample[sample] > 0
        for role, sample in zip(roles, samples, strict=True)
    ]
    scenes_per_sample = [0] * len(numbers)
    for sample, scene in zip(samples, attends, strict=True):
        scenes_per_sample[sample] += scene

    order = sorted(range(num_images), key=attends.__getitem__)
    inverse = sorted(range(num_images), key=order.__getitem__)
    in_order = order == list(range(num_images))
    references = [inverse[image] for image in range(num_images) if is_reference[image]]

    if identity_index is None:
        identities = [number for count in references_per_sample for number in range(count)]
    else:
        identities = _identities(_integers("identity_index", identity_index, num_images), samples, is_reference)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)

    return ImageGroups(
        order=None if in_order else tensor(order),
        inverse=None if in_order else tensor(inverse),
        num_independent=num_images - sum(attends),
        references=tensor(references),
        identities=tuple(identities),
        references_per_sample=tuple(references_per_sample),
        scenes_per_sample=tuple(scenes_per_sample),
    )


def select_images(images: Tensor, index: Tensor | None) -> Tensor:
    """Return ``images[index]``; None keeps the order, as in :class:`ImageGroups`."""
    return images if index is None else images.index_select(0, index)


@outside_compile
def pack_keys(keys: Tensor, groups: ImageGroups, *, null_token: Tensor | None) -> Tensor:
    """Pack the keys ``[R, K, C]`` of all references into one sequence ``[T, C]``, sample by sample.

    Args:
        keys: tokens or patches of the references.
        groups: the images of the batch.
        null_token: ``[1, C]``, inserted before the keys of each sample, or None.
    """
    if null_token is None:
        return keys.flatten(0, 1)
    samples = (sample.flatten(0, 1) for sample in keys.split(groups.references_per_sample))
    parts = [part for sample in samples for part in (null_token, sample)]
    return torch.cat([keys.flatten(0, 1)[:0], null_token[:0], *parts])  # part of the graph even without a sample


@outside_compile
def attention_segments(
    groups: ImageGroups, *, num_patches: int, key_length: int, null_token: bool, device: torch.device
) -> dict[str, Tensor | int]:
    """Return the segment arguments of the identity cross-attention: scenes attend to references of their own sample.

    Args:
        groups: the images of the batch.
        num_patches: number of queries per scene.
        key_length: number of keys per reference.
        null_token: whether the keys of each sample start with the null token.
        device: device of the returned tensors.

    Returns:
        ``cu_seqlens_q``, ``cu_seqlens_k``, ``max_seqlen_q``, ``max_seqlen_k``, ``key_groups`` and ``num_key_groups`` of
        :func:`idavlm.cross_attention`. The key groups are the identities of a sample; the last group is null.
    """
    extra_keys = int(null_token)
    segments: dict[str, Tensor | int] = {}
    for name, lengths in (
        ("q", [count * num_patches for count in groups.scenes_per_sample]),
        ("k", [count * key_length + extra_keys for count in groups.references_per_sample]),
    ):
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        segments[f"cu_seqlens_{name}"] = cu_seqlens.to(device, non_blocking=True)
        segments[f"max_seqlen_{name}"] = max(lengths, default=extra_keys)
    num_identities = max(groups.identities, default=-1) + 1
    owners, lengths, identities = [], [], iter(groups.identities)
    for count in groups.references_per_sample:
        owners += [num_identities, *islice(identities, count)]
        lengths += [extra_keys, *[key_length] * count]
    key_groups = torch.tensor(owners, dtype=torch.int32).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    segments["key_groups"] = key_groups.to(device, non_blocking=True)
    segments["num_key_groups"] = num_identities + 1
    return segments


def _check_roles_and_samples(roles: list[int], samples: list[int]) -> None:
    for image, role in enumerate(roles):
        if not 0 <= role <= 2:
            raise ValueError(
                f"image_roles[{image}]={role} is not a role; use 0 (reference), 1 (scene) or 2 (general), see "
                "ImageRole."
            )
    for image in range(len(samples)):
        if samples[image] < (samples[image - 1] if image else 0):
            raise ValueError(
                f"sample_index[{image}]={samples[image]} follows {samples[image - 1] if image else 'the start'}; it "
                "starts at 0 or above and must not decrease: sort the images of the batch by sample."
            )


def _identities(identity_index: list[int], samples: list[int], is_reference: list[bool]) -> list[int]:
    """Check and return the identities of the references."""
    references = [image for image, reference in enumerate(is_reference) if reference]
    num_references = Counter(samples[image] for image in references)
    for image in references:
        if not 0 <= identity_index[image] < num_references[samples[image]]:
            raise ValueError(
                f"identity_index[{image}]={identity_index[image]} belongs to a reference of a sample with "
                f"{num_references[samples[image]]} references; number the identities of each sample 0, 1, ... (the "
                "value does not matter for other images)."
            )
    return [identity_index[image] for image in references]


def _integers(name: str, values: Tensor, num_images: int) -> list[int]:
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} is a {type(values).__name__}; pass a tensor of [{num_images}] integers.")
    if values.is_floating_point() or values.shape != (num_images,):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}; image_features has {num_images} images, "
            f"so expected [{num_images}] integers."
        )
    return values.tolist()
