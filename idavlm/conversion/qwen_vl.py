"""Qwen-VL, Qwen-VL-Chat and IDA-VLM: Qwen-7B, its vision transformer and resampler, with or without the ID-Former."""

from pathlib import Path
from typing import Any

from transformers import Qwen2Config

from idavlm.conversion.errors import ConversionError
from idavlm.conversion.mapping import KeyMap, Rule, part, part_of_heads, transposed
from idavlm.conversion.parts import read_tokenizer, square_image_processor
from idavlm.conversion.plan import Places, Plan
from idavlm.conversion.qwen_tokenizer import FILE_NAME, qwen_tokenizer
from idavlm.conversion.source import Source
from idavlm.data.chat_templates import QWEN_CHATML
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.processing import IDAVLMProcessor
from idavlm.models.qwen_vision import QwenVisionConfig

NAME = "Qwen-VL, IDA-VLM"
LOOKS = "model_type 'qwen' with visual, keys transformer.visual.*"
HEAD_DIM = 128
"""Of the resampler's and the ID-Former's attention."""


def matches(source: Source) -> bool:
    return "visual" in source.config and any(name.startswith("transformer.visual.") for name in source.tensors)


def plan(source: Source, places: Places) -> Plan:
    visual = source.config["visual"]
    identity = any(name.startswith("transformer.visual.attn_pool.attn1.") for name in source.tensors)
    tokenizer = read_qwen_tokenizer(source, places)
    image_start, image_token_id = tokenizer.convert_tokens_to_ids(["<img>", "<imgpad>"])
    if image_start != visual["image_start_id"]:
        raise ConversionError(
            f"{source.folder}: image_start_id={visual['image_start_id']}, but <img> is token {image_start} of the "
            "tokenizer; give the one that belongs to the checkpoint with tokenizer= (--tokenizer)."
        )
    num_queries = visual.get("n_queries", 256)
    return Plan(
        config=IDAVLMConfig(
            vision_config=vision_config(source),
            text_config=language_config(source.config),
            connector="id_former" if identity else "resampler",
            connector_config={
                "num_queries": num_queries,
                "num_heads": visual["output_dim"] // HEAD_DIM,
                "output_proj": True,
            },
            image_token_id=image_token_id,
            image_seq_length=num_queries,
        ),
        key_map=KeyMap([*language_rules(), *vision_rules(visual["heads"]), *connector_rules(identity)]),
        processor=IDAVLMProcessor(
            square_image_processor(visual["image_size"]),
            tokenizer,
            chat_template=QWEN_CHATML,
            image_seq_length=num_queries,
            image_token="<imgpad>",
            image_format="<img>{image}</img>",
            box_format="qwen",
        ),
        generation={
            "eos_token_id": tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]),
            "pad_token_id": tokenizer.pad_token_id,
        },
    )


def read_qwen_tokenizer(source: Source, places: Places):
    """From ``qwen.tiktoken``, or a tokenizer that was made of it."""
    place = places.tokenizer or source.folder
    path = place if place.is_file() else Path(place) / FILE_NAME
    return qwen_tokenizer(path) if path.is_file() else read_tokenizer(source, places)


def language_config(config: dict[str, Any]) -> Qwen2Config:
    """Qwen-7B as the Qwen2 it equals up to ``seq_length`` tokens."""
    if not config.get("no_bias", True) or config.get("rotary_pct", 1.0) != 1.0:
        found = {name: config.get(name) for name in ("no_bias", "rotary_pct")}
        raise ConversionError(f"config.json: {found}; expected no_bias=True and rotary_pct=1.0, as in the release.")
    if config["hidden_size"] != config["num_attention_heads"] * config.get("kv_channels", 128):
        raise ConversionError("config.json: kv_channels is not hidden_size / num_attention_heads.")
    return Qwen2Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"] // 2,
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_attention_heads"],
        max_position_embeddings=config.get("seq_length", 2048),
        rms_norm_eps=config["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(config.get("rotary_emb_base", 10000))},
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        initializer_range=config.get("initializer_range", 0.02),
    )


