"""IAA: Llama with inner adaptors, each workflow with its own embeddings, norm, head and projector."""

from idavlm.conversion.errors import ConversionError
from idavlm.conversion.llava import plan_llava
from idavlm.conversion.mapping import Rule, with_rows
from idavlm.conversion.parts import (
    add_image_token,
    embeddings_for,
    padding_to_square,
    read_tokenizer,
    token_ids,
)
from idavlm.conversion.plan import Places, Plan
from idavlm.conversion.source import Source
from idavlm.data.chat_templates import LLAMA_3
from idavlm.models.processing import IDAVLMProcessor

NAME = "IAA"
LOOKS = "keys model.condition_layers.*, lm_head_condtion.*"


def matches(source: Source) -> bool:
    return any(name.startswith("model.condition_layers.") for name in source.tensors)


def plan(source: Source, places: Places) -> Plan:
    tokenizer = read_tokenizer(source, places)
    add_image_token(tokenizer, "<image>")
    made = plan_llava(
        source,
        places,
        tokenizer,
        image_token="<image>",
        chat_template=LLAMA_3,
        box_format="square",
        inner_adaptors={
            "layers": adaptor_layers(source),
            "workflows": ["multimodal", "grounding"],
            "modules_to_copy": ["embeddings", "norm", "lm_head", "connector"],
        },
        first_rules=adaptor_rules(embeddings_for(source.config, tokenizer)),
    )
    made.more_processors["grounding"] = IDAVLMProcessor(
        padding_to_square(made.processor.image_processor),
        tokenizer,
        chat_template=LLAMA_3,
        image_seq_length=made.processor.image_seq_length,
        box_format="square",
    )
    made.generation = token_ids(source, tokenizer, ends=["<|eot_id|>"])
    return made


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
