"""Formats of LLaVA: the code base (LLaVA-1.5, YAICON, Yi-VL, IAA), and ``LlavaForConditionalGeneration``."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import AddedToken, AutoConfig, AutoModel, LlamaConfig, PretrainedConfig

from idavlm._compat import auto_image_processor, pil_image_processor
from idavlm.conversion import config_files, config_sizes
from idavlm.conversion.checkpoint_files import SourceCheckpoint, WeightFile, weight_files
from idavlm.conversion.checkpoint_format import (
    CheckpointFormat,
    ConversionPlan,
    check_image_processor,
    check_image_token,
    generation_tokens,
    idavlm_config,
    num_embeddings,
    read_tokenizer,
)
from idavlm.conversion.config_files import check_fields, check_rope, is_there, read_json
from idavlm.conversion.config_sizes import check_counts, check_layers, check_sizes
from idavlm.conversion.errors import ConversionError, errors_of, shown
from idavlm.conversion.key_mapping import KeyMap, Rule, resize_rows
from idavlm.data.chat_templates import LLAMA_3, QWEN_CHATML, VICUNA, YI_VL_STOP
from idavlm.data.chat_templates import YI_VL as YI_VL_TEMPLATE
from idavlm.models.processing import IDAVLMProcessor

INCLUDED_TOWER = "model.vision_tower.vision_tower."
"""Prefix of a vision tower whose weights are part of the checkpoint."""

TRANSFORMERS_TOWER = r"(?:model\.)?vision_tower\."
"""Prefix of the vision tower in a LLaVA of transformers, as a regular expression."""

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)
"""Fields that the config.json of a Llama-like checkpoint has; for the others, the defaults of transformers apply."""
CHECK = "Check the file, or download it again."

TEMPLATES = {"llama": VICUNA, "qwen2": QWEN_CHATML}
"""``model_type`` of the language model -> chat template, if the tokenizer has none for text messages."""


def plan_llava(
    source: SourceCheckpoint,
    tokenizer,
    *,
    image_token: str = "<image>",
    chat_template: str = VICUNA,
    box_format: str = "unit",
    inner_adaptors: dict | None = None,
    first_rules: Sequence[Rule] = (),
) -> ConversionPlan:
    """Plan the conversion of LLaVA-1.5 and its derivatives; ``first_rules`` take precedence over the common rules."""
    config = source.config
    vision, folder, prefix = read_tower(source)
    add_image_token(tokenizer, image_token)
    text = llama_config(source, num_embeddings(source.config_path, config["vocab_size"], tokenizer))
    connector = (config.get("mm_projector_type") or "linear").lower()
    if not re.fullmatch(r"linear|mlp[1-9]\d?x_gelu(_norm)?", connector):
        raise ConversionError(
            f"{source.config_path}: mm_projector_type={shown(connector)} is not supported; expected 'linear' or "
            "'mlp2x_gelu[_Norm]'."
        )
    image_processor = read_image_processor(source.folder, folder, image_size=vision.image_size)
    if config.get("image_aspect_ratio") == "pad":
        image_processor = pad_to_square(source.folder, image_processor, vision.image_size)
    space = space_after(tokenizer, image_token)
    image_format = "<im_start>{image}<im_end>" if config.get("mm_use_im_start_end") else "{image}"
    return build_plan(
        source,
        tokenizer,
        image_processor,
        vision_config=vision,
        text_config=text,
        connector=connector,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        with_cls=config.get("mm_vision_select_feature", "patch") == "cls_patch",
        rules=[*first_rules, *language_rules(text.vocab_size), *tower_rules(folder / "config.json", vision, prefix)],
        image_token=image_token,
        chat_template=chat_template.replace("{{ bos_token }}", "{{ bos_token }}" + space),
        image_format=image_format + space,
        box_format=box_format,
        inner_adaptors=inner_adaptors,
    )


def build_plan(
    source: SourceCheckpoint,
    tokenizer,
    image_processor,
    *,
    vision_config: PretrainedConfig,
    text_config: PretrainedConfig,
    connector: str,
    vision_feature_layer: int,
    with_cls: bool,
    rules: Sequence[Rule],
    image_token: str,
    chat_template: str,
    image_format: str = "{image}",
    box_format: str = "unit",
    inner_adaptors: dict | None = None,
) -> ConversionPlan:
    """Plan of a model whose image tokens are the projected patches of an image, ``with_cls`` the class token too."""
    layers = getattr(vision_config, "num_hidden_layers", None)
    if layers is not None and -vision_feature_layer > layers + 1:
        raise ConversionError(
            f"{source.config_path}: the vision feature layer is {vision_feature_layer}, but the vision tower has "
            f"{layers} layers, whose outputs are -1 to {-layers - 1}."
        )
    check_image_token(source, tokenizer, image_token)
    tokens = (vision_config.image_size // vision_config.patch_size) ** 2 + int(with_cls)
    return ConversionPlan(
        config=idavlm_config(
            source,
            vision_config=vision_config,
            text_config=text_config,
            connector=connector,
            image_token_id=tokenizer.convert_tokens_to_ids(image_token),
            image_seq_length=tokens,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select="all" if with_cls else "patch",
            inner_adaptors=inner_adaptors,
        ),
        key_map=KeyMap(rules),
        processor=IDAVLMProcessor(
            image_processor,
            tokenizer,
            chat_template=chat_template,
            image_seq_length=tokens,
            image_token=image_token,
            image_format=image_format,
            box_format=box_format,
        ),
        generation=generation_tokens(source, tokenizer),
    )


def read_tower(source: SourceCheckpoint) -> tuple[PretrainedConfig, Path, str]:
    """Configuration and folder of the vision tower, and the prefix of its names (a regular expression).

    The folder is ``source.vision_tower``, or the one that config.json names: a path relative to the checkpoint, or
    any path. Weights in the checkpoint take precedence over the folder, because they may have been fine-tuned.
    """
    named = source.config.get("mm_vision_tower")
    folders = [source.vision_tower]
    if source.vision_tower is None:
        folders = [] if named is None else [source.folder / named, Path(named)]
    folder = next((folder for folder in folders if _has_config(folder)), None)
    if folder is None and source.vision_tower is not None:
        raise ConversionError(
            f"vision_tower={str(source.vision_tower)!r} has no config.json; pass the folder of the tower."
        )
    if folder is None:
        raise ConversionError(
            f"{source.folder}: its vision tower {shown(named)} is not a local folder; download that model and pass its "
            "folder with vision_tower= (--vision-tower)."
        )
    prefix = INCLUDED_TOWER
    if not any(name.startswith(INCLUDED_TOWER) for name in source.tensors):
        prefix = "vision_tower."
        source.add([WeightFile(path, prefix, remove_prefix="vision_model.") for path in weight_files(folder)])
    path = folder / "config.json"
    config = read_json(path)
    prefix = prefix.replace(".", r"\.")
    check_fields(path, config, {"model_type": config_files.TEXT}, required=("model_type",))
    section = "vision_config" if isinstance(config.get("vision_config"), dict) else ""
    vision = config[section] if section else config  # the folder may hold a complete image-text model
    check_fields(path, vision, config_files.VISION_TOWER, section=section)
    check_tower_sizes(source, path, vision, prefix, section=section)
    check_counts(path, config, source.tensors)
    with errors_of(path, "describes no vision tower of transformers", CHECK):
        made = AutoConfig.for_model(**config)
    tower = getattr(made, "vision_config", made)
    check_square(path, tower)
    check_tower_sizes(source, path, tower.to_dict(), prefix, section=section)  # with the defaults of transformers
    return tower, folder, prefix


def check_square(path: Path, tower: PretrainedConfig) -> None:
    """Check that a vision tower has square images and patches, from whose sizes the number of image tokens follows."""
    sizes = {name: getattr(tower, name, None) for name in ("image_size", "patch_size")}
    if not all(isinstance(size, int) for size in sizes.values()) or sizes["patch_size"] > sizes["image_size"]:
        raise ConversionError(
            f"{path}: a vision tower of type {tower.model_type!r} with {shown(sizes)}; expected one number for each, "
            "and no patches larger than the image."
        )


def check_llava_config(source: SourceCheckpoint) -> None:
    """Check what conversion reads of the config.json of LLaVA, also against the tensors of the language model."""
    path, config = source.config_path, source.config
    check_fields(path, config, config_files.LANGUAGE_MODEL, required=REQUIRED)
    check_fields(path, config, config_files.LLAVA)
    check_rope(path, config)
    check_language_sizes(path, config, source.tensors, r"model\.(?!vision_tower|condition_layers).*|lm_head.*")
    llama_config(source, config["vocab_size"])


def check_language_sizes(
    path: Path, config: dict[str, Any], tensors: dict[str, Tensor], pattern: str, *, section: str = ""
) -> None:
    """Compare the sizes of a language model with the tensors whose names match ``pattern``."""
    tensors = {name: tensor for name, tensor in tensors.items() if re.fullmatch(pattern, name)}
    check_sizes(path, config, tensors, config_sizes.LANGUAGE_MODEL, section=section)
    if "num_hidden_layers" in config:
        field = f"{section}.num_hidden_layers" if section else "num_hidden_layers"
        check_layers(path, field, config["num_hidden_layers"], tensors)


def check_tower_sizes(
    source: SourceCheckpoint, path: Path, config: dict[str, Any], prefix: str, *, section: str = ""
) -> None:
    """Compare the sizes of a vision tower with the tensors below ``prefix`` (a regular expression)."""
    tensors = {
        name: tensor
        for name, tensor in source.tensors.items()
        if re.match(prefix, name) and not re.match(prefix + "text_model", name)
    }
    check_sizes(path, config, tensors, config_sizes.VISION_TOWER, section=section)
    if "num_hidden_layers" in config:
        field = f"{section}.num_hidden_layers" if section else "num_hidden_layers"
        check_layers(path, field, config["num_hidden_layers"], tensors)


def _has_config(folder: Path) -> bool:
    try:
        return is_there(folder / "config.json")
    except (OSError, ValueError):  # a name that is too long, or that has a null byte
        return False


def language_rules(vocab_size: int) -> list[Rule]:
    """Rules of the language model and the projector."""
    rows = resize_rows(vocab_size)
    return [
        Rule(r".*\.rotary_emb\.inv_freq", {}),
        Rule(r"model\.mm_projector\.(.*)", {r"connector.\1": None}),
        Rule(r"model\.(embed_tokens\.weight)", {r"language_model.model.\1": rows}),
        Rule(r"(lm_head\.weight)", {r"language_model.\1": rows}),
        Rule(r"model\.((?:layers|norm)\..*)", {r"language_model.model.\1": None}),
    ]


def plan_llava_1_5(source: SourceCheckpoint) -> ConversionPlan:
    """Plan the conversion of LLaVA-1.5."""
    check_llava_config(source)
    return plan_llava(source, read_tokenizer(source))


def plan_yi_vl(source: SourceCheckpoint) -> ConversionPlan:
    """Plan the conversion of Yi-VL: norms in the projector, a fine-tuned tower, its own prompt."""
    check_llava_config(source)
    tokenizer = read_tokenizer(source)
    has_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    template = "{{ bos_token }}" + YI_VL_TEMPLATE if has_bos else YI_VL_TEMPLATE
    plan = plan_llava(source, tokenizer, image_token="<image_placeholder>", chat_template=template)
    plan.generation["stop_strings"] = [YI_VL_STOP]
    return plan


def plan_iaa(source: SourceCheckpoint) -> ConversionPlan:
    """Plan the conversion of IAA: Llama with inner adaptors; each workflow has embeddings, norm, head and projector."""
    check_llava_config(source)
    tokenizer = read_tokenizer(source)
    add_image_token(tokenizer, "<image>")
    plan = plan_llava(
        source,
        tokenizer,
        chat_template=LLAMA_3,
        box_format="square",
        inner_adaptors={
            "layers": adaptor_layers(source),
            "workflows": ["multimodal", "grounding"],
            "modules_to_copy": ["embeddings", "norm", "lm_head", "connector"],
        },
        first_rules=adaptor_rules(num_embeddings(source.config_path, source.config["vocab_size"], tokenizer)),
    )
    plan.more_processors["grounding"] = IDAVLMProcessor(
        pad_to_square(source.folder, plan.processor.image_processor, plan.config.vision_config.image_size),
        tokenizer,
        chat_template=LLAMA_3,
        image_seq_length=plan.processor.image_seq_length,
        box_format="square",
    )
    plan.generation = generation_tokens(source, tokenizer, ends=["<|eot_id|>"])
    return plan


def adaptor_layers(source: SourceCheckpoint) -> list[int]:
    """Layers that are followed by an inner adaptor: two of every five, as hard-coded in the release."""
    layers = [index for index in range(source.config["num_hidden_layers"]) if index % 5 < 2]
    numbers = {name.split(".")[2] for name in source.tensors if name.startswith("model.condition_layers.")}
    if len(numbers) != len(layers):
        raise ConversionError(
            f"{source.folder}: {len(numbers)} adaptor layers, but {len(layers)} expected, after the layers {layers} "
            "as in the release; the checkpoint does not store their positions."
        )
    return layers


def adaptor_rules(vocab_size: int) -> list[Rule]:
    """Rules of the inner adaptors. The connector outside all workflows, which the release lacks, is a copy of the
    multimodal one."""
    rows, adaptor = resize_rows(vocab_size), "language_model.inner_adaptor"
    rules = [
        Rule(r".*\.rotary_emb\.inv_freq", {}),
        Rule(r"model\.mm_projector\.(.*)", {r"connector.\1": None, rf"{adaptor}.multimodal.connector.\1": None}),
        Rule(r"model\.mm_projector_G\.(.*)", {rf"{adaptor}.grounding.connector.\1": None}),
    ]
    for workflow, suffix in (("multimodal", ""), ("grounding", "_grounding")):
        to = f"{adaptor}.{workflow}"
        rules += [
            Rule(rf"model\.condition_layers{suffix}\.(.*)", {rf"{to}.layers.\1": None}),
            Rule(rf"model\.embed_tokens_condition{suffix}\.(.*)", {rf"{to}.embeddings.\1": rows}),
            Rule(rf"model\.norm_condition{suffix}\.(.*)", {rf"{to}.norm.\1": None}),
            Rule(rf"lm_head_condtion{suffix}\.(.*)", {rf"{to}.lm_head.\1": rows}),
        ]
    return rules


def plan_transformers_llava(source: SourceCheckpoint) -> ConversionPlan:
    """Plan the conversion of ``LlavaForConditionalGeneration`` with any language model and vision tower."""
    check_transformers_llava_config(source)
    path = source.config_path
    with errors_of(path, "describes no LLaVA of transformers", CHECK):
        config = AutoConfig.for_model(**source.config)
    vision, text = config.vision_config, config.text_config
    check_square(path, vision)
    check_transformers_llava_sizes(source, text.to_dict(), vision.to_dict())  # with the defaults of transformers
    if not config.multimodal_projector_bias or config.projector_hidden_act != "gelu":
        raise ConversionError(
            f"{path}: multimodal_projector_bias={config.multimodal_projector_bias}, projector_hidden_act="
            f"{shown(config.projector_hidden_act)}; expected True and 'gelu'."
        )
    if not isinstance(config.vision_feature_layer, int):
        raise ConversionError(f"{path}: vision_feature_layer={shown(config.vision_feature_layer)}; expected one layer.")
    tokenizer = read_tokenizer(source)
    image_token = None
    if config.image_token_index <= max(tokenizer.get_vocab().values()):
        image_token = tokenizer.convert_ids_to_tokens(config.image_token_index)
    if image_token is None:
        raise ConversionError(
            f"{path}: image_token_index={config.image_token_index} is not a token of the tokenizer "
            f"({len(tokenizer)} tokens); add it to the tokenizer."
        )
    text.vocab_size = num_embeddings(path, text.vocab_size, tokenizer)
    return build_plan(
        source,
        tokenizer,
        read_image_processor(source.folder, image_size=vision.image_size),
        vision_config=vision,
        text_config=text,
        connector="mlp2x_gelu",
        vision_feature_layer=config.vision_feature_layer,
        with_cls=config.vision_feature_select_strategy == "full",
        rules=[*transformers_llava_rules(text.vocab_size), *tower_rules(path, vision, TRANSFORMERS_TOWER)],
        image_token=image_token,
        chat_template=_text_chat_template(source, tokenizer),
    )


def check_transformers_llava_config(source: SourceCheckpoint) -> None:
    """Check what conversion reads of the config.json of a LLaVA of transformers, also against the tensors."""
    path, config = source.config_path, source.config
    check_fields(path, config, config_files.TRANSFORMERS_LLAVA, required=("text_config", "vision_config"))
    text = config["text_config"]
    check_fields(path, text, config_files.LANGUAGE_MODEL, section="text_config")
    check_rope(path, text, section="text_config")
    check_fields(path, config["vision_config"], config_files.VISION_TOWER, section="vision_config")
    check_transformers_llava_sizes(source, text, config["vision_config"])
    check_counts(path, config, source.tensors)


def check_transformers_llava_sizes(source: SourceCheckpoint, text: dict[str, Any], vision: dict[str, Any]) -> None:
    """Compare the sizes of both halves of a LLaVA of transformers with the tensors."""
    path, language = source.config_path, rf"(?!{TRANSFORMERS_TOWER}).*"
    check_language_sizes(path, text, source.tensors, language, section="text_config")
    check_tower_sizes(source, path, vision, TRANSFORMERS_TOWER, section="vision_config")


def _text_chat_template(source: SourceCheckpoint, tokenizer) -> str:
    """Template of the tokenizer if it supports text messages; many support lists of parts only and drop plain text."""
    messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": "An answer."}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, jinja2.TemplateError):
        text = ""  # a template for other messages
    if all(message["content"] in text for message in messages):
        return tokenizer.chat_template
    template = TEMPLATES.get(source.config["text_config"].get("model_type"))
    if template is None:
        raise ConversionError(
            f"{source.folder}: the tokenizer has no chat_template that supports text messages; set one, save the "
            "tokenizer and pass its folder with tokenizer= (--tokenizer)."
        )
    return template


def transformers_llava_rules(vocab_size: int) -> list[Rule]:
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


def llama_config(source: SourceCheckpoint, vocab_size: int) -> LlamaConfig:
    """Configuration of the language model of a Llama-like checkpoint with ``vocab_size`` embeddings."""
    config = source.config
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    names = LlamaConfig.__annotations__.keys() & config.keys() - {"vocab_size", "rope_parameters", "use_cache"}
    with errors_of(source.config_path, "describes no Llama of transformers", CHECK):
        return LlamaConfig(**{name: config[name] for name in names}, vocab_size=vocab_size, rope_parameters=rope)


def tower_rules(path: Path, config: PretrainedConfig, prefix: str) -> list[Rule]:
    """Rules from names below ``prefix`` (a regular expression) to the names in the installed transformers.

    ``path`` is the file of the configuration, for messages.
    """
    with errors_of(path, "describes no vision tower of transformers", CHECK), torch.device("meta"):
        names = AutoModel.from_config(config).state_dict()
    head = "vision_model." if all(name.startswith("vision_model.") for name in names) else ""
    return [
        # A complete CLIP also has the text tower and the projections; they are not needed.
        Rule(prefix + r"(text_model|text_projection|visual_projection|logit_scale|logit_bias)(\..*)?", {}),
        Rule(prefix + r"(?:.*\.)?position_ids", {}),
        Rule(prefix + r"(?:vision_model\.)?(.*)", {rf"vision_tower.{head}\1": None}),
    ]


def add_image_token(tokenizer, token: str) -> None:
    """Add ``token`` as a special token unless it exists."""
    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)


def space_after(tokenizer, token: str) -> str:
    """Text to insert after a special token so that the following text is tokenized as at the beginning of a text.

    The code of LLaVA tokenizes the text between images piece by piece. A SentencePiece tokenizer starts every piece
    with a space marker, but after a special token only if there is a space.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    return " " if ids(f"{token}a")[1:] != ids("a") == ids(f"{token} a")[1:] else ""


