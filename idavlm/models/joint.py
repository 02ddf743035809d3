"""What joins vision tower and language model: built from a configuration, taught by boxes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedModel

from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.vision import features_width
from idavlm.modules import IDFormer, ImageIndexEmbedding, add_inner_adaptors, build_connector
from idavlm.modules.identity_embedding import IdentityEmbedding
from idavlm.modules.inner_adaptor import new_inner_adaptor
from idavlm.modules.positions import square_grid
from idavlm.ops import identity_patch_targets
from idavlm.ops.identity_supervision import IGNORE, NULL
from idavlm.utils import ImageRole


def identity_targets(
    boxes: tuple[Tensor, Tensor, Tensor, Tensor],
    roles: tuple[Tensor, Tensor, Tensor],
    num_patches: int,
    grid_size: tuple[int, int] | None,
) -> Tensor:
    """:func:`idavlm.identity_patch_targets` of a batch, computed on the host; ``[I, P]`` on the device of the boxes.

    Where a sample introduces an identity and boxes it nowhere, it may be anywhere: then "nobody" is no target there.

    Args:
        boxes: ``boxes``, ``box_image``, ``box_identity``, ``image_sizes`` of the batch.
        roles: ``image_roles``, ``sample_index``, ``identity_index``.
        num_patches: P.
        grid_size: rows and columns of patches; the square of P where it is None.
    """
    if any(tensor is None for tensor in (*boxes, *roles)):
        raise ValueError(
            "boxes need box_image, box_identity, image_sizes, image_roles, sample_index and identity_index beside them."
        )
    grid_size = grid_size or square_grid("P, the number of patches,", num_patches)
    box, box_image, box_identity, image_sizes = (tensor.cpu() for tensor in boxes)
    image_roles, sample_index, identity_index = (tensor.cpu() for tensor in roles)
    targets = identity_patch_targets(box, box_image, box_identity, image_sizes, grid_size, image_roles=image_roles)
    is_reference = image_roles == ImageRole.REFERENCE
    introduced = zip(sample_index[is_reference].tolist(), identity_index[is_reference].tolist(), strict=True)
    boxed = set(zip(sample_index[box_image].tolist(), box_identity.tolist(), strict=True))
    unknown = sorted({sample for sample, identity in introduced if (sample, identity) not in boxed})
    somewhere = torch.isin(sample_index, torch.tensor(unknown, dtype=sample_index.dtype))
    targets = targets.masked_fill(somewhere[:, None] & (targets == NULL), IGNORE)
    return targets.to(boxes[0].device)


def identity_losses(
    id_former: IDFormer,
    config: IDAVLMConfig,
    features: Tensor,
    grid_size: tuple[int, int] | None,
    roles: tuple[Tensor, Tensor, Tensor],
    maps: tuple[Tensor, ...],
    targets: Tensor,
) -> dict[str, Tensor]:
    """What boxes teach the identity attention: ``identity_map_loss``, ``contrastive_loss``, and their weighted sum.

    Args:
        id_former, config: of the model.
        features: ``[I, P, Cv]``.
        grid_size, roles: see :func:`identity_targets`.
        maps: of the ID-Former for these features.
        targets: from :func:`identity_targets`.
    """
    losses = {"identity_map_loss": id_former.identity_map_loss(maps, targets)}
    total = config.identity_map_loss_weight * losses["identity_map_loss"]
    if config.contrastive_loss_weight:
        losses["contrastive_loss"] = id_former.contrastive_loss(features, *roles, targets, grid_size=grid_size)
        total = total + config.contrastive_loss_weight * losses["contrastive_loss"]
    return losses | {"auxiliary_loss": total}


def mark_names(inputs_embeds: Tensor, token_identity_index: Tensor | None, slots: IdentityEmbedding | None) -> Tensor:
    """Add slots to names, each as strong as the embedding it is added to, so that both can be read."""
    if slots is None or token_identity_index is None:
        return inputs_embeds
    token_identity_index = token_identity_index.to(inputs_embeds.device)
    marks = F.normalize(slots.weight.to(inputs_embeds), dim=-1)[token_identity_index.clamp(min=0)]
    strength = inputs_embeds.detach().norm(dim=-1) * (token_identity_index >= 0)
    return inputs_embeds + marks * strength[..., None]


def ready_parts(
    vision_tower: PreTrainedModel | str, language_model: PreTrainedModel | str, image_token_id: int
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """What :meth:`idavlm.IDAVLMForConditionalGeneration.from_parts` is given, loaded and checked."""
    if isinstance(vision_tower, str):
        vision_tower = AutoModel.from_pretrained(vision_tower)
    # Of a model of images and text the vision part, if that is what its configuration builds when it is loaded.
    part = getattr(vision_tower, "vision_model", None)
    if part is not None and MODEL_MAPPING.get(type(getattr(part, "config", None)), None) is type(part):
        vision_tower = part
    if isinstance(language_model, str):
        language_model = AutoModelForCausalLM.from_pretrained(language_model)
    vocabulary = language_model.get_input_embeddings().num_embeddings
    if not 0 <= image_token_id < vocabulary:
        raise ValueError(
            f"image_token_id={image_token_id} lies outside the {vocabulary} embeddings of the language model; call "
            "language_model.resize_token_embeddings(len(tokenizer)) first."
        )
    return vision_tower, language_model


def connector_of(config: IDAVLMConfig) -> nn.Module:
    width = config.text_config.get_text_config().hidden_size
    options = {"hidden_size": width, **config.connector_config, "vision_hidden_size": features_width(config)}
    if config.connector in ("id_former", "resampler"):
        options["output_size"] = width
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


def picture_slots_of(config: IDAVLMConfig) -> ImageIndexEmbedding | None:
    """The model's :class:`ImageIndexEmbedding`, if it has any."""
    if not config.max_images:
        return None
    return ImageIndexEmbedding(config.max_images, config.text_config.get_text_config().hidden_size)


