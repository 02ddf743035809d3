"""Configuration of an identity-aware VLM: nested configurations of its parts."""

from transformers import AutoConfig, PretrainedConfig

from idavlm._compat import cache_name
from idavlm.utils import check_choice, check_positive

VISION_FEATURES = ("patch", "cls", "all")
OPTIONS = (
    "image_seq_length",
    "vision_feature_layer",
    "vision_feature_select",
    "identity_map_loss_weight",
    "contrastive_loss_weight",
    "image_token_scale",
    "names_as_marks",
    "null_name_token_id",
    "max_images",
    "inner_adaptors",
)
"""Arguments of :class:`IDAVLMConfig` beside the parts and the connector."""


class IDAVLMConfig(PretrainedConfig):
    """Vision tower -> connector or ID-Former -> language model.

    Args:
        vision_config: configuration (or its dict with ``model_type``) of a transformers vision model. timm models come
            through ``TimmWrapperConfig``.
        text_config: configuration (or its dict) of a transformers causal language model.
        connector: ``"id_former"``, or a kind of :func:`idavlm.build_connector`: ``"resampler"``, ``"mlp2x_gelu"``, ...
        connector_config: options of the ID-Former (:class:`idavlm.IDFormer`) or the connector; the two widths come from
            the parts. A narrower ``hidden_size`` may be given with ``output_proj=True``, which leads to the language
            model's.
        image_token_id: id of the placeholder that image tokens replace.
        image_seq_length: image tokens of one image; ``num_queries`` of an ID-Former or resampler.
        vision_feature_layer: hidden state of the vision tower that is read: -1 its output, -2 the layer before, ...
        vision_feature_select: ``"patch"`` leaves out leading tokens such as CLS, ``"cls"`` keeps only them, ``"all"``
            keeps everything. An ID-Former needs ``"patch"``.
        identity_map_loss_weight: factor of :meth:`idavlm.IDFormer.identity_map_loss`, which exists where boxes are given.
        contrastive_loss_weight: factor of :meth:`idavlm.IDFormer.contrastive_loss`, computed where it is not 0 and boxes are
            given. For models from scratch.
        image_token_scale: factor of image tokens where they are put among the embeddings of text. The embeddings of
            a new language model are small; image tokens many times as strong hide what its first layers add to them.
        names_as_marks: mark image tokens by the embeddings of the names in the prompt, as ``max_identities`` of an
            ID-Former marks them by learned ones: a language model that can read is then told in its own words who is
            where (:func:`idavlm.models.name_marks.name_marks`).
        null_name_token_id: with ``names_as_marks``, id of a token whose embedding takes the share that is nobody's, so that
            an image token is as strong as a word wherever it looks, and not content alone.
        inner_adaptors: arguments of :func:`idavlm.add_inner_adaptors`, e.g. ``{"every": 4}``; the language model is
            then frozen. ``owned`` may hold ``"connector"``, but not with an ID-Former, which all workflows share.
        max_images: so many pictures of a sample, references not counted, are told apart by marks on their
            tokens (:class:`idavlm.modules.ImageIndexEmbedding`); 0 for none. For models from scratch.
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

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        connector: str = "id_former",
        connector_config: dict | None = None,
        image_token_id: int | None = None,
        image_seq_length: int | None = None,
        vision_feature_layer: int = -1,
        vision_feature_select: str = "patch",
        identity_map_loss_weight: float = 1.0,
        contrastive_loss_weight: float = 0.0,
        image_token_scale: float = 1.0,
        names_as_marks: bool = False,
        null_name_token_id: int | None = None,
        inner_adaptors: dict | None = None,
        max_images: int = 0,
        **kwargs,
    ):
        check_choice("vision_feature_select", vision_feature_select, VISION_FEATURES)
        if connector == "id_former" and vision_feature_select != "patch":
            raise ValueError(
                f"vision_feature_select={vision_feature_select!r} with an ID-Former: it reads a grid of patches; "
                "use 'patch'."
            )
        if vision_feature_layer >= 0:
            raise ValueError(f"vision_feature_layer={vision_feature_layer} counts from the end: -1, -2, ...")
        check_positive(image_seq_length=image_seq_length)
        for name, weight in (("identity", identity_map_loss_weight), ("contrast", contrastive_loss_weight)):
            if weight < 0:
                raise ValueError(f"{name}_loss_weight={weight} must be at least 0.")
        if not image_token_scale > 0:
            raise ValueError(f"image_token_scale={image_token_scale} must be above 0.")
        if connector == "id_former" and "connector" in (inner_adaptors or {}).get("modules_to_copy", ()):
            raise ValueError(
                "inner_adaptors: owned holds 'connector', but connector='id_former' is one for all workflows; leave it "
                "out, or choose another connector."
            )
        if names_as_marks and (connector != "id_former" or (connector_config or {}).get("max_identities")):
            raise ValueError(
                "names_as_marks=True needs connector='id_former', which finds the persons, and takes the place of its "
                f"max_identities; connector={connector!r}, connector_config={connector_config}."
            )
        if null_name_token_id is not None and not names_as_marks:
            raise ValueError(
                f"null_name_token_id={null_name_token_id} needs names_as_marks=True, beside which it stands."
            )
        if max_images != 0:
            check_positive(max_images=max_images)
        text_config = _sub_config("text_config", text_config)
        # The language model ties its own head; nothing is tied across parts.
        kwargs["tie_word_embeddings"] = bool(getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        # After super().__init__: it would reset the attention implementation of its sub-configurations.
        self.vision_config = _sub_config("vision_config", vision_config)
        self.text_config = text_config
        self.connector = connector
        self.connector_config = dict(connector_config or {})
        self.image_token_id = image_token_id
        self.image_seq_length = image_seq_length
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select = vision_feature_select
        self.identity_map_loss_weight = identity_map_loss_weight
        self.contrastive_loss_weight = contrastive_loss_weight
        self.image_token_scale = image_token_scale
        self.names_as_marks = names_as_marks
        self.null_name_token_id = null_name_token_id
        self.inner_adaptors = None if inner_adaptors is None else dict(inner_adaptors)
        self.max_images = max_images

    def get_text_config(self, *args, **kwargs):
        text_config = getattr(self, "text_config", None)
        return self if text_config is None else text_config.get_text_config(*args, **kwargs)


def _sub_config(name: str, config) -> PretrainedConfig | None:
    if config is None or isinstance(config, PretrainedConfig):
        return config
    if "model_type" not in config:
        raise ValueError(f"{name} has no 'model_type'; give a transformers configuration or its dict.")
    return AutoConfig.for_model(**config)
