"""Format of Qwen-VL, Qwen-VL-Chat and IDA-VLM: Qwen-7B, its vision transformer and resampler, optional ID-Former."""

from transformers import Qwen2Config

from idavlm._compat import pil_image_processor
from idavlm.conversion.checkpoint_files import SourceCheckpoint
from idavlm.conversion.checkpoint_format import (
    CheckpointFormat,
    ConversionPlan,
    check_image_processor,
    check_image_token,
    idavlm_config,
    num_embeddings,
    read_tokenizer,
)
from idavlm.conversion.config_files import QWEN, QWEN_VISUAL, check_fields
from idavlm.conversion.config_sizes import Size, check_layers, check_sizes
from idavlm.conversion.errors import ConversionError, errors_of
from idavlm.conversion.key_mapping import KeyMap, Rule, head_rows, row_block, transposed
from idavlm.conversion.qwen_tokenizer import FILE_NAME, qwen_tokenizer
from idavlm.data.chat_templates import QWEN_CHATML
from idavlm.models.processing import IDAVLMProcessor
from idavlm.models.qwen_vision import QwenVisionConfig

HEAD_DIM = 128
"""Head dimension of the attention of the resampler and the ID-Former."""
SIZES: dict[str, Size] = {
    "vocab_size": (r"transformer\.wte\.weight", 0),
    "hidden_size": (r"transformer\.wte\.weight", 1),
    "intermediate_size // 2": (r"transformer\.h\.\d+\.mlp\.w1\.weight", 0),
}
VISUAL_SIZES: dict[str, Size] = {
    "width": (r"transformer\.visual\.conv1\.weight", 0),
    "patch_size": (r"transformer\.visual\.conv1\.weight", 2),
    "width * mlp_ratio": (r"transformer\.visual\.transformer\.resblocks\.\d+\.mlp\.c_fc\.weight", 0),
    "n_queries": (r"transformer\.visual\.attn_pool\.query", 0),
    "output_dim": (r"transformer\.visual\.attn_pool\.query", 1),
}
REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("layer_norm_epsilon", "visual"),
)
VISUAL_REQUIRED = ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio", "output_dim", "image_start_id")


