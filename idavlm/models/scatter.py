"""Put image tokens in the place of their placeholders, strictly."""

from torch import Tensor


def scatter_image_tokens(inputs_embeds: Tensor, is_image: Tensor, image_tokens: Tensor) -> Tensor:
    """Replace the embeddings of placeholders, in order, by image tokens.

    Args:
        inputs_embeds: ``[B, T, C]``.
        is_image: ``[B, T]`` bool, True at placeholders.
        image_tokens: ``[I, Q, C]`` of all images of the batch, in the order of their placeholders.

    Returns:
        ``[B, T, C]``.

    Raises:
        ValueError: another number of placeholders than of image tokens, with both numbers; widths that differ.
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
            f"{inputs_embeds.shape[-1]}; the connector's hidden_size must be the language model's."
        )
    return inputs_embeds.masked_scatter(is_image[..., None], image_tokens.to(inputs_embeds))
