"""LLaVA-1.5 in its authors' format, which YAICON and others share: Llama, an MLP, CLIP in its own folder or inside."""

from collections.abc import Sequence

from idavlm.conversion.errors import ConversionError
from idavlm.conversion.mapping import KeyMap, Rule, with_rows
from idavlm.conversion.parts import (
    TOWER,
    add_image_token,
    add_tower_weights,
    embeddings_for,
    gap_behind,
    llama_config,
    padding_to_square,
    read_image_processor,
    read_tokenizer,
    token_ids,
    tokens_of_image,
    tower_config,
    tower_folder,
    tower_rules,
)
from idavlm.conversion.plan import Places, Plan
from idavlm.conversion.source import Source
from idavlm.data.chat_templates import VICUNA
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.processing import IDAVLMProcessor

NAME = "LLaVA-1.5"
LOOKS = "keys model.mm_projector.*, mm_projector_type without norm"
INSIDE = "model.vision_tower.vision_tower."


def matches(source: Source) -> bool:
    return has_projector(source) and not is_normed(source)


def plan(source: Source, places: Places) -> Plan:
    tokenizer = read_tokenizer(source, places)
    return plan_llava(source, places, tokenizer, image_token="<image>", chat_template=VICUNA, box_format="unit")


def has_projector(source: Source) -> bool:
    return any(name.startswith("model.mm_projector.") for name in source.tensors)


def is_normed(source: Source) -> bool:
    return str(source.config.get("mm_projector_type", "")).lower().endswith("_norm")


def plan_llava(
    source: Source,
    places: Places,
    tokenizer,
    *,
    image_token: str,
    chat_template: str,
    box_format: str,
    inner_adaptors: dict | None = None,
    first_rules: Sequence[Rule] = (),
) -> Plan:
    """LLaVA-1.5 and those built like it; ``first_rules`` come before its own."""
    config = source.config
    vision, folder, inside = read_tower(source, places)
    with_cls = config.get("mm_vision_select_feature", "patch") == "cls_patch"
    image_token_id = add_image_token(tokenizer, image_token)
    text = llama_config(config, embeddings_for(config, tokenizer))
    image_processor = read_image_processor(source.folder, folder)
    if config.get("image_aspect_ratio") == "pad":
        image_processor = padding_to_square(image_processor)
    tokens = tokens_of_image(vision, with_cls=with_cls)
    gap = gap_behind(tokenizer, image_token)
    wrapped = "<im_start>{image}<im_end>" if config.get("mm_use_im_start_end") else "{image}"
    return Plan(
        config=IDAVLMConfig(
            vision_config=vision,
            text_config=text,
            connector=connector_kind(config),
            image_token_id=image_token_id,
            image_seq_length=tokens,
            vision_feature_layer=config.get("mm_vision_select_layer", -2),
            vision_feature_select="all" if with_cls else "patch",
            inner_adaptors=inner_adaptors,
        ),
        key_map=KeyMap([*first_rules, *language_rules(text.vocab_size), *tower_rules(vision, inside)]),
        processor=IDAVLMProcessor(
            image_processor,
            tokenizer,
            chat_template=chat_template.replace("{{ bos_token }}", "{{ bos_token }}" + gap),
            image_seq_length=tokens,
            image_token=image_token,
            image_format=wrapped + gap,
            box_format=box_format,
        ),
        generation=token_ids(source, tokenizer),
    )


def read_tower(source: Source, places: Places):
    """Configuration and folder of the vision tower, and what its names begin with (a regular expression).

    Weights in the checkpoint come first: they may have been trained.
    """
    folder = tower_folder(source, places, source.config.get("mm_vision_tower"))
    if any(name.startswith(INSIDE) for name in source.tensors):
        return tower_config(folder), folder, INSIDE.replace(".", r"\.")
    add_tower_weights(source, folder)
    return tower_config(folder), folder, TOWER.replace(".", r"\.")


def connector_kind(config: dict) -> str:
    """idavlm's name for the projector, which :func:`idavlm.build_connector` knows or refuses."""
    kind = str(config.get("mm_projector_type", "linear")).lower()
    if kind != "linear" and not kind.startswith("mlp"):
        raise ConversionError(f"mm_projector_type={kind!r} is not known; expected 'linear', 'mlp2x_gelu[_Norm]'.")
    return kind


def language_rules(vocab_size: int) -> list[Rule]:
    rows = with_rows(vocab_size)
    return [
        Rule(r".*\.rotary_emb\.inv_freq", {}),
        Rule(r"model\.mm_projector\.(.*)", {r"connector.\1": None}),
        Rule(r"model\.(embed_tokens\.weight)", {r"language_model.model.\1": rows}),
        Rule(r"(lm_head\.weight)", {r"language_model.\1": rows}),
        Rule(r"model\.((?:layers|norm)\..*)", {r"language_model.model.\1": None}),
    ]