def adapt_language_model(config: IDAVLMConfig, language_model: nn.Module, connector: nn.Module | None) -> None:
    """Add the inner adaptors of the configuration, or note those there are."""
    present = getattr(language_model, "inner_adaptor", None)
    if present is not None and config.inner_adaptors is None:
        if "connector" in present.options["modules_to_copy"]:
            raise ValueError(
                "the language model's workflows own a connector, and this model would build another; give it without "
                "adaptors, and inner_adaptors=... to from_parts or IDAVLMConfig."
            )
        config.inner_adaptors = dict(present.options)
    elif config.inner_adaptors is not None:
        owns = "connector" in config.inner_adaptors.get("modules_to_copy", ())
        add_inner_adaptors(language_model, **config.inner_adaptors, connector=connector if owns else None)


@torch.no_grad()
def initialise_lacking(
    config: IDAVLMConfig, joint: nn.Module, image_index_embedding: ImageIndexEmbedding | None, language_model: nn.Module
) -> None:
    """What a checkpoint lacks of connector or ID-Former, picture slots or adaptors takes the values of new ones."""

    def new_adaptors() -> nn.Module:
        language_model.tie_weights()  # a tied head has no values before
        options = language_model.inner_adaptor.options
        return new_inner_adaptor(language_model, options, joint if "connector" in options["modules_to_copy"] else None)

    parts = [(joint, lambda: connector_of(config))]
    if image_index_embedding is not None:
        parts.append((image_index_embedding, lambda: picture_slots_of(config)))
    if config.inner_adaptors is not None:
        parts.append((language_model.inner_adaptor, new_adaptors))
        language_model.requires_grad_(False)  # loaded parameters are new ones
        language_model.inner_adaptor.requires_grad_(True)
    for part, build in parts:
        lacking = {
            name: tensor
            for name, tensor in part.state_dict(keep_vars=True).items()
            if not getattr(tensor, "_is_hf_initialized", False)
        }
        new = build().state_dict() if lacking else {}
        for name, tensor in lacking.items():
            tensor.copy_(new[name])
