"""Encoded reference photos that take the place of photos in a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from idavlm.utils import ImageRole


@dataclass(frozen=True, eq=False)
class StoredPhoto:
    """Features of one reference photo, before the ID-Former.

    Attributes:
        features: ``[L, C]`` what the ID-Former reads: patches of the vision tower in an
            :class:`idavlm.IDAVLMForConditionalGeneration`, image tokens in an attached model.
        deepstack: DeepStack features ``[L, C]`` of the photo, one tensor per level (Qwen3-VL).
        size: (height, width) of the photo, if the number of its image tokens depends on it. A blank image of this size
            then takes the place of the photo in a prompt.
    """

    features: Tensor
    deepstack: tuple[Tensor, ...] = ()
    size: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class SelectedIdentities:
    """Identities of a bank in the order in which the prompts introduce them. ``generate`` takes them as ``identities``.

    Attributes:
        names: the names.
        photos: the photos of each identity.
    """

    names: tuple[str, ...]
    photos: tuple[tuple[StoredPhoto, ...], ...]

    def stored(self, image_roles: Tensor, sample_index: Tensor, identity_index: Tensor) -> dict[int, StoredPhoto]:
        """Return the stored photo of each reference of a batch, by the number of the image.

        Every sample that has references must introduce these identities, in this order and with all their photos.

        Raises:
            ValueError: a sample has other references.
        """
        references: dict[int, list[int]] = {}
        roles, samples, identities = (tensor.tolist() for tensor in (image_roles, sample_index, identity_index))
        for image, (role, sample) in enumerate(zip(roles, samples, strict=True)):
            if role == ImageRole.REFERENCE:
                references.setdefault(sample, []).append(image)
        expected = [number for number, photos in enumerate(self.photos) for _ in photos]
        photos = [photo for of_identity in self.photos for photo in of_identity]
        found = {}
        for sample, images in references.items():
            if [identities[image] for image in images] != expected:
                counts = ", ".join(f"{name} ({len(of)})" for name, of in zip(self.names, self.photos, strict=True))
                raise ValueError(
                    f"sample {sample} has references of identities {[identities[image] for image in images]}, but the "
                    f"selected identities and their numbers of photos are {counts}; introduce the same identities, in "
                    "this order and with all their photos, in every prompt."
                )
            found.update(zip(images, photos, strict=True))
        return found


@dataclass(frozen=True, eq=False)
class IdentitiesOfSamples:
    """Stored photos of a batch whose samples introduce different identities. ``generate`` takes it as ``identities``.

    Attributes:
        photos: for each sample, the stored photo of each of its references in the order of the images; None for a
            photo that the vision tower encodes.
    """

    photos: tuple[tuple[StoredPhoto | None, ...], ...]

    def stored(self, image_roles: Tensor, sample_index: Tensor, identity_index: Tensor) -> dict[int, StoredPhoto]:
        """Return the stored photo of each reference of a batch that has one, by the number of the image.

        Raises:
            ValueError: a sample has another number of references.
        """
        references: list[list[int]] = [[] for _ in self.photos]
        for image, (role, sample) in enumerate(zip(image_roles.tolist(), sample_index.tolist(), strict=True)):
            if role == ImageRole.REFERENCE:
                references[sample].append(image)
        found = {}
        for sample, (images, photos) in enumerate(zip(references, self.photos, strict=True)):
            if len(images) != len(photos):
                raise ValueError(
                    f"sample {sample} has {len(images)} references, but photos[{sample}] has {len(photos)} entries; "
                    "pass one entry per reference."
                )
            found.update((image, photo) for image, photo in zip(images, photos, strict=True) if photo is not None)
        return found


def images_to_encode(num_images: int, stored: Mapping[int, StoredPhoto]) -> list[int]:
    """Return the numbers of the images that are not stored. The first image, if all are: a tower needs some input."""
    return [image for image in range(num_images) if image not in stored] or [0]


def with_stored(
    encoded: Sequence[Tensor], images: Sequence[int], stored: Mapping[int, Tensor], num_images: int
) -> list[Tensor]:
    """Return the features of all images, in order.

    Args:
        encoded: features of the images whose numbers are ``images``.
        images: from :func:`images_to_encode`.
        stored: features of stored images by number. They take precedence.
        num_images: number of all images.
    """
    by_image = dict(zip(images, encoded, strict=True))
    return [stored[image].to(encoded[0]) if image in stored else by_image[image] for image in range(num_images)]