def vision_config(source: Source) -> QwenVisionConfig:
    visual = source.config["visual"]
    positions = source.tensors.get("transformer.visual.positional_embedding")
    if positions is None:
        raise ConversionError(f"{source.folder}: transformer.visual.positional_embedding is missing.")
    return QwenVisionConfig(
        hidden_size=visual["width"],
        intermediate_size=int(visual["width"] * visual["mlp_ratio"]),
        num_hidden_layers=visual["layers"],
        num_attention_heads=visual["heads"],
        image_size=visual["image_size"],
        patch_size=visual["patch_size"],
        num_positions=len(positions),
    )


def language_rules() -> list[Rule]:
    layer, to = r"transformer\.h\.(\d+)\.", r"language_model.model.layers.\1."
    attention = {f"{to}self_attn.{name}_proj.\\2": part(number, 3) for number, name in enumerate("qkv")}
    return [
        Rule(r".*\.(rotary_emb\.inv_freq|attn\.(bias|masked_bias|logn_tensor))", {}),
        Rule(r"transformer\.wte\.weight", {"language_model.model.embed_tokens.weight": None}),
        Rule(layer + r"ln_1\.weight", {to + "input_layernorm.weight": None}),
        Rule(layer + r"attn\.c_attn\.(weight|bias)", attention),
        Rule(layer + r"attn\.c_proj\.weight", {to + "self_attn.o_proj.weight": None}),
        Rule(layer + r"ln_2\.weight", {to + "post_attention_layernorm.weight": None}),
        Rule(layer + r"mlp\.w1\.weight", {to + "mlp.up_proj.weight": None}),
        Rule(layer + r"mlp\.w2\.weight", {to + "mlp.gate_proj.weight": None}),
        Rule(layer + r"mlp\.c_proj\.weight", {to + "mlp.down_proj.weight": None}),
        Rule(r"transformer\.ln_f\.weight", {"language_model.model.norm.weight": None}),
        Rule(r"lm_head\.weight", {"language_model.lm_head.weight": None}),
    ]


def vision_rules(num_heads: int) -> list[Rule]:
    visual = r"transformer\.visual\."
    layer, to = visual + r"transformer\.resblocks\.(\d+)\.", r"vision_tower.layers.\1."
    attention = {
        f"{to}self_attn.{name}_proj.\\2": part_of_heads(number, num_heads) for number, name in enumerate("qkv")
    }
    return [
        Rule(visual + r"conv1\.weight", {"vision_tower.patch_embedding.weight": None}),
        Rule(visual + r"positional_embedding", {"vision_tower.position_embedding": None}),
        Rule(visual + r"ln_pre\.(.*)", {r"vision_tower.pre_layernorm.\1": None}),
        Rule(layer + r"ln_(\d)\.(.*)", {to + r"layer_norm\2.\3": None}),
        Rule(layer + r"attn\.in_proj\.(.*)", attention),
        Rule(layer + r"attn\.out_proj\.(.*)", {to + r"self_attn.out_proj.\2": None}),
        Rule(layer + r"mlp\.c_fc\.(.*)", {to + r"fc1.\2": None}),
        Rule(layer + r"mlp\.c_proj\.(.*)", {to + r"fc2.\2": None}),
    ]


def connector_rules(identity: bool) -> list[Rule]:
    """Of the resampler, and of the ID-Former's attention where there is one."""
    visual, pool = r"transformer\.visual\.", r"transformer\.visual\.attn_pool\."
    to = "id_former.resampler." if identity else "connector."
    rules = [
        Rule(pool + r"pos_embed", {to + "query_position": None}),
        Rule(pool + r"query", {to + "query": None}),
        Rule(pool + r"ln_q\.(.*)", {to + r"query_norm.\1": None}),
        Rule(pool + r"ln_kv\.(.*)", {to + r"input_norm.\1": None}),
        Rule(pool + r"kv_proj\.(.*)", {to + r"input_proj.\1": None}),
        Rule(visual + r"ln_post\.(.*)", {to + r"output_norm.\1": None}),
        Rule(visual + r"proj", {to + "output_proj.weight": transposed}),
    ]
    for name, attention in (("attn", to + "attention."), ("attn1", "id_former.identity_layers.0.attention.")):
        projections = {f"{attention}{letter}_proj.\\1": part(number, 3) for number, letter in enumerate("qkv")}
        rules += [
            Rule(pool + name + r"\.in_proj_(.*)", projections),
            Rule(pool + name + r"\.out_proj\.(.*)", {attention + r"out_proj.\1": None}),
        ]
    return rules
