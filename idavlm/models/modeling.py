"""The identity-aware VLM: vision tower, ID-Former or connector, language model."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from idavlm._compat import cache_name, keep_4bit_layout, takes_cache
from idavlm.data.packing import tokens_of_samples, unpack
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.dummy_image import dummy_pixels, runs_all_modules, statistics_kept
from idavlm.models.generation import ImageGenerationMixin
from idavlm.models.id_former_class import find_id_former, import_id_former
from idavlm.models.identity_names import (
    NO_IDENTITY,
    add_learned_embeddings,
    count_identities,
    mean_name_embeddings,
)
from idavlm.models.image_batch import ImageBatch
from idavlm.models.packed_attention import packed_rows
from idavlm.models.packed_identities import unpack_token_identities
from idavlm.models.placeholders import (
    check_references,
    holds_tokens,
    rows_of_images,
    scatter_image_tokens,
    unread_images,
)
from idavlm.models.pretrained import resolve_pretrained
from idavlm.models.quantized_parts import adopt_quantization
from idavlm.models.stored_photos import SelectedIdentities, StoredPhoto, images_to_encode, with_stored
from idavlm.models.supervision import supervised_scenes, supervision_losses, target_identity_map
from idavlm.models.vision import features_width, no_features, vision_features
from idavlm.modules import IDFormer, ImageIndexEmbedding, add_inner_adaptors, build_connector
from idavlm.modules.inner_adaptor import WorkflowMixin, new_inner_adaptor, takes_workflow
from idavlm.utils import IGNORE_INDEX, ImageRole

CACHE = cache_name()
CONFIG_OPTIONS = tuple(field.name for field in fields(IDAVLMConfig))
"""Arguments of :class:`IDAVLMConfig` that :meth:`IDAVLMForConditionalGeneration.from_parts` passes on to it."""


@dataclass
class IDAVLMOutput(CausalLMOutputWithPast):
    """Output of :class:`IDAVLMForConditionalGeneration`.

    Attributes:
        loss: ``language_loss + auxiliary_loss``, if labels were passed.
        logits: ``[B, T, vocabulary]``; None in training mode if labels were passed.
        cache: cache of the language model; named ``past_key_values`` before transformers 5.24.
        hidden_states, attentions: those of the language model, if requested.
        language_loss: mean next-token cross-entropy over labelled tokens.
        identity_map_loss: see :meth:`idavlm.IDFormer.identity_map_loss`; if boxes were passed.
        contrastive_loss: see :meth:`idavlm.IDFormer.contrastive_loss`; if boxes were passed and its weight is not 0.
        auxiliary_loss: weighted sum of the two losses before; if boxes were passed.
        image_hidden_states: ``[I, Q, C]`` image tokens.
        identity_maps: tuple of identity maps, ``[I, P, G + 1]`` for each identity layer; if requested or if boxes were
            passed.
    """

    language_loss: Tensor | None = None
    identity_map_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    image_hidden_states: Tensor | None = None
    identity_maps: tuple[Tensor, ...] | None = None


@dataclass
class IDAVLMModelOutput(BaseModelOutputWithPast):
    """Output of :class:`IDAVLMModel`.

    Attributes:
        last_hidden_state: ``[B, T, C]``; None if only images were passed.
        cache, hidden_states, attentions: those of the language model.
        identity_map_loss, contrastive_loss, auxiliary_loss, image_hidden_states, identity_maps: see
            :class:`IDAVLMOutput`.
    """

    identity_map_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    image_hidden_states: Tensor | None = None
    identity_maps: tuple[Tensor, ...] | None = None


class IDAVLMModel(PreTrainedModel, WorkflowMixin):
    """An identity-aware vision-language model up to the hidden states that the head of its language model reads.

    It has the parts and the parameter names of :class:`IDAVLMForConditionalGeneration`, and loads its checkpoints.
    ``language_model`` keeps its head, because scaling and capping of logits differ between language models.

    Args:
        config: the configuration. Building a model does not change it.
        vision_tower: instance to use; built from the configuration if None.
        language_model: instance to use; built from the configuration if None.

    Raises:
        ValueError: the configuration is incomplete or does not fit the parts.
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
            raise ValueError("image_token_id is not set; pass the id of the tokenizer's image placeholder.")
        self.vision_tower = AutoModel.from_config(config.vision_config) if vision_tower is None else vision_tower
        joint = _build_joint(config)
        self.id_former = joint if isinstance(joint, IDFormer) else None
        self.connector = None if isinstance(joint, IDFormer) else joint
        self.image_index_embedding = _build_image_index_embedding(config)
        self.language_model = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        _prepare_inner_adaptors(config, self.language_model, self.connector)
        # from_pretrained builds on the meta device, where initial values are lost.
        self._joint_was_built_empty = any(parameter.is_meta for parameter in self._joint.parameters())
        # Otherwise transformers would initialise layers of the passed parts that were replaced or wrapped.
        for part in (vision_tower, language_model):
            for module in part.modules() if part is not None else ():
                module._is_hf_initialized = True
        self.post_init()

    @property
    def _joint(self) -> nn.Module:
        """The ID-Former or the connector."""
        return self.connector if self.id_former is None else self.id_former

    @classmethod
    def from_parts(
        cls,
        vision_tower: PreTrainedModel | str,
        language_model: PreTrainedModel | str,
        *,
        processor=None,
        image_token_id: int | None = None,
        connector: str = "id_former",
        **options,
    ) -> "IDAVLMModel":
        """Join a vision tower and a language model by a new ID-Former or connector.

        Args:
            vision_tower: a model, or the argument of ``AutoModel.from_pretrained``.
            language_model: a causal language model, or the argument of ``AutoModelForCausalLM.from_pretrained``.
            processor: an :class:`IDAVLMProcessor`. The model takes ``image_token_id`` from it, and ``num_queries``
                where it is not passed. A processor without ``image_seq_length`` gets that of the model.
            image_token_id: id of the image placeholder, if there is no processor. The embeddings of the language model
                must contain it.
            connector: see :class:`IDAVLMConfig`.
            options: arguments of :class:`IDAVLMConfig`, and of the connector: ``num_queries=64, num_heads=8``.

        Raises:
            ValueError: parts that do not fit each other, with the argument and the remedy.
        """
        if (processor is None) == (image_token_id is None):
            raise ValueError(f"image_token_id={image_token_id} and processor={type(processor)}: pass one of the two.")
        if options.get("id_former_class") is not None:
            import_id_former(options["id_former_class"])
        if processor is not None:
            image_token_id = processor.image_token_id
            length = "num_queries" if connector in ("id_former", "resampler") else "image_seq_length"
            options.setdefault(length, processor.image_seq_length)
            if options[length] is None:
                raise ValueError(f"{length} is not set; pass it, or build the processor with image_seq_length.")
        vision_tower = _load_vision_tower(vision_tower)
        language_model = _load_language_model(language_model, image_token_id)
        present = getattr(language_model, "inner_adaptor", None)
        if present is not None:
            options.setdefault("inner_adaptors", dict(present.options))
        config = IDAVLMConfig(
            vision_config=vision_tower.config,
            text_config=language_model.config,
            connector=connector,
            connector_config={name: value for name, value in options.items() if name not in CONFIG_OPTIONS},
            image_token_id=image_token_id,
            dtype=language_model.dtype,
            **{name: value for name, value in options.items() if name in CONFIG_OPTIONS},
        )
        if processor is not None:
            if processor.image_seq_length not in (None, config.image_seq_length):
                raise ValueError(
                    f"num_queries={config.image_seq_length} but the processor has image_seq_length="
                    f"{processor.image_seq_length}; pass one of the two, they are the same number."
                )
            processor.image_seq_length = config.image_seq_length
        model = cls(config, vision_tower, language_model)
        # New parts: the adaptors include copies of the connector.
        for part in (model._joint, model.image_index_embedding, getattr(language_model, "inner_adaptor", None)):
            if part is not None:
                part.to(device=language_model.device, dtype=language_model.dtype)
        model.generation_config = language_model.generation_config
        adopt_quantization(model, {"vision_tower": vision_tower, "language_model": language_model})
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """``PreTrainedModel.from_pretrained``; loads the models of the package (``"idavlm-tiny"``) by their names."""
        return super().from_pretrained(resolve_pretrained(pretrained_model_name_or_path), *args, **kwargs)

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

    def train(self, mode: bool = True) -> "IDAVLMModel":
        """Set the training mode. A frozen vision tower stays in evaluation mode, so its batch statistics stay."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the modules of idavlm initialise themselves when they are built."""

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise as transformers does, then give new parts that a checkpoint lacks their initial values."""
        super().initialize_weights()
        if self._joint_was_built_empty:
            self._initialise_missing()
        keep_4bit_layout(self)

    def encode_images(
        self,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_roles: Tensor | None = None,
        sample_index: Tensor | None = None,
        identity_index: Tensor | None = None,
        *,
        identities: SelectedIdentities | None = None,
        output_identity_maps: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[int, int] | None]:
        """Encode images to image tokens; without embeddings of names, which need the prompt.

        Args:
            pixel_values: ``[I, 3, H, W]``; or
            image_features: ``[I, P, Cv]`` features that the vision tower computed before, on a square grid.
            image_roles, sample_index, identity_index: ``[I]``, see :meth:`idavlm.IDFormer.forward`. Without
                ``image_roles`` all images are general images.
            identities: stored photos of a bank, which replace the encoded references, see :meth:`forward`.
            output_identity_maps: also return the identity maps.

        Returns:
            ``[I, Q, C]`` tokens; the identity maps or None; rows and columns of the patches or None.
        """
        images = self._image_batch(
            pixel_values, image_features, image_roles, sample_index, identity_index, identities=identities
        )
        image_tokens, maps = self._encode(images, output_identity_maps=output_identity_maps)
        return image_tokens, maps, images.grid_size

    def image_features(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        """Return features ``[I, P, Cv]`` of the vision tower and their grid. A frozen tower runs without gradient.

        For zero images (a batch of text only) the result is ``[0, P, Cv]``. The tower then runs on a dummy image if
        :func:`idavlm.models.dummy_image.runs_all_modules`, and if it is trained: the optimizer then takes the same step
        as with several processes, with gradients of zero.
        """
        is_trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        if pixel_values.shape[0] == 0:
            if not (runs_all_modules(self) or (self.training and is_trained and torch.is_grad_enabled())):
                return no_features(self.vision_tower, self.config), None
            with statistics_kept(self.vision_tower):
                features, grid_size = self.image_features(dummy_pixels(self.vision_tower, pixel_values.device))
            return features[:0], grid_size
        layer, select = self.config.vision_feature_layer, self.config.vision_feature_select
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            return vision_features(self.vision_tower, pixel_values, layer=layer, select=select)

    @takes_workflow
    @takes_cache
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> IDAVLMModelOutput:
        """Process text and images. Images alone skip the language model.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds: see
                :meth:`IDAVLMForConditionalGeneration.forward`.
            kwargs: its inputs of images and identities, and arguments of the language model without its head.
        """
        names = inspect.signature(self._embed).parameters
        of_images = {name: kwargs.pop(name) for name in [*kwargs] if name in names}
        inputs_embeds, image_tokens, maps, losses = self._embed(
            input_ids=input_ids, inputs_embeds=inputs_embeds, cache=cache, **of_images
        )
        outputs = {}
        if inputs_embeds is not None:
            arguments = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache, **kwargs}
            with packed_rows(self.language_model, of_images.get("token_sample_index"), arguments) as of_rows:
                outputs = self.get_decoder()(inputs_embeds=inputs_embeds, **arguments | of_rows)
        return IDAVLMModelOutput(
            last_hidden_state=outputs.get("last_hidden_state"),
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            **losses,
            image_hidden_states=image_tokens,
            identity_maps=maps,
        )

    def _embed(
        self,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache=None,
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
        mm_token_type_ids: Tensor | None = None,
        token_sample_index: Tensor | None = None,
        teacher_forcing: bool = False,
        gather_references: bool = False,
        output_identity_maps: bool = False,
        identities: SelectedIdentities | None = None,
        with_losses: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...] | None, dict[str, Tensor]]:
        """Embed text and images: ``inputs_embeds``, image tokens, identity maps and the losses of these.

        ``with_losses`` says that the losses of this batch are computed, with or without boxes.
        """
        if mm_token_type_ids is not None:
            unpacked = unpack_token_identities(mm_token_type_ids)
            image_roles = unpacked.get("image_roles", image_roles)
            sample_index = unpacked.get("sample_index", sample_index)
            identity_index = unpacked.get("identity_index", identity_index)
            token_identity_index = unpacked.get("token_identity_index", token_identity_index)
            name_mask = unpacked.get("name_mask", name_mask)
        has_images = pixel_values is not None or image_features is not None
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("input_ids and inputs_embeds are both given; pass one of the two.")
        if input_ids is None and inputs_embeds is None and not has_images:
            raise ValueError("there is no input; pass input_ids, inputs_embeds, or images alone.")
        if None not in (input_ids, token_identity_index) and token_identity_index.shape != input_ids.shape:
            raise ValueError(
                f"token_identity_index has shape {tuple(token_identity_index.shape)} and input_ids "
                f"{tuple(input_ids.shape)}; pass one index per token. For a trainer that appends answers to prompts "
                "(TRL), build the processor with pack_identities=True."
            )
        text = None if input_ids is None else self.get_input_embeddings()(input_ids)
        tokens = None if token_sample_index is None else tokens_of_samples(token_sample_index)
        is_image = None if input_ids is None else input_ids == self.config.image_token_id
        is_image_by_sample = is_image if tokens is None or is_image is None else unpack(is_image, tokens, False)
        images = image_tokens = maps = targets = None
        losses: dict[str, Tensor] = {}
        runs_all = runs_all_modules(self)
        if runs_all and not has_images and input_ids is not None and not holds_tokens(cache):
            self._check_no_placeholders(is_image)
            has_images = True  # zero images: a dummy image runs the modules that encode images
            pixel_values = torch.zeros(0, 3, 0, 0, device=input_ids.device)
            image_roles = sample_index = identity_index = torch.zeros(0, dtype=torch.long)

        if has_images:
            images = self._image_batch(
                pixel_values,
                image_features,
                image_roles,
                sample_index,
                identity_index,
                is_image=is_image_by_sample,
                identities=identities,
            )
            # Where all modules have to run, the losses are computed without boxes, too, and are then 0.
            is_supervised = self.id_former is not None and (
                boxes is not None or (runs_all and (self.training or with_losses))
            )
            if is_supervised:
                targets = target_identity_map(images, boxes, box_image, box_identity, image_sizes)
            image_tokens, maps = self._encode(
                images,
                target_identity_map=targets if teacher_forcing else None,
                name_embeddings=self._name_embeddings(text, token_identity_index, name_mask, images, tokens),
                output_identity_maps=output_identity_maps or is_supervised,
            )
            if is_supervised:
                losses = supervision_losses(
                    self.id_former,
                    images,
                    maps,
                    targets,
                    num_scenes=(
                        0 if boxes is None else int(supervised_scenes(*images.roles, box_image, box_identity).sum())
                    ),
                    identity_map_loss_weight=self.config.identity_map_loss_weight,
                    contrastive_loss_weight=self.config.contrastive_loss_weight,
                    gather_references=gather_references,
                )

        if input_ids is not None:
            learned = None if self.id_former is None else self.id_former.identity_embedding
            if learned is not None and (token_identity_index is not None or runs_all):
                if token_identity_index is None:
                    token_identity_index = torch.full_like(input_ids, NO_IDENTITY)
                text = add_learned_embeddings(text, token_identity_index, learned.table())
            inputs_embeds = self._insert_image_tokens(is_image, is_image_by_sample, text, image_tokens, images, cache)
        return inputs_embeds, image_tokens, maps, losses

    def _image_batch(
        self,
        pixel_values,
        image_features,
        image_roles,
        sample_index,
        identity_index,
        *,
        is_image=None,
        identities=None,
    ) -> ImageBatch:
        if (pixel_values is None) == (image_features is None):
            raise ValueError("pass either pixel_values or image_features.")
        if identities is not None:
            if pixel_values is None or image_roles is None or sample_index is None or identity_index is None:
                raise ValueError(
                    "identities need pixel_values, image_roles, sample_index and identity_index of all images; pass "
                    "the outputs of the processor."
                )
            stored = identities.stored(image_roles, sample_index, identity_index)
            features, grid_size = self._features_with_stored(pixel_values, stored)
        elif pixel_values is not None:
            features, grid_size = self.image_features(pixel_values)
        else:
            features, grid_size = image_features, None
        parameters = (parameter for parameter in self._joint.parameters() if parameter.is_floating_point())
        dtype = next((parameter.dtype for parameter in parameters), self.dtype)  # others are quantised
        needs_samples = self.id_former is not None and image_roles is not None
        if sample_index is None and (needs_samples or self.image_index_embedding is not None):
            raise ValueError("images without sample_index: pass the row of the batch that each image belongs to.")
        if image_roles is None:
            image_roles = torch.full((len(features),), ImageRole.GENERAL)
        if sample_index is None:
            if is_image is None:
                sample_index = torch.zeros(len(features), dtype=torch.long)
            else:
                sample_index = rows_of_images(is_image, len(features), self.config.image_seq_length)
        return ImageBatch(features.to(dtype), grid_size, image_roles, sample_index, identity_index)

    def _features_with_stored(
        self, pixel_values: Tensor, stored: dict[int, StoredPhoto]
    ) -> tuple[Tensor, tuple[int, int] | None]:
        """Features of all images, of which the vision tower encodes those that are not ``stored``."""
        new = images_to_encode(len(pixel_values), stored)
        features, grid_size = self.image_features(pixel_values[new])
        of_photos = {image: photo.features for image, photo in stored.items()}
        return torch.stack(with_stored(features, new, of_photos, len(pixel_values))), grid_size

    def _encode(
        self,
        images: ImageBatch,
        *,
        target_identity_map: Tensor | None = None,
        name_embeddings: tuple[Tensor, Tensor | None] | None = None,
        output_identity_maps: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Map features to image tokens, and return the identity maps or None."""
        maps = None
        if self.id_former is not None:
            image_tokens = self.id_former(
                images.features,
                *images.roles,
                grid_size=images.grid_size,
                target_identity_map=target_identity_map,
                name_embeddings=name_embeddings,
                output_attentions=output_identity_maps,
            )
            if output_identity_maps:
                image_tokens, maps = image_tokens
        elif self.config.connector == "resampler":  # its class may be hidden by a wrapper, for example of peft
            image_tokens = self.connector(images.features, grid_size=images.grid_size)
        else:
            image_tokens = self.connector(images.features)
        if self.image_index_embedding is not None:
            embeddings = self.image_index_embedding.embed_images(images.image_roles, images.sample_index)
            image_tokens = image_tokens + embeddings[:, None]
        return image_tokens, maps

    def _name_embeddings(
        self,
        text: Tensor | None,
        token_identity_index: Tensor | None,
        name_mask: Tensor | None,
        images: ImageBatch,
        tokens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return the ``name_embeddings`` of :meth:`idavlm.IDFormer.forward` for a prompt, or None without need.

        ``tokens``: where the tokens of each sample are in packed rows, or None.
        """
        if text is None or self.id_former is None or self.id_former.identity_embedding_type != "name":
            return None
        null = None
        if self.config.null_name_token_id is not None:  # through the module: its weight may be partitioned
            token = torch.tensor([self.config.null_name_token_id], device=text.device)
            null = self.get_input_embeddings()(token)[0]
        num_identities, num_samples = count_identities(images), len(text if tokens is None else tokens)
        if num_identities == 0:
            return text.new_zeros(num_samples, 0, text.shape[-1]), null
        if token_identity_index is None or name_mask is None:
            raise ValueError(
                "identity_embedding='name' needs token_identity_index and name_mask with identities; encode and "
                "collate of the processor make both."
            )
        if tokens is not None:
            text = unpack(text, tokens, 0)
            token_identity_index, name_mask = unpack(token_identity_index, tokens, -1), unpack(name_mask, tokens, False)
        return mean_name_embeddings(text, token_identity_index, name_mask, num_identities), null

    def _insert_image_tokens(
        self,
        is_image: Tensor,
        is_image_by_sample: Tensor,
        text: Tensor,
        image_tokens: Tensor | None,
        images: ImageBatch | None,
        cache,
    ) -> Tensor:
        """Put the image tokens of each sample in the place of its placeholders ``is_image``.

        If the cache holds the start of the conversation, the last images of a row are those whose placeholders follow
        the cache; the others have been read.
        """
        if images is None:
            self._check_no_placeholders(is_image)
            return text
        is_continued = holds_tokens(cache)
        if is_continued and self.id_former is not None:
            check_references(images.image_roles, images.sample_index)
        num_queries = image_tokens.shape[1]
        unread = unread_images(is_image_by_sample, images.sample_index, num_queries, is_continued=is_continued)
        return scatter_image_tokens(text, is_image, image_tokens if unread is None else image_tokens[unread])

    def _check_no_placeholders(self, is_image: Tensor) -> None:
        if is_image.any():
            raise ValueError(
                f"the text holds {int(is_image.sum())} image placeholders but 0 images; pass pixel_values."
            )

    def _initialise_missing(self) -> None:
        """Copy initial values into parameters that a checkpoint does not have, part by part."""

        def new_adaptors() -> nn.Module:
            self.language_model.tie_weights()  # a tied head has no values before
            options = self.language_model.inner_adaptor.options
            return new_inner_adaptor(self.language_model, options, _connector_to_copy(options, self.connector))

        parts = {self._joint: lambda: _build_joint(self.config)}
        if self.image_index_embedding is not None:
            parts[self.image_index_embedding] = lambda: _build_image_index_embedding(self.config)
        if self.config.inner_adaptors is not None:
            parts[self.language_model.inner_adaptor] = new_adaptors
            self.language_model.requires_grad_(False)  # from_pretrained has replaced the frozen parameters
            inner_adaptor = self.language_model.inner_adaptor
            inner_adaptor.share_base_layers(self.language_model)  # they may have been replaced by quantised ones
            for parameter in inner_adaptor.parameters():
                parameter.requires_grad_(parameter.is_floating_point())  # others are quantised
        for part, build in parts.items():
            quantized = [name for name, parameter in part.named_parameters() if not parameter.is_floating_point()]
            missing = {
                name: tensor
                for name, tensor in part.state_dict(keep_vars=True).items()
                # 4-bit weights have further entries, such as weight.absmax
                if not getattr(tensor, "_is_hf_initialized", False) and not name.startswith(tuple(quantized))
            }
            initial = build().state_dict() if missing else {}
            for name, tensor in missing.items():
                tensor.copy_(initial[name])


class IDAVLMForConditionalGeneration(IDAVLMModel, ImageGenerationMixin):
    """An identity-aware vision-language model for training and generation.

    Parts: ``vision_tower`` (any transformers vision model), ``id_former`` or ``connector``, ``image_index_embedding``
    (if ``max_images`` is set) and ``language_model`` (any transformers causal language model with its head). If the
    configuration has inner adaptors, the language model has them, and ``forward`` and ``generate`` take ``workflow=``.
    Build a model from a configuration, from parts (:meth:`from_parts`) or from a checkpoint (``from_pretrained``).

    Args:
        config: the configuration. Building a model does not change it.
        vision_tower: instance to use; built from the configuration if None.
        language_model: instance to use; built from the configuration if None.

    Raises:
        ValueError: the configuration is incomplete or does not fit the parts.
    """

    @property
    def base_model(self) -> "WithoutHead":
        """This model as an :class:`IDAVLMModel`. Trainers that apply the head themselves (TRL) call it."""
        return WithoutHead(self)

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
        mm_token_type_ids: Tensor | None = None,
        token_sample_index: Tensor | None = None,
        teacher_forcing: bool = False,
        gather_references: bool = False,
        output_identity_maps: bool = False,
        identities: SelectedIdentities | None = None,
        **kwargs,
    ) -> IDAVLMOutput:
        """Process text and images. With ``labels`` also compute the losses. Images alone skip the language model.

        Args:
            input_ids: ``[B, T]`` with ``image_token_id`` in the place of each image token.
            attention_mask: ``[B, T]``, 1 for tokens and 0 for padding.
            position_ids: ``[B, T]``.
            cache: a transformers cache; named ``past_key_values`` before transformers 5.24.
            inputs_embeds: ``[B, T, C]`` instead of ``input_ids``. It includes the image tokens; none are inserted.
            labels: ``[B, T]``, -100 where there is no target. In training mode the logits are then computed for
                labelled tokens only, which saves most of their memory, and are not returned.
            token_identity_index: ``[B, T]`` identity that a token is about, -1 for none. With a learned identity
                embedding, the embedding is added to these tokens.
            name_mask: ``[B, T]`` whether a token spells a name; needed with ``identity_embedding="name"``.
            pixel_values, image_features, image_roles, sample_index, identity_index: see :meth:`encode_images`.
            image_sizes: ``[I, 2]`` height and width of the original images; needed with boxes.
            boxes: ``[N, 4]`` pixels of identities that have references; they supervise the identity attention.
            box_image: ``[N]`` image of each box, counted over the batch.
            box_identity: ``[N]`` identity of each box within its sample.
            mm_token_type_ids: ``[B, T]`` with the fields of the identities, from a processor with ``pack_identities``.
            token_sample_index: ``[R, L]`` sample of each token in packed rows, -1 at padding. All fields of tokens then
                have this shape, ``position_ids`` start again with each sample, and there is no ``attention_mask``;
                :class:`idavlm.data.PackingCollator` makes such batches.
            teacher_forcing: add identity embeddings to image tokens according to the boxes instead of the identity map.
            gather_references: see :meth:`idavlm.IDFormer.contrastive_loss`.
            output_identity_maps: also return the identity maps.
            identities: identities of an :class:`IdentityBank`. The vision tower does not encode their photos again.
            kwargs: arguments of the language model (``use_cache``, ``output_attentions``, ``logits_to_keep``, ...).

        Raises:
            ValueError: arguments that do not fit each other, with the argument and the remedy.
        """
        inputs_embeds, image_tokens, maps, losses = self._embed(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            token_identity_index=token_identity_index,
            name_mask=name_mask,
            pixel_values=pixel_values,
            image_features=image_features,
            image_roles=image_roles,
            sample_index=sample_index,
            identity_index=identity_index,
            image_sizes=image_sizes,
            boxes=boxes,
            box_image=box_image,
            box_identity=box_identity,
            mm_token_type_ids=mm_token_type_ids,
            token_sample_index=token_sample_index,
            teacher_forcing=teacher_forcing,
            gather_references=gather_references,
            output_identity_maps=output_identity_maps,
            identities=identities,
            with_losses=labels is not None,
        )
        if inputs_embeds is None:
            loss = losses.get("auxiliary_loss")
            return IDAVLMOutput(loss=loss, **losses, image_hidden_states=image_tokens, identity_maps=maps)

        arguments = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache, **kwargs}
        targets = None if labels is None else F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()
        # As with a fused loss: in training mode there are no logits beside the loss.
        skip_logits = self.training and labels is not None
        head = self.get_output_embeddings()
        at_labels = head_at_positions(head, targets != IGNORE_INDEX) if skip_logits else nullcontext()
        with at_labels, packed_rows(self.language_model, token_sample_index, arguments) as of_rows:
            outputs = self.language_model(inputs_embeds=inputs_embeds, **arguments | of_rows)
        loss, logits = None, outputs.logits
        if labels is not None:
            # The logits may be those of the labelled tokens only.
            shift_labels = targets if logits.shape[:2] == targets.shape else targets[targets != IGNORE_INDEX]
            losses["language_loss"] = self.loss_function(
                logits, labels=None, shift_labels=shift_labels.to(logits.device), vocab_size=logits.shape[-1]
            )
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


class WithoutHead:
    """Calls :meth:`IDAVLMModel.forward` of a model that overrides it."""

    _tp_plan = _pp_plan = None  # transformers asks the base model for them

    def __init__(self, model: IDAVLMForConditionalGeneration):
        self.model = model

    def __call__(self, *args, **kwargs) -> IDAVLMModelOutput:
        return IDAVLMModel.forward(self.model, *args, **kwargs)


@contextmanager
def head_at_positions(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Apply ``head`` to hidden states ``[B, T, C]`` at ``positions`` ``[B, T]`` only, as ``[1, N, C]``.

    What the language model does to its logits after the head, such as scaling or capping, still happens.
    """
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][positions.to(inputs[0].device)][None],))
    try:
        yield
    finally:
        hook.remove()


