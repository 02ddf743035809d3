"""Format of ``LlavaForConditionalGeneration`` with any language model and vision tower."""

from transformers import AutoConfig

from idavlm.conversion.checkpoint_files import ConversionError, SourceCheckpoint
from idavlm.conversion.checkpoint_format import (
    CheckpointFormat,
    ConversionPlan,
    PartFolders,
    generation_tokens,
    num_image_tokens,
    read_image_processor,
    read_tokenizer,
    tower_rules,
)
from idavlm.conversion.key_mapping import KeyMap, Rule, resize_rows
from idavlm.data.chat_templates import QWEN_CHATML, VICUNA
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.processing import IDAVLMProcessor

TEMPLATES = {"llama": VICUNA, "qwen2": QWEN_CHATML}
"""``model_type`` of the language model -> chat template, if the tokenizer has none for text messages."""


def _matches(source: SourceCheckpoint) -> bool:
    has_parts = {"text_config", "vision_config"} <= source.config.keys()
    return has_parts and source.config.get("model_type") == "llava"


def _plan(source: SourceCheckpoint, folders: PartFolders) -> ConversionPlan:
    config = AutoConfig.for_model(**source.config)
    if not config.multimodal_projector_bias or config.projector_hidden_act != "gelu":
        raise ConversionError(
            f"{source.folder}: multimodal_projector_bias={config.multimodal_projector_bias}, projector_hidden_act="
            f"{config.projector_hidden_act!r}; expected True and 'gelu'."
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ConversionError(
            f"{source.folder}: vision_feature_layer={config.vision_feature_layer}; expected one layer."
        )
    with_cls = config.vision_feature_select_strategy == "full"
    tokenizer = read_tokenizer(source, folders)
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_index)
    if image_token is None:
        raise ConversionError(
            f"{source.folder}: image_token_index={config.image_token_index} is not a token of the tokenizer "
            f"({len(tokenizer)} tokens); add it to the tokenizer."
        )
    tokens = num_image_tokens(config.vision_config, with_cls=with_cls)
    vocab_size = max(config.text_config.vocab_size, len(tokenizer))
    config.text_config.vocab_size = vocab_size
    return ConversionPlan(
        config=IDAVLMConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            connector="mlp2x_gelu",
            image_token_id=config.image_token_index,
            image_seq_length=tokens,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select="all" if with_cls else "patch",
        ),
        key_map=KeyMap([*_rules(vocab_size), *tower_rules(config.vision_config, r"(?:model\.)?vision_tower\.")]),
        processor=IDAVLMProcessor(
            read_image_processor(source.folder),
            tokenizer,
            chat_template=_chat_template(source, tokenizer),
            image_seq_length=tokens,
            image_token=image_token,
            box_format="unit",
        ),
        generation=generation_tokens(source, tokenizer),
    )


def _chat_template(source: SourceCheckpoint, tokenizer) -> str:
    """Template of the tokenizer if it supports text messages; many support lists of parts only and drop plain text."""
    messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": "An answer."}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        text = ""
    if all(message["content"] in text for message in messages):
        return tokenizer.chat_template
    template = TEMPLATES.get(source.config["text_config"].get("model_type"))
    if template is None:
        raise ConversionError(
            f"{source.folder}: the tokenizer has no chat_template that supports text messages; set one, save the "
            "tokenizer and pass its folder with tokenizer= (--tokenizer)."
        )
    return template


def _rules(vocab_size: int) -> list[Rule]:
    """Rules for the names of transformers 4 (used on disk) and of transformers 5 (used by peft)."""
    rows = resize_rows(vocab_size)
    decoder = r"(?:language_model\.model|model\.language_model)\."
    return [
        Rule(r".*\.rotary_emb\.inv_freq", {}),
        Rule(r"(?:model\.)?multi_modal_projector\.linear_1\.(.*)", {r"connector.0.\1": None}),
        Rule(r"(?:model\.)?multi_modal_projector\.linear_2\.(.*)", {r"connector.2.\1": None}),
        Rule(decoder + r"(embed_tokens\.weight)", {r"language_model.model.\1": rows}),
        Rule(r"(?:language_model\.)?(lm_head\.weight)", {r"language_model.\1": rows}),
        Rule(decoder + r"(.*)", {r"language_model.model.\1": None}),
    ]


TRANSFORMERS_LLAVA = CheckpointFormat(
    name="LLaVA of transformers",
    signature="model_type 'llava' with text_config and vision_config",
    matches=_matches,
    plan=_plan,
)
