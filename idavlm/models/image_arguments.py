"""Arguments of ``get_image_features`` of transformers' models, for some of the images of a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def keep_images(config, arguments: Mapping[str, Any], lengths: Sequence[int], images: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of ``get_image_features`` for the images whose numbers are in ``images``.

    Args:
        config: configuration of the model.
        arguments: arguments for all images: ``pixel_values`` with one row per patch (``image_grid_thw``), per image or
            per tile.
        lengths: number of image tokens of each image.
        images: numbers of the images, ascending.

    Raises:
        ValueError: the model encodes the images of a sample together, or their rows are not known.
    """
    pixels, grids = arguments["pixel_values"], arguments.get("image_grid_thw")
    together = [name for name in ("pixel_attention_mask", "batch_num_images") if arguments.get(name) is not None]
    if together:
        raise ValueError(
            f"{config.model_type} encodes the images of a sample together ({', '.join(together)}), so stored photos "
            "cannot take their place; pass the photos, without identities=."
        )
    kept = dict(arguments)
    index = torch.tensor(images)
    if grids is not None:
        rows = pixels.split(grids.prod(-1).tolist())
        kept["pixel_values"] = torch.cat([rows[image] for image in images])
        kept["image_grid_thw"] = grids[index.to(grids.device)]
        return kept
    tokens_per_row, remainder = divmod(sum(lengths), len(pixels))
    if len(pixels) == len(lengths):
        rows_per_image = [1] * len(lengths)
    elif remainder == 0 and all(length % tokens_per_row == 0 for length in lengths):
        rows_per_image = [length // tokens_per_row for length in lengths]
    else:
        raise ValueError(
            f"pixel_values of {config.model_type} have {len(pixels)} rows for {len(lengths)} images of {list(lengths)} "
            "image tokens, so the rows of an image are not known; pass the photos, without identities=."
        )
    rows = pixels.split(rows_per_image)
    kept["pixel_values"] = torch.cat([rows[image] for image in images])
    sizes = arguments.get("image_sizes")
    if sizes is not None:
        kept["image_sizes"] = torch.as_tensor(sizes)[index]
    return kept