def _build_joint(config: IDAVLMConfig) -> nn.Module:
    """Build the ID-Former or the connector of a configuration."""
    width = config.text_config.get_text_config().hidden_size
    options = {"hidden_size": width, **config.connector_config, "vision_hidden_size": features_width(config)}
    has_queries = config.connector in ("id_former", "resampler")
    if config.image_seq_length is None:
        needed = "num_queries" if has_queries else "image_seq_length"
        raise ValueError(f"connector={config.connector!r} needs {needed}, the number of image tokens per image.")
    if has_queries:
        if "num_heads" not in options:
            raise ValueError(f"connector={config.connector!r} needs num_heads in connector_config (or in from_parts).")
        options["output_size"] = width
        options["num_queries"] = config.image_seq_length
        options.setdefault("attn_implementation", config._attn_implementation or "sdpa")
    if config.connector == "id_former":
        return find_id_former(config.id_former_class)(**options)
    return build_connector(config.connector, **options)


def _build_image_index_embedding(config: IDAVLMConfig) -> ImageIndexEmbedding | None:
    if config.max_images is None:
        return None
    return ImageIndexEmbedding(config.max_images, config.text_config.get_text_config().hidden_size)


def _prepare_inner_adaptors(config: IDAVLMConfig, language_model: nn.Module, connector: nn.Module | None) -> None:
    """Add the inner adaptors of the configuration, unless the language model has these already."""
    present = getattr(language_model, "inner_adaptor", None)
    if present is not None:
        if "connector" in present.options["modules_to_copy"]:
            raise ValueError(
                "the workflows of the language model hold copies of another connector; pass a language model without "
                "adaptors, and inner_adaptors=... to from_parts or IDAVLMConfig."
            )
        if config.inner_adaptors != dict(present.options):
            raise ValueError(
                f"inner_adaptors={config.inner_adaptors} but the language model has inner adaptors with "
                f"{dict(present.options)}; use from_parts, or pass a language model without adaptors."
            )
    elif config.inner_adaptors is not None:
        connector = _connector_to_copy(config.inner_adaptors, connector)
        add_inner_adaptors(language_model, **config.inner_adaptors, connector=connector)


