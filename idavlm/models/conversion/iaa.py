"""IAA: Llama with inner adaptors, each workflow with its own embeddings, norm, head and projector."""

from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.conversion.errors import ConversionError
from idavlm.models.conversion.llava import connector_kind, language_rules, read_tower
from idavlm.models.conversion.mapping import KeyMap, Rule, with_rows
from idavlm.models.conversion.parts import (
    add_image_token,
    embeddings_for,
    llama_config,
    padding_to_square,
    read_image_processor,
    read_tokenizer,
    token_ids,
    tokens_of_image,
    tower_rules,
)
from idavlm.models.conversion.plan import Places, Plan
from idavlm.models.conversion.source import Source
from idavlm.models.conversion.templates import LLAMA_3
from idavlm.models.processing import IDAVLMProcessor

NAME = "IAA"
LOOKS = "keys model.condition_layers.*, lm_head_condtion.*"
OWNED = ["embeddings", "norm", "lm_head", "connector"]


def matches(source: Source) -> bool:
    return any(name.startswith("model.condition_layers.") for name in source.tensors)


def plan(source: Source, places: Places) -> Plan:
    tokenizer = read_tokenizer(source, places)
    config = source.config
    vision, folder, inside = read_tower(source, places)
    image_token_id = add_image_token(tokenizer, "<image>")
    text = llama_config(config, embeddings_for(config, tokenizer))
    tokens = tokens_of_image(vision)
    cropped = read_image_processor(source.folder, folder)

    def processor(image_processor) -> IDAVLMProcessor:
        return IDAVLMProcessor(
            image_processor, tokenizer, chat_template=LLAMA_3, image_seq_length=tokens, box_format="square"
        )

    return Plan(
        config=IDAVLMConfig(
            vision_config=vision,
            text_config=text,
            connector=connector_kind(config),
            image_token_id=image_token_id,
            image_seq_length=tokens,
            vision_feature_layer=config.get("mm_vision_select_layer", -2),
            inner_adaptors={
                "layers": adaptor_layers(source),
                "workflows": ["multimodal", "grounding"],
                "owned": OWNED,
            },
        ),
        key_map=KeyMap(
            [*adaptor_rules(text.vocab_size), *language_rules(text.vocab_size), *tower_rules(vision, inside)]
        ),
        processor=processor(cropped),
        more_processors={"grounding": processor(padding_to_square(cropped))},
        generation=token_ids(source, tokenizer, ends=["<|eot_id|>"]),
    )


def adaptor_layers(source: Source) -> list[int]:
    """Layers that are followed by an adaptor: two of every five. The release writes them in its code alone."""
    layers = [index for index in range(source.config["num_hidden_layers"]) if index % 5 < 2]
    numbers = {name.split(".")[2] for name in source.tensors if name.startswith("model.condition_layers.")}
    if len(numbers) != len(layers):
        raise ConversionError(
            f"{source.folder}: {len(numbers)} adaptor layers, but {len(layers)} expected, after the layers {layers} "
            "as in the release; where they go is not written in the checkpoint."
        )
    return layers


def adaptor_rules(vocab_size: int) -> list[Rule]:
    """The language model's own connector, which no workflow of the release uses, is a copy of the multimodal one."""
    rows = with_rows(vocab_size)
    rules = [Rule(r"model\.mm_projector\.(.*)", {r"connector.\1": None, f"{_owner('multimodal')}.connector.\\1": None})]
    for workflow, mark, projector in (
        ("multimodal", "", "mm_projector"),
        ("grounding", "_grounding", "mm_projector_G"),
    ):
        to = _owner(workflow)
        rules += [
            Rule(rf"model\.condition_layers{mark}\.(.*)", {rf"{to}.layers.\1": None}),
            Rule(rf"model\.embed_tokens_condition{mark}\.(.*)", {rf"{to}.embeddings.\1": rows}),
            Rule(rf"model\.norm_condition{mark}\.(.*)", {rf"{to}.norm.\1": None}),
            Rule(rf"lm_head_condtion{mark}\.(.*)", {rf"{to}.lm_head.\1": rows}),
            Rule(rf"model\.{projector}\.(.*)", {rf"{to}.connector.\1": None}),
        ]
    return [Rule(r".*\.rotary_emb\.inv_freq", {}), *rules]


def _owner(workflow: str) -> str:
    return f"language_model.inner_adaptor.{workflow}"
