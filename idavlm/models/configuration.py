"""Configuration of an identity-aware VLM: the configurations of its parts and of what joins them."""

import math

from transformers import AutoConfig, PretrainedConfig

from idavlm._compat import cache_name
from idavlm.models.id_former_class import find_id_former
from idavlm.modules import Resampler, add_inner_adaptors
from idavlm.modules.connectors import build_connector, check_connector
from idavlm.utils import check_arguments, check_choice, check_positive, check_type


class IDAVLMConfig(PretrainedConfig):
    """Configuration of :class:`IDAVLMForConditionalGeneration`: vision tower, ID-Former or connector, language model.

    Args:
        vision_config: configuration (or its dictionary with ``model_type``) of a transformers vision model. timm models
            are supported through ``TimmWrapperConfig``.
        text_config: configuration (or its dictionary) of a transformers causal language model.
        connector: ``"id_former"``, or a kind of :func:`idavlm.build_connector` such as ``"resampler"`` or
            ``"mlp2x_gelu"``.
        connector_config: arguments of the ID-Former (:class:`idavlm.IDFormer`) or the connector. The widths come from
            the parts. A narrower ``hidden_size`` needs ``output_proj=True``, which projects to the width of the
            language model.
        id_former_class: import path of a subclass of :class:`idavlm.IDFormer` that is built in its place, such as
            ``"my_package.MyIDFormer"``. Its module must have been imported. ``connector_config`` holds its arguments.
        image_token_id: id of the placeholder token that image tokens replace.
        image_seq_length: number of image tokens per image. An ID-Former and a resampler set it to ``num_queries``.
        vision_feature_layer: hidden state of the vision tower to use: -1 for the output, -2 for the layer before, ...
        vision_feature_select: ``"patch"`` drops leading tokens such as CLS, ``"cls"`` keeps only these, ``"all"`` keeps
            all tokens. An ID-Former needs ``"patch"``.
        identity_map_loss_weight: weight of :meth:`idavlm.IDFormer.identity_map_loss`, computed if boxes are passed.
        contrastive_loss_weight: weight of :meth:`idavlm.IDFormer.contrastive_loss`, computed if it is not 0 and boxes
            are passed.
        null_name_token_id: with ``identity_embedding="name"``, id of a token whose embedding represents null: image
            tokens get it in proportion to the null share of the identity map. None adds nothing for null.
        inner_adaptors: arguments of :func:`idavlm.add_inner_adaptors`, for example ``{"every": 4}``. The language model
            is then frozen. ``modules_to_copy`` may contain ``"connector"``, but not with an ID-Former, which all
            workflows share.
        max_images: largest number of images in a sample, references not counted, that an
            :class:`idavlm.ImageIndexEmbedding` tells apart. None for no such embedding.

    Raises:
        ValueError: values of the wrong type or out of range, or that do not fit each other, with the argument and the
            remedy.
    """

    model_type = "idavlm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = [  # noqa: RUF012
        cache_name(),
        "language_loss",
        "identity_map_loss",
        "contrastive_loss",
        "auxiliary_loss",
        "image_hidden_states",
        "identity_maps",
    ]

    vision_config: PretrainedConfig | dict | None = None
    text_config: PretrainedConfig | dict | None = None
    connector: str = "id_former"
    connector_config: dict | None = None
    id_former_class: str | None = None
    image_token_id: int | None = None
    image_seq_length: int | None = None
    vision_feature_layer: int = -1
    vision_feature_select: str = "patch"
    identity_map_loss_weight: float = 1.0
    contrastive_loss_weight: float = 0.0
    null_name_token_id: int | None = None
    inner_adaptors: dict | None = None
    max_images: int | None = None

    def __post_init__(self, **kwargs):
        for name, annotation in IDAVLMConfig.__annotations__.items():
            check_type(name, getattr(self, name), annotation)
        vision_config, text_config = self.vision_config, self.text_config
        # super().__post_init__ would reset the attention implementation of the sub-configurations.
        self.vision_config = self.text_config = None
        super().__post_init__(**kwargs)
        self.vision_config = _sub_config("vision_config", vision_config)
        self.text_config = _sub_config("text_config", text_config)
        # The language model ties its own head; nothing is tied across parts.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.connector_config = dict(self.connector_config or {})
        self.inner_adaptors = None if self.inner_adaptors is None else dict(self.inner_adaptors)
        check_positive(image_seq_length=self.image_seq_length, max_images=self.max_images)
        self._check_parts()
        vocab_size = None if self.text_config is None else self.text_config.get_text_config().vocab_size
        for name in ("image_token_id", "null_name_token_id"):
            token = getattr(self, name)
            if token is not None and token < 0:
                raise ValueError(f"{name}={token} must be at least 0.")
            if token is not None and vocab_size is not None and token >= vocab_size:
                raise ValueError(
                    f"{name}={token} lies outside the vocab_size={vocab_size} of text_config; call "
                    "language_model.resize_token_embeddings(len(tokenizer)) first."
                )
        check_choice("vision_feature_select", self.vision_feature_select, ("patch", "cls", "all"))
        if self.vision_feature_layer >= 0:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer} must be negative: -1, -2, ... from the end."
            )
        for name in ("identity_map_loss_weight", "contrastive_loss_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number of at least 0.")
        if self.connector in ("id_former", "resampler"):
            num_queries = self.connector_config.get("num_queries", self.image_seq_length)
            if self.image_seq_length not in (None, num_queries):
                raise ValueError(
                    f"num_queries={num_queries} but image_seq_length={self.image_seq_length}; with connector="
                    f"{self.connector!r} they are the same number: leave image_seq_length out."
                )
            self.image_seq_length = num_queries
        if self.connector == "id_former" and self.vision_feature_select != "patch":
            raise ValueError(
                f"vision_feature_select={self.vision_feature_select!r} does not work with an ID-Former, which needs a "
                "grid of patches; use 'patch'."
            )
        if self.connector == "id_former" and "connector" in (self.inner_adaptors or {}).get("modules_to_copy", ()):
            raise ValueError(
                "inner_adaptors: modules_to_copy holds 'connector', but all workflows share connector='id_former'; "
                "leave it out, or choose another connector."
            )
        if self.null_name_token_id is not None and self.connector_config.get("identity_embedding") != "name":
            raise ValueError(
                f"null_name_token_id={self.null_name_token_id} needs an ID-Former with identity_embedding='name'; "
                "leave it out."
            )

    def _check_parts(self) -> None:
        """Check the arguments of the ID-Former or connector, and of the inner adaptors."""
        if self.id_former_class is not None and self.connector != "id_former":
            raise ValueError(
                f"id_former_class={self.id_former_class!r} has no effect with connector={self.connector!r}; leave it "
                "out, or use connector='id_former'."
            )
        if self.connector == "id_former":
            built, set_by_model = find_id_former(self.id_former_class), ("output_size",)
        elif self.connector == "resampler":
            built, set_by_model = Resampler, ("output_size",)
        else:
            check_connector("connector", self.connector)
            built, set_by_model = build_connector, ("kind", "options")
        check_arguments("connector_config", self.connector_config, built, exclude=set_by_model)
        if self.inner_adaptors is not None:
            set_by_model = ("language_model", "connector")
            check_arguments("inner_adaptors", self.inner_adaptors, add_inner_adaptors, exclude=set_by_model)

    def get_text_config(self, *args, **kwargs):
        text_config = getattr(self, "text_config", None)
        return self if text_config is None else text_config.get_text_config(*args, **kwargs)


def _sub_config(name: str, config: PretrainedConfig | dict | None) -> PretrainedConfig | None:
    if config is None or isinstance(config, PretrainedConfig):
        return config
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{name} has no 'model_type'; pass a transformers configuration or its dictionary.")
    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # transformers raises errors of many kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} describes no model of type {config['model_type']!r} ({reason[:400]}).") from error
