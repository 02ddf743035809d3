"""The identity-aware VLM: vision tower -> ID-Former or connector -> language model."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from idavlm._compat import takes_cache
from idavlm.models.configuration import OPTIONS, IDAVLMConfig
from idavlm.models.generation import ImageGenerationMixin
from idavlm.models.joint import (
    adapt_language_model,
    connector_of,
    identity_losses,
    identity_targets,
    initialise_lacking,
    mark_names,
    picture_slots_of,
    ready_parts,
)
from idavlm.models.labelled_logits import IGNORE_INDEX, head_reads_only, next_tokens, targets_of
from idavlm.models.name_marks import name_marks
from idavlm.models.outputs import CACHE, IDAVLMOutput
from idavlm.models.scatter import scatter_image_tokens
from idavlm.models.vision import no_features, vision_features
from idavlm.modules import Resampler
from idavlm.modules.identity_map import with_known
from idavlm.modules.inner_adaptor import WorkflowMixin, takes_workflow
from idavlm.utils import ImageRole


class IDAVLMForConditionalGeneration(PreTrainedModel, ImageGenerationMixin, WorkflowMixin):
    """An identity-aware vision-language model for training and generation.

    Parts: ``vision_tower`` (any transformers vision model), ``id_former`` or ``connector``, ``language_model`` (any
    transformers causal language model, with its head; with inner adaptors where the configuration has them, and then
    ``forward`` and ``generate`` take ``workflow=``). Build one from a configuration, from parts (:meth:`from_parts`) or
    from a checkpoint (``from_pretrained``).

    Args:
        config: the configuration.
        vision_tower: instance to use; built from the configuration if not given.
        language_model: the same.
    """

    config_class = IDAVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["IDFormer", "Resampler"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: IDAVLMConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        if config.image_token_id is None:
            raise ValueError("image_token_id is not set; give the id of the tokenizer's image placeholder.")
        self.vision_tower = AutoModel.from_config(config.vision_config) if vision_tower is None else vision_tower
        self.id_former = self.connector = None
        if config.connector == "id_former":
            self.id_former = connector_of(config)
        else:
            self.connector = connector_of(config)
        self.image_index_embedding = picture_slots_of(config)
        self.language_model = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        adapt_language_model(config, self.language_model, self.connector)
        # from_pretrained builds on the meta device, where initial values are lost.
        self._connector_was_built_empty = any(parameter.is_meta for parameter in self._joint.parameters())
        # transformers would initialise layers of given parts that were replaced or wrapped after they were built.
        for part in (vision_tower, language_model):
            for module in part.modules() if part is not None else ():
                module._is_hf_initialized = True
        self.post_init()

    @property
    def _joint(self) -> nn.Module:
        """What joins the two parts."""
        return self.connector if self.id_former is None else self.id_former

    @classmethod
    def from_parts(
        cls,
        vision_tower: PreTrainedModel | str,
        language_model: PreTrainedModel | str,
        *,
        image_token_id: int,
        connector: str = "id_former",
        **options,
    ) -> "IDAVLMForConditionalGeneration":
        """Join a vision tower and a language model by a new ID-Former or connector.

        Args:
            vision_tower: a model, or what ``AutoModel.from_pretrained`` takes.
            language_model: a model, or what ``AutoModelForCausalLM.from_pretrained`` takes.
            image_token_id: id of the image placeholder; the language model's embeddings must reach it.
            connector: as in :class:`IDAVLMConfig`.
            options: further arguments of :class:`IDAVLMConfig`; every other name goes to ``connector_config``, e.g.
                ``num_queries=64, num_heads=8``.
        """
        vision_tower, language_model = ready_parts(vision_tower, language_model, image_token_id)
        config = IDAVLMConfig(
            vision_config=vision_tower.config,
            text_config=language_model.config,
            connector=connector,
            connector_config={name: value for name, value in options.items() if name not in OPTIONS},
            image_token_id=image_token_id,
            dtype=language_model.dtype,
            **{name: value for name, value in options.items() if name in OPTIONS},
        )
        model = cls(config, vision_tower, language_model)
        # The copies of the connector that inner adaptors own, too.
        for part in (model._joint, model.image_index_embedding, getattr(language_model, "inner_adaptor", None)):
            if part is not None:
                part.to(device=language_model.device, dtype=language_model.dtype)
        model.generation_config = language_model.generation_config
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self):
        return self.language_model.get_decoder()

    def train(self, mode: bool = True) -> "IDAVLMForConditionalGeneration":
        """As usual; a vision tower that is frozen stays in evaluation mode, and so do its batch statistics."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: idavlm's modules initialise themselves when they are built."""

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As transformers'; then :func:`initialise_lacking` where the model was built without values."""
        super().initialize_weights()
        if self._connector_was_built_empty:
            initialise_lacking(self.config, self._joint, self.image_index_embedding, self.language_model)

    def encode_images(
        self,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_roles: Tensor | None = None,
        sample_index: Tensor | None = None,
        identity_index: Tensor | None = None,
        *,
        output_identity_maps: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[int, int] | None]:
        """Images to image tokens.

        Args:
            pixel_values: ``[I, 3, H, W]``; or
            image_features: ``[I, P, Cv]`` of a square grid, made by the vision tower before (a frozen tower need not
                run again).
            image_roles: ``[I]`` see :class:`idavlm.ImageRole`; general images if not given.
            sample_index: ``[I]`` row of the batch each image belongs to; needed with ``image_roles``.
            identity_index: ``[I]`` see :meth:`idavlm.IDFormer.forward`.
            output_identity_maps: also give the identity maps.

        Returns:
            ``[I, Q, C]`` tokens; the identity maps or None; rows and columns of the patches or None.
        """
        features, grid_size = self._features(pixel_values, image_features)
        roles = (image_roles, sample_index, identity_index)
        image_tokens, maps = self._encode(features, grid_size, roles, output_identity_maps)
        return image_tokens, maps, grid_size

    def image_features(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        """``[I, P, Cv]`` features of the vision tower and their grid; without gradient where the tower is frozen.

        Of no images (a batch of text alone) ``[0, 1, Cv]`` and None.
        """
        if pixel_values.shape[0] == 0:
            return no_features(self.vision_tower, self.config), None
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(trained):
            return vision_features(
                self.vision_tower,
                pixel_values,
                layer=self.config.vision_feature_layer,
                select=self.config.vision_feature_select,
            )

    @takes_workflow
    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        token_identity_index: Tensor | None = None,
        name_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_roles: Tensor | None = None,
        sample_index: Tensor | None = None,
        identity_index: Tensor | None = None,
        image_sizes: Tensor | None = None,
        boxes: Tensor | None = None,
        box_image: Tensor | None = None,
        box_identity: Tensor | None = None,
        teacher_forcing: bool = False,
        output_identity_maps: bool = False,
        **kwargs,
    ) -> IDAVLMOutput:
        """Read text and images; with ``labels`` also the losses. Images alone are read without the language model.

        Args:
            input_ids: ``[B, T]`` with ``image_token_id`` wherever an image token goes.
            attention_mask: ``[B, T]`` 1 = keep.
            position_ids: ``[B, T]``.
            cache: a transformers cache; ``past_key_values`` before transformers 5.24.
            inputs_embeds: ``[B, T, C]`` in place of ``input_ids``, image tokens included: none are put in.
            labels: ``[B, T]``, -100 where nothing is to be predicted. In training mode logits are then computed at
                labels alone, which saves most of their memory, and not returned.
            token_identity_index: ``[B, T]`` the identity a token is about, from its name on; -1 elsewhere. An ID-Former with
                ``max_identities`` marks these tokens as it marks the identity's photos.
            name_mask: ``[B, T]`` the names themselves; needed with images where ``names_as_marks``.
            pixel_values, image_features, image_roles, sample_index, identity_index: see :meth:`encode_images`.
            image_sizes: ``[I, 2]`` height and width of the original images; needed with boxes.
            boxes: ``[N, 4]`` pixels of persons who have references: teach the identity attention.
            box_image: ``[N]`` image of each box, counted over the batch.
            box_identity: ``[N]`` identity of each box within its sample.
            teacher_forcing: where there are boxes, mark image tokens by these, not by the identity attention.
            output_identity_maps: also give the identity maps.
            kwargs: for the language model (``use_cache``, ``output_attentions``, ``logits_to_keep``, ...).
        """
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("give either input_ids or inputs_embeds.")
        image_tokens = maps = None
        losses: dict[str, Tensor] = {}
        if pixel_values is not None or image_features is not None:
            teaches = self.id_former is not None and boxes is not None
            features, grid_size = self._features(pixel_values, image_features)
            roles = (image_roles, sample_index, identity_index)
            located = (boxes, box_image, box_identity, image_sizes)
            targets = identity_targets(located, roles, features.shape[1], grid_size) if teaches else None
            known = targets if teacher_forcing else None
            wants_maps = output_identity_maps or teaches or self.config.names_as_marks
            image_tokens, maps = self._encode(features, grid_size, roles, wants_maps, known)
            if teaches:
                losses = identity_losses(self.id_former, self.config, features, grid_size, roles, maps, targets)
        if input_ids is not None:
            slots = None if self.id_former is None else self.id_former.identity_embedding
            inputs_embeds = mark_names(self.get_input_embeddings()(input_ids), token_identity_index, slots)
            is_image = input_ids == self.config.image_token_id
            if image_tokens is not None:
                image_embeds = image_tokens * self.config.image_token_scale
                if self.config.names_as_marks:
                    seen = with_known(maps[-1], known)
                    cells = self.id_former.resampler.query_grid
                    names, nobody = (token_identity_index, name_mask), self.config.null_name_token_id
                    if nobody is not None:  # a call of the module: its weight may be partitioned
                        nobody = self.get_input_embeddings()(input_ids.new_tensor([nobody]))[0]
                    marks = name_marks(inputs_embeds, names, roles, seen, grid_size, cells, nobody)
                    image_embeds = image_embeds + marks
                inputs_embeds = scatter_image_tokens(inputs_embeds, is_image, image_embeds)
            elif cache is None and is_image.any():
                raise ValueError(
                    f"the text holds {int(is_image.sum())} image placeholders but 0 images; give pixel_values."
                )
        if inputs_embeds is None:
            if image_tokens is None:
                raise ValueError("give input_ids or inputs_embeds, or images alone.")
            loss = losses.get("auxiliary_loss")
            return IDAVLMOutput(loss=loss, **losses, image_hidden_states=image_tokens, identity_maps=maps)
        next_labels = None if labels is None else next_tokens(labels)
        # As where a head is fused with the loss: in training there are no logits beside it.
        skip_logits = self.training and labels is not None
        head = self.get_output_embeddings()
        with head_reads_only(head, next_labels != IGNORE_INDEX) if skip_logits else nullcontext():
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
                **kwargs,
            )
        loss, logits = None, outputs.logits
        if labels is not None:
            options = {"shift_labels": targets_of(logits, next_labels), "vocab_size": logits.shape[-1]}
            losses["language_loss"] = self.loss_function(logits=logits, labels=None, **options)
            loss = losses["language_loss"] + losses.get("auxiliary_loss", 0.0)
        return IDAVLMOutput(
            loss=loss,
            **losses,
            logits=None if skip_logits else logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_tokens,
            identity_maps=maps,
        )

    def _features(self, pixel_values, image_features) -> tuple[Tensor, tuple[int, int] | None]:
        if (pixel_values is None) == (image_features is None):
            raise ValueError("give either pixel_values or image_features.")
        features, grid_size = (image_features, None) if pixel_values is None else self.image_features(pixel_values)
        dtype = next((parameter.dtype for parameter in self._joint.parameters()), self.dtype)
        return features.to(dtype), grid_size

    def _encode(
        self, features, grid_size, roles, output_attentions, target_identity_map=None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        image_roles, sample_index, identity_index = roles
        if image_roles is None:
            image_roles = torch.full((len(features),), int(ImageRole.GENERAL))
            if sample_index is None and self.image_index_embedding is None:
                sample_index = torch.zeros(len(features), dtype=torch.long)
        if sample_index is None and (self.id_former is not None or self.image_index_embedding is not None):
            raise ValueError("images without sample_index: say which row of the batch each image belongs to.")
        maps = None
        if isinstance(self.connector, Resampler):
            image_tokens = self.connector(features, grid_size=grid_size)
        elif self.id_former is None:
            image_tokens = self.connector(features)
        else:
            options = {"grid_size": grid_size, "output_attentions": output_attentions}
            options["target_identity_map"] = target_identity_map
            result = self.id_former(features, image_roles, sample_index, identity_index, **options)
            image_tokens, maps = result if output_attentions else (result, None)
        if self.image_index_embedding is not None:
            image_tokens = image_tokens + self.image_index_embedding.of(image_roles, sample_index)[:, None]
        return image_tokens, maps