def _connector_to_copy(options: dict, connector: nn.Module | None) -> nn.Module | None:
    return connector if "connector" in options.get("modules_to_copy", ()) else None


def _load_vision_tower(vision_tower: PreTrainedModel | str) -> PreTrainedModel:
    if isinstance(vision_tower, str):
        vision_tower = AutoModel.from_pretrained(vision_tower)
    # Of a model of images and text, such as CLIP, the vision part, if its configuration builds that very class.
    part = getattr(vision_tower, "vision_model", None)
    if part is not None and MODEL_MAPPING.get(type(getattr(part, "config", None)), None) is type(part):
        return part
    return vision_tower


def _load_language_model(language_model: PreTrainedModel | str, image_token_id: int) -> PreTrainedModel:
    if isinstance(language_model, str):
        language_model = AutoModelForCausalLM.from_pretrained(language_model)
    name = type(language_model).__name__
    is_vlm = type(language_model.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if is_vlm or language_model.get_output_embeddings() is None:
        problem = "is a whole vision-language model" if is_vlm else "has no language modelling head"
        raise ValueError(
            f"language_model={name} {problem}; pass a causal language model, for example one that "
            "AutoModelForCausalLM.from_pretrained loads."
        )
    vocabulary = language_model.get_input_embeddings().num_embeddings
    if not 0 <= image_token_id < vocabulary:
        raise ValueError(
            f"image_token_id={image_token_id} lies outside the {vocabulary} embeddings of the language model; call "
            "language_model.resize_token_embeddings(len(tokenizer)) first."
        )
    return language_model
