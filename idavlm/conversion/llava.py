"""Formats of LLaVA's code base: LLaVA-1.5 (and YAICON), Yi-VL, and IAA."""

from collections.abc import Sequence

from idavlm.conversion.checkpoint_files import ConversionError, SourceCheckpoint
from idavlm.conversion.checkpoint_format import (
    TOWER,
    CheckpointFormat,
    ConversionPlan,
    PartFolders,
    add_image_token,
    add_tower_weights,
    generation_tokens,
    llama_config,
    num_embeddings,
    num_image_tokens,
    pad_to_square,
    read_image_processor,
    read_tokenizer,
    space_after,
    tower_config,
    tower_folder,
    tower_rules,
)
from idavlm.conversion.key_mapping import KeyMap, Rule, resize_rows
from idavlm.data.chat_templates import LLAMA_3, VICUNA, YI_VL_STOP
from idavlm.data.chat_templates import YI_VL as YI_VL_TEMPLATE
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.processing import IDAVLMProcessor

INCLUDED_TOWER = "model.vision_tower.vision_tower."
"""Prefix of a vision tower whose weights are part of the checkpoint."""


def has_projector(source: SourceCheckpoint) -> bool:
    """Whether the checkpoint has LLaVA's projector."""
    return any(name.startswith("model.mm_projector.") for name in source.tensors)


def has_projector_norm(source: SourceCheckpoint) -> bool:
    """Whether the projector contains norms, as in Yi-VL."""
    return str(source.config.get("mm_projector_type", "")).lower().endswith("_norm")


def plan_llava(
    source: SourceCheckpoint,
    folders: PartFolders,
    tokenizer,
    *,
    image_token: str,
    chat_template: str,
    box_format: str,
    inner_adaptors: dict | None = None,
    first_rules: Sequence[Rule] = (),
) -> ConversionPlan:
    """Plan the conversion of LLaVA-1.5 and its derivatives; ``first_rules`` take precedence over the common rules."""
    config = source.config
    vision, folder, prefix = read_tower(source, folders)
    with_cls = config.get("mm_vision_select_feature", "patch") == "cls_patch"
    image_token_id = add_image_token(tokenizer, image_token)
    text = llama_config(config, num_embeddings(config, tokenizer))
    image_processor = read_image_processor(source.folder, folder)
    if config.get("image_aspect_ratio") == "pad":
        image_processor = pad_to_square(image_processor)
    tokens = num_image_tokens(vision, with_cls=with_cls)
    space = space_after(tokenizer, image_token)
    image_format = "<im_start>{image}<im_end>" if config.get("mm_use_im_start_end") else "{image}"
    return ConversionPlan(
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
        key_map=KeyMap([*first_rules, *language_rules(text.vocab_size), *tower_rules(vision, prefix)]),
        processor=IDAVLMProcessor(
            image_processor,
            tokenizer,
            chat_template=chat_template.replace("{{ bos_token }}", "{{ bos_token }}" + space),
            image_seq_length=tokens,
            image_token=image_token,
            image_format=image_format + space,
            box_format=box_format,
        ),
        generation=generation_tokens(source, tokenizer),
    )


def read_tower(source: SourceCheckpoint, folders: PartFolders):
    """Configuration and folder of the vision tower, and the prefix of its names (a regular expression).

    Weights in the checkpoint take precedence over the folder, because they may have been fine-tuned.
    """
    folder = tower_folder(source, folders, source.config.get("mm_vision_tower"))
    if any(name.startswith(INCLUDED_TOWER) for name in source.tensors):
        return tower_config(folder), folder, INCLUDED_TOWER.replace(".", r"\.")
    add_tower_weights(source, folder)
    return tower_config(folder), folder, TOWER.replace(".", r"\.")


def connector_kind(config: dict) -> str:
    """Name of the projector for :func:`idavlm.build_connector`."""
    kind = str(config.get("mm_projector_type", "linear")).lower()
    if kind != "linear" and not kind.startswith("mlp"):
        raise ConversionError(f"mm_projector_type={kind!r} is not supported; expected 'linear' or 'mlp2x_gelu[_Norm]'.")
    return kind


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


