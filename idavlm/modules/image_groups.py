"""The images of a batch, grouped once on the host into the indices of one ragged pass over scenes and references."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise, repeat

import torch
from torch import Tensor

from idavlm.utils import ImageRole, mark_length_dynamic, outside_compile


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
        reference_identities: ``identities`` as a tensor, or None likewise.
        reference_images: batch index of each reference; empty if the references are not among the images.
        scene_images: batch index of each scene that attends to references.
    """

    order: Tensor | None
    inverse: Tensor | None
    num_independent: int
    identities: tuple[int, ...]
    references_per_sample: tuple[int, ...]
    scenes_per_sample: tuple[int, ...]
    references: Tensor | None = None
    reference_identities: Tensor | None = None
    reference_images: tuple[int, ...] = ()
    scene_images: tuple[int, ...] = ()


@outside_compile
def group_images(
    image_roles: Tensor, sample_index: Tensor, identity_index: Tensor | None, *, num_images: int, device: torch.device
) -> ImageGroups:
    """Check roles, samples and identities of a batch and group its images.

    Args and errors are those of :meth:`IDFormer.forward`. The three tensors are read on the host.
    """
    roles = _integers("image_roles", image_roles, num_images)
    samples = _integers("sample_index", sample_index, num_images)
    for image, role in enumerate(roles):
        if not 0 <= role <= 2:
            raise ValueError(
                f"image_roles[{image}]={role} is not a role; use 0 (reference), 1 (scene) or 2 (general image)."
            )
    for image, (previous, sample) in enumerate(pairwise([0, *samples])):
        if sample < previous:
            raise ValueError(
                f"sample_index[{image}]={sample} follows {previous if image else 'the start'}; it starts at 0 or above "
                "and must not decrease: sort the images of the batch by sample."
            )
    references = [image for image, role in enumerate(roles) if role == ImageRole.REFERENCE]
    num_references = Counter(samples[image] for image in references)
    attends = [
        role == ImageRole.SCENE and num_references[sample] > 0 for role, sample in zip(roles, samples, strict=True)
    ]
    num_scenes = Counter(sample for sample, scene in zip(samples, attends, strict=True) if scene)
    references_per_sample = tuple(num_references[sample] for sample in dict.fromkeys(samples))
    if identity_index is None:
        identities = [number for count in references_per_sample for number in range(count)]
    else:
        identity_index = _integers("identity_index", identity_index, num_images)
        identities = [identity_index[image] for image in references]
        for image, identity in zip(references, identities, strict=True):
            if not 0 <= identity < num_references[samples[image]]:
                raise ValueError(
                    f"identity_index[{image}]={identity} belongs to a reference of a sample with "
                    f"{num_references[samples[image]]} references; number the identities of each sample 0, 1, ... (the "
                    "value does not matter for other images)."
                )
    order = sorted(range(num_images), key=attends.__getitem__)
    inverse = sorted(range(num_images), key=order.__getitem__)
    in_order = order == list(range(num_images))

    def tensor(values: list[int]) -> Tensor:
        return mark_length_dynamic(torch.tensor(values, dtype=torch.long).to(device, non_blocking=True))

    return ImageGroups(
        order=None if in_order else tensor(order),
        inverse=None if in_order else tensor(inverse),
        num_independent=num_images - sum(attends),
        references=tensor([inverse[image] for image in references]),
        reference_identities=tensor(identities),
        identities=tuple(identities),
        references_per_sample=references_per_sample,
        scenes_per_sample=tuple(num_scenes[sample] for sample in dict.fromkeys(samples)),
        reference_images=tuple(references),
        scene_images=tuple(image for image, is_attending in enumerate(attends) if is_attending),
    )


def select_images(images: Tensor, index: Tensor | None) -> Tensor:
    """Return ``images[index]``; None keeps the order, as in :class:`ImageGroups`."""
    return images if index is None else images.index_select(0, index)


@outside_compile
def pack_keys(
    keys: Tensor, reference_lengths: int | Sequence[int], groups: ImageGroups, *, null_token: Tensor | None
) -> Tensor:
    """Insert the null token ``[1, C]``, if there is one, before the keys of each sample.

    Args:
        keys: ``[T, C]`` keys of all references, reference after reference.
        reference_lengths: number of keys of each reference; one number if it is the same for all.
    """
    if null_token is None:
        return keys
    lengths = _each(reference_lengths)
    samples = keys.split([sum(islice(lengths, count)) for count in groups.references_per_sample])
    parts = [part for sample in samples for part in (null_token, sample)]
    return torch.cat([keys[:0], null_token[:0], *parts])  # part of the graph even without a sample


@outside_compile
def attention_segments(
    groups: ImageGroups,
    *,
    scene_lengths: int | Sequence[int],
    reference_lengths: int | Sequence[int],
    null_token: bool,
    device: torch.device,
) -> dict[str, Tensor | int]:
    """Return the segments of the identity cross-attention, as arguments of :func:`idavlm.cross_attention`.

    Scenes attend to the references of their own sample and to the null token before them. The key groups are the
    identities of a sample; the last group is null.

    Args:
        groups: scenes and references of each sample.
        scene_lengths: number of queries of each scene that attends to references; one number if it is the same for all.
        reference_lengths: number of keys of each reference, likewise.
        null_token: whether a null token precedes the keys of each sample.
        device: device of the tensors.
    """
    extra_keys = int(null_token)
    scenes, references = _each(scene_lengths), _each(reference_lengths)
    query_lengths = [sum(islice(scenes, count)) for count in groups.scenes_per_sample]
    key_lengths = [extra_keys + sum(islice(references, count)) for count in groups.references_per_sample]
    num_identities = max(groups.identities, default=-1) + 1
    owners, lengths, identities = [], [], iter(groups.identities)
    references = _each(reference_lengths)
    for count in groups.references_per_sample:
        owners += [num_identities, *islice(identities, count)]
        lengths += [extra_keys, *islice(references, count)]
    key_groups = torch.tensor(owners, dtype=torch.int32).repeat_interleave(torch.tensor(lengths, dtype=torch.long))

    def cu_seqlens(lengths: list[int]) -> Tensor:
        values = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return mark_length_dynamic(values.to(device, non_blocking=True))

    return {
        "cu_seqlens_q": cu_seqlens(query_lengths),
        "cu_seqlens_k": cu_seqlens(key_lengths),
        "max_seqlen_q": max(query_lengths, default=extra_keys),
        "max_seqlen_k": max(key_lengths, default=extra_keys),
        "key_groups": mark_length_dynamic(key_groups.to(device, non_blocking=True)),
        "num_key_groups": num_identities + 1,
    }


def _each(lengths: int | Sequence[int]) -> Iterator[int]:
    return repeat(lengths) if isinstance(lengths, int) else iter(lengths)


def _integers(name: str, values: Tensor, num_images: int) -> list[int]:
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} is a {type(values).__name__}; pass a tensor of [{num_images}] integers.")
    if values.is_floating_point() or values.shape != (num_images,):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}; image_features has {num_images} images, "
            f"so expected [{num_images}] integers."
        )
    return values.tolist()
