"""What joins vision tower and language model: built from a configuration, taught by boxes."""

from torch import Tensor, nn

from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.vision import features_width
from idavlm.modules import IDFormer, build_connector
from idavlm.modules.positions import square_grid
from idavlm.ops import identity_patch_targets


def identity_targets(
    boxes: tuple[Tensor, Tensor, Tensor, Tensor],
    image_roles: Tensor,
    num_patches: int,
    grid_size: tuple[int, int] | None,
) -> Tensor:
    """:func:`idavlm.identity_patch_targets` of a batch, computed on the host; ``[I, P]`` on the device of the boxes."""
    if image_roles is None or any(tensor is None for tensor in boxes):
        raise ValueError("boxes need box_image, box_identity, image_sizes and image_roles beside them.")
    grid_size = grid_size or square_grid("P, the number of patches,", num_patches)
    targets = identity_patch_targets(*(tensor.cpu() for tensor in boxes), grid_size, image_roles=image_roles.cpu())
    return targets.to(boxes[0].device)


def connector_of(config: IDAVLMConfig) -> nn.Module:
    options = {
        "hidden_size": config.text_config.get_text_config().hidden_size,
        **config.connector_config,
        "vision_hidden_size": features_width(config),
    }
    if config.connector in ("id_former", "resampler"):
        options.setdefault("attn_implementation", config._attn_implementation or "sdpa")
        tokens = options.get("num_queries")
        if config.image_seq_length is None:
            config.image_seq_length = tokens
        if tokens != config.image_seq_length:
            raise ValueError(
                f"num_queries={tokens} but image_seq_length={config.image_seq_length}; they are one number."
            )
    if config.image_seq_length is None:
        raise ValueError(f"connector={config.connector!r} needs image_seq_length, the patches of one image.")
    if config.connector == "id_former":
        return IDFormer(**options)
    return build_connector(config.connector, **options)
