"""Image placeholders in the text: which image each belongs to, and the image tokens that replace them."""

from collections import Counter
from itertools import pairwise

import torch
from torch import Tensor

from idavlm.utils import ImageRole, outside_compile


def holds_tokens(cache) -> bool:
    """Whether a cache of transformers holds the start of the conversation. None is an empty cache."""
    return cache is not None and cache.get_seq_length() > 0


@outside_compile
def rows_of_images(is_image: Tensor, num_images: int, tokens_per_image: int) -> Tensor:
    """Return the row of each image by the placeholders, in order, ``[I]``: for batches without ``sample_index``.

    Args:
        is_image: ``[B, T]`` bool, True at placeholders.
        num_images: I.
        tokens_per_image: number of image tokens per image, Q.

    Raises:
        ValueError: a row holds a part of an image, or the rows hold another number of images.
    """
    placeholders = is_image.sum(1).tolist()
    rows = [row for row, count in enumerate(placeholders) for _ in range(count // tokens_per_image)]
    if len(rows) != num_images or any(count % tokens_per_image for count in placeholders):
        raise ValueError(
            f"the rows of input_ids hold {placeholders} image placeholders but there are "
            f"{num_images * tokens_per_image} image tokens ({num_images} images of {tokens_per_image}); give every "
            "image its placeholders, and check image_seq_length of the processor and truncation."
        )
    return torch.tensor(rows, dtype=torch.long)


@outside_compile
def unread_images(
    is_image: Tensor, sample_index: Tensor, tokens_per_image: int, *, is_continued: bool = False
) -> Tensor | None:
    """Return the images that belong to the placeholders of ``is_image``, or None for all of them.

    Args:
        is_image: ``[B, T]`` bool, True at placeholders.
        sample_index: ``[I]`` row of each image. Read on the host.
        tokens_per_image: number of image tokens per image, Q.
        is_continued: whether a cache holds the start of the conversation. The placeholders are then those of the last
            images of each row, because the others have been read.

    Raises:
        ValueError: a row has another number of placeholders than of image tokens, or ``sample_index`` is out of range
            or decreases.
    """
    samples = sample_index.tolist()
    placeholders = is_image.sum(1).tolist()
    for image, sample in enumerate(samples):
        if not 0 <= sample < len(placeholders):
            raise ValueError(
                f"sample_index[{image}]={sample} is out of range; input_ids has {len(placeholders)} rows, numbered "
                "from 0."
            )
    for image, (previous, sample) in enumerate(pairwise(samples), 1):
        if sample < previous:
            raise ValueError(
                f"sample_index[{image}]={sample} follows {previous}; sort the images of the batch by sample."
            )
    images_of = Counter(samples)
    unread, first = [], 0
    for row, count in enumerate(placeholders):
        images, remainder = images_of[row], count % tokens_per_image
        expected = count // tokens_per_image
        if remainder or expected > images or (expected < images and not is_continued):
            raise ValueError(
                f"row {row} of input_ids holds {count} image placeholders but there are {images * tokens_per_image} "
                f"image tokens ({images} images of {tokens_per_image}) with sample_index {row}; give every image its "
                "placeholders, and check image_seq_length of the processor and truncation."
            )
        first += images
        unread += range(first - expected, first)
    return None if len(unread) == len(samples) else torch.tensor(unread, dtype=torch.long, device=sample_index.device)


@outside_compile
def check_references(image_roles: Tensor, sample_index: Tensor) -> None:
    """Raise ValueError if a scene comes without the references of its sample, which a cache may have read before."""
    roles, samples = image_roles.tolist(), sample_index.tolist()
    introduced = {sample for role, sample in zip(roles, samples, strict=True) if role == ImageRole.REFERENCE}
    for image, (role, sample) in enumerate(zip(roles, samples, strict=True)):
        if role == ImageRole.SCENE and sample not in introduced:
            raise ValueError(
                f"image {image} is a scene of sample {sample}, whose references are not among the images. The cache "
                "holds no references to attend to: pass all images of the conversation again, not only the new ones."
            )


def scatter_image_tokens(inputs_embeds: Tensor, is_image: Tensor, image_tokens: Tensor) -> Tensor:
    """Replace the embeddings of placeholders, in order, by image tokens.

    Args:
        inputs_embeds: ``[B, T, C]``, like the result.
        is_image: ``[B, T]`` bool, True at placeholders.
        image_tokens: ``[I, Q, C]`` of all images of the batch, in the order of their placeholders.

    Raises:
        ValueError: the number of placeholders differs from that of image tokens, or the widths differ.
    """
    placeholders, tokens = int(is_image.sum()), image_tokens.shape[0] * image_tokens.shape[1]
    if placeholders != tokens:
        raise ValueError(
            f"the text holds {placeholders} image placeholders but there are {tokens} image tokens "
            f"({image_tokens.shape[0]} images of {image_tokens.shape[1]}); give every image its placeholders, and "
            "check image_seq_length of the processor and truncation."
        )
    if image_tokens.shape[-1] != inputs_embeds.shape[-1]:
        raise ValueError(
            f"image tokens are {image_tokens.shape[-1]} wide but the language model's embeddings are "
            f"{inputs_embeds.shape[-1]}; set hidden_size or output_size of the connector to that of the language model."
        )
    return inputs_embeds.masked_scatter(is_image[..., None], image_tokens.to(inputs_embeds))