def read_image_processor(*folders: Path, image_size: int):
    """Image processor of the first folder that has one, for a vision tower with images of ``image_size`` pixels."""
    for path in (folder / name for folder in folders for name in ("processor_config.json", "preprocessor_config.json")):
        if not is_there(path):
            continue
        settings = read_json(path)
        section = "image_processor" if isinstance(settings.get("image_processor"), dict) else ""
        if path.name == "processor_config.json" and not section:
            continue  # the file of a processor whose image processor is in preprocessor_config.json
        check_fields(path, settings[section] if section else settings, config_files.IMAGE_PROCESSOR, section=section)
        with errors_of(path, "describes no image processor of transformers", "Use the file of the vision tower."):
            image_processor = auto_image_processor().from_pretrained(
                path.parent, local_files_only=True, trust_remote_code=False
            )
        check_image_processor(path, image_processor, image_size)
        return image_processor
    raise ConversionError(f"{folders[-1]}: no preprocessor_config.json; download that of the vision tower.")


def pad_to_square(folder: Path, image_processor, image_size: int):
    """The same image processor with padding to squares in the mean colour first, as in LLaVA-1.5.

    Args:
        folder: folder of the checkpoint, for messages.
        image_processor: image processor of transformers.
        image_size: side of an image in pixels.

    Raises:
        ConversionError: the settings do not allow it.
    """
    names = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor", "do_resize")
    names += ("do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    options = image_processor.to_dict()
    options = {name: options[name] for name in names if options.get(name) is not None}
    with errors_of(folder, "has an image processor that cannot pad", "Use the file of the vision tower."):
        padding = pil_image_processor("llava", "LlavaImageProcessor")(**options, do_pad=True)
    check_image_processor(folder, padding, image_size)
    return padding


def has_projector(source: SourceCheckpoint) -> bool:
    """Whether the checkpoint has LLaVA's projector. Yi-VL and IAA have it too; their formats are tried first."""
    return any(name.startswith("model.mm_projector.") for name in source.tensors)


LLAVA = CheckpointFormat(
    name="LLaVA-1.5",
    signature="keys model.mm_projector.*, mm_projector_type without norm",
    matches=has_projector,
    plan=plan_llava_1_5,
)
YI_VL = CheckpointFormat(
    name="Yi-VL",
    signature="keys model.mm_projector.*, mm_projector_type with norm",
    matches=lambda source: (
        has_projector(source) and str(source.config.get("mm_projector_type")).lower().endswith("_norm")
    ),
    plan=plan_yi_vl,
)
IAA = CheckpointFormat(
    name="IAA",
    signature="keys model.condition_layers.*, lm_head_condtion.*",
    matches=lambda source: any(name.startswith("model.condition_layers.") for name in source.tensors),
    plan=plan_iaa,
)
TRANSFORMERS_LLAVA = CheckpointFormat(
    name="LLaVA of transformers",
    signature="model_type 'llava' with text_config and vision_config",
    matches=lambda source: (
        source.config.get("model_type") == "llava" and {"text_config", "vision_config"} <= source.config.keys()
    ),
    plan=plan_transformers_llava,
)
