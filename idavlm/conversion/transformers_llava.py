"""LLaVA of transformers: any language model, any vision tower, such as llava-Qwen2-7B-Instruct-Chinese-CLIP."""

from transformers import AutoConfig

from idavlm.conversion.errors import ConversionError
from idavlm.conversion.mapping import KeyMap, Rule, with_rows
from idavlm.conversion.parts import (
    read_image_processor,
    read_tokenizer,
    token_ids,
    tokens_of_image,
    tower_rules,
)
from idavlm.conversion.plan import Places, Plan
from idavlm.conversion.source import Source
from idavlm.data.chat_templates import QWEN_CHATML, VICUNA
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.processing import IDAVLMProcessor

NAME = "LLaVA of transformers"
TEMPLATES = {"llama": VICUNA, "qwen2": QWEN_CHATML}
"""By language model, where the checkpoint has none for text."""
LOOKS = "model_type 'llava' with text_config and vision_config"


def matches(source: Source) -> bool:
    parts = {"text_config", "vision_config"} <= source.config.keys()
    return parts and source.config.get("model_type") == "llava"


def plan(source: Source, places: Places) -> Plan:
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
    tokenizer = read_tokenizer(source, places)
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_index)
    if image_token is None:
        raise ConversionError(
            f"{source.folder}: image_token_index={config.image_token_index} is no token of the tokenizer "
            f"({len(tokenizer)} tokens); add it there."
        )
    tokens = tokens_of_image(config.vision_config, with_cls=with_cls)
    vocab_size = max(config.text_config.vocab_size, len(tokenizer))
    config.text_config.vocab_size = vocab_size
    return Plan(
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
        generation=token_ids(source, tokenizer),
    )


def _chat_template(source: Source, tokenizer) -> str:
    """The tokenizer's, if it takes messages of text; many are written for lists of parts, and leave text out."""
    messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": "An answer."}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        text = ""
    if all(message["content"] in text for message in messages):
        return tokenizer.chat_template
    known = TEMPLATES.get(source.config["text_config"].get("model_type"))
    if known is None:
        raise ConversionError(
            f"{source.folder}: the tokenizer has no chat_template that takes messages of text; set one, save the "
            "tokenizer and give its folder with tokenizer= (--tokenizer)."
        )
    return known


def _rules(vocab_size: int) -> list[Rule]:
    """As transformers names them on disk, which is as version 4 did, and in memory since version 5, as peft does."""
    rows = with_rows(vocab_size)
    decoder = r"(?:language_model\.model|model\.language_model)\."
    return [
        Rule(r".*\.rotary_emb\.inv_freq", {}),
        Rule(r"(?:model\.)?multi_modal_projector\.linear_1\.(.*)", {r"connector.0.\1": None}),
        Rule(r"(?:model\.)?multi_modal_projector\.linear_2\.(.*)", {r"connector.2.\1": None}),
        Rule(decoder + r"(embed_tokens\.weight)", {r"language_model.model.\1": rows}),
        Rule(r"(?:language_model\.)?(lm_head\.weight)", {r"language_model.\1": rows}),
        Rule(decoder + r"(.*)", {r"language_model.model.\1": None}),
    ]