def plan_yi_vl(source: SourceCheckpoint, folders: PartFolders) -> ConversionPlan:
    """Plan the conversion of Yi-VL: norms in the projector, a fine-tuned tower, its own prompt."""
    tokenizer = read_tokenizer(source, folders)
    has_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    template = "{{ bos_token }}" + YI_VL_TEMPLATE if has_bos else YI_VL_TEMPLATE
    plan = plan_llava(
        source, folders, tokenizer, image_token="<image_placeholder>", chat_template=template, box_format="unit"
    )
    plan.generation["stop_strings"] = [YI_VL_STOP]
    return plan


def plan_iaa(source: SourceCheckpoint, folders: PartFolders) -> ConversionPlan:
    """Plan the conversion of IAA: Llama with inner adaptors; each workflow has embeddings, norm, head and projector."""
    tokenizer = read_tokenizer(source, folders)
    add_image_token(tokenizer, "<image>")
    plan = plan_llava(
        source,
        folders,
        tokenizer,
        image_token="<image>",
        chat_template=LLAMA_3,
        box_format="square",
        inner_adaptors={
            "layers": adaptor_layers(source),
            "workflows": ["multimodal", "grounding"],
            "modules_to_copy": ["embeddings", "norm", "lm_head", "connector"],
        },
        first_rules=adaptor_rules(num_embeddings(source.config, tokenizer)),
    )
    plan.more_processors["grounding"] = IDAVLMProcessor(
        pad_to_square(plan.processor.image_processor),
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
    rows = resize_rows(vocab_size)
    rules = [
        Rule(
            r"model\.mm_projector\.(.*)",
            {r"connector.\1": None, f"{_workflow_prefix('multimodal')}.connector.\\1": None},
        )
    ]
    for workflow, suffix, projector in (
        ("multimodal", "", "mm_projector"),
        ("grounding", "_grounding", "mm_projector_G"),
    ):
        to = _workflow_prefix(workflow)
        rules += [
            Rule(rf"model\.condition_layers{suffix}\.(.*)", {rf"{to}.layers.\1": None}),
            Rule(rf"model\.embed_tokens_condition{suffix}\.(.*)", {rf"{to}.embeddings.\1": rows}),
            Rule(rf"model\.norm_condition{suffix}\.(.*)", {rf"{to}.norm.\1": None}),
            Rule(rf"lm_head_condtion{suffix}\.(.*)", {rf"{to}.lm_head.\1": rows}),
            Rule(rf"model\.{projector}\.(.*)", {rf"{to}.connector.\1": None}),
        ]
    return [Rule(r".*\.rotary_emb\.inv_freq", {}), *rules]


def _workflow_prefix(workflow: str) -> str:
    return f"language_model.inner_adaptor.{workflow}"


def _plan_llava_1_5(source: SourceCheckpoint, folders: PartFolders) -> ConversionPlan:
    tokenizer = read_tokenizer(source, folders)
    return plan_llava(source, folders, tokenizer, image_token="<image>", chat_template=VICUNA, box_format="unit")


LLAVA = CheckpointFormat(
    name="LLaVA-1.5",
    signature="keys model.mm_projector.*, mm_projector_type without norm",
    matches=lambda source: has_projector(source) and not has_projector_norm(source),
    plan=_plan_llava_1_5,
)
YI_VL = CheckpointFormat(
    name="Yi-VL",
    signature="keys model.mm_projector.*, mm_projector_type with norm",
    matches=lambda source: has_projector(source) and has_projector_norm(source),
    plan=plan_yi_vl,
)
IAA = CheckpointFormat(
    name="IAA",
    signature="keys model.condition_layers.*, lm_head_condtion.*",
    matches=lambda source: any(name.startswith("model.condition_layers.") for name in source.tensors),
    plan=plan_iaa,
)