def _plan(source: SourceCheckpoint) -> ConversionPlan:
    check_config(source)
    path, visual = source.config_path, source.config["visual"]
    has_id_former = any(name.startswith("transformer.visual.attn_pool.attn1.") for name in source.tensors)
    location = source.tokenizer or source.folder
    vocabulary = location if location.is_file() else location / FILE_NAME
    tokenizer = qwen_tokenizer(vocabulary) if vocabulary.is_file() else read_tokenizer(source)
    image_start, image_token_id = tokenizer.convert_tokens_to_ids(["<img>", "<imgpad>"])
    if image_start != visual["image_start_id"]:
        raise ConversionError(
            f"{path}: visual.image_start_id={visual['image_start_id']}, but <img> is token {image_start} of the "
            "tokenizer; pass the tokenizer of the checkpoint with tokenizer= (--tokenizer)."
        )
    check_image_token(source, tokenizer, "<imgpad>")
    num_queries = visual.get("n_queries", 256)
    size = {"height": visual["image_size"], "width": visual["image_size"]}
    image_processor = pil_image_processor("clip", "CLIPImageProcessor")(size=size, crop_size=size, do_center_crop=False)
    check_image_processor(path, image_processor, visual["image_size"])
    return ConversionPlan(
        config=idavlm_config(
            source,
            vision_config=vision_config(source),
            text_config=language_config(source, tokenizer),
            connector="id_former" if has_id_former else "resampler",
            connector_config={
                "num_queries": num_queries,
                "num_heads": visual["output_dim"] // HEAD_DIM,
                "output_proj": True,
            },
            image_token_id=image_token_id,
            image_seq_length=num_queries,
        ),
        key_map=KeyMap([*language_rules(), *vision_rules(visual["heads"]), *connector_rules(has_id_former)]),
        processor=IDAVLMProcessor(
            image_processor,
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


def check_config(source: SourceCheckpoint) -> None:
    """Check what conversion reads of config.json, also against the tensors."""
    path, config, tensors = source.config_path, source.config, source.tensors
    check_fields(path, config, QWEN, required=REQUIRED)
    visual = config["visual"]
    check_fields(path, visual, QWEN_VISUAL, section="visual", required=VISUAL_REQUIRED)
    if not config.get("no_bias", True) or config.get("rotary_pct", 1.0) != 1.0:
        found = {name: config.get(name) for name in ("no_bias", "rotary_pct")}
        raise ConversionError(f"{path}: {found}; expected no_bias=True and rotary_pct=1.0, as in the release.")
    if config["hidden_size"] != config["num_attention_heads"] * config.get("kv_channels", 128):
        raise ConversionError(
            f"{path}: hidden_size={config['hidden_size']} is not num_attention_heads={config['num_attention_heads']} "
            f"times kv_channels={config.get('kv_channels', 128)}."
        )
    if visual["output_dim"] % HEAD_DIM:
        raise ConversionError(
            f"{path}: visual.output_dim={visual['output_dim']} is not a multiple of {HEAD_DIM}, the width of a head."
        )
    if visual["image_size"] % visual["patch_size"]:
        raise ConversionError(
            f"{path}: visual.patch_size={visual['patch_size']} does not divide image_size={visual['image_size']}."
        )
    inner = {"intermediate_size // 2": config["intermediate_size"] // 2}
    visual_inner = {"width * mlp_ratio": int(visual["width"] * visual["mlp_ratio"])}
    check_sizes(path, config | inner, tensors, SIZES)
    check_sizes(path, visual | visual_inner, tensors, VISUAL_SIZES, section="visual")
    check_layers(path, "num_hidden_layers", config["num_hidden_layers"], tensors, pattern=r"transformer\.h\.(\d+)\..*")
    blocks = r"transformer\.visual\.transformer\.resblocks\.(\d+)\..*"
    check_layers(path, "visual.layers", visual["layers"], tensors, pattern=blocks)


def language_config(source: SourceCheckpoint, tokenizer) -> Qwen2Config:
    """Configuration of Qwen-7B as Qwen2, to which it is equivalent up to ``seq_length`` tokens.

    Raises:
        ConversionError: the tokenizer has more tokens than the checkpoint has embeddings.
    """
    config = source.config
    if num_embeddings(source.config_path, config["vocab_size"], tokenizer) > config["vocab_size"]:
        raise ConversionError(
            f"{source.config_path}: vocab_size={config['vocab_size']}, but the tokenizer has {len(tokenizer)} tokens; "
            "pass the tokenizer of the checkpoint with tokenizer= (--tokenizer)."
        )
    return Qwen2Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"] // 2,
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_attention_heads"],
        max_position_embeddings=config.get("seq_length", 2048),
        rms_norm_eps=float(config["layer_norm_epsilon"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(config.get("rotary_emb_base", 10000))},
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        initializer_range=float(config.get("initializer_range", 0.02)),
    )


def vision_config(source: SourceCheckpoint) -> QwenVisionConfig:
    """Configuration of the vision transformer."""
    visual = source.config["visual"]
    positions = source.tensors.get("transformer.visual.positional_embedding")
    if positions is None or positions.dim() == 0:
        raise ConversionError(f"{source.folder}: transformer.visual.positional_embedding is missing or has no rows.")
    with errors_of(source.config_path, "describes no vision transformer of Qwen-VL", "Check the file."):
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
    """Rules of the language model."""
    layer, to = r"transformer\.h\.(\d+)\.", r"language_model.model.layers.\1."
    attention = {f"{to}self_attn.{name}_proj.\\2": row_block(number, 3) for number, name in enumerate("qkv")}
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
    """Rules of the vision transformer."""
    visual = r"transformer\.visual\."
    layer, to = visual + r"transformer\.resblocks\.(\d+)\.", r"vision_tower.layers.\1."
    attention = {f"{to}self_attn.{name}_proj.\\2": head_rows(number, num_heads) for number, name in enumerate("qkv")}
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


def connector_rules(has_id_former: bool) -> list[Rule]:
    """Rules of the resampler, and of the identity attention of the ID-Former."""
    visual, pool = r"transformer\.visual\.", r"transformer\.visual\.attn_pool\."
    to = "id_former.resampler." if has_id_former else "connector."
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
        projections = {f"{attention}{letter}_proj.\\1": row_block(number, 3) for number, letter in enumerate("qkv")}
        rules += [
            Rule(pool + name + r"\.in_proj_(.*)", projections),
            Rule(pool + name + r"\.out_proj\.(.*)", {attention + r"out_proj.\1": None}),
        ]
    return rules


QWEN_VL = CheckpointFormat(
    name="Qwen-VL, IDA-VLM",
    signature="model_type 'qwen' with visual, keys transformer.visual.*",
    matches=lambda source: (
        "visual" in source.config and any(name.startswith("transformer.visual.") for name in source.tensors)
    ),
    plan=_plan,
)
