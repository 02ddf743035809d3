"""Tiny random models of transformers' vision-language families, with their processors, without any download.

``tiny_model(family)`` has a language model of width 64. ``tiny_processor(family)`` is the processor class of the family
with a byte-level tokenizer, small images, and a chat template that treats images as the released one does. Without
torchvision, transformers has no video processors; :class:`NoVideos` takes their place.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import PushToHubMixin

from idavlm import attach_id_former, save_id_former
from idavlm._compat import pil_image_processor
from idavlm.experimental.small_models import byte_level_bpe

TEXTS = ["Kate is reading. Tom is waving.", "Where is Kate? What is Tom doing?", "user assistant system"] * 20

CHATML_HEADER = "<|im_start|>{{ message['role'] }}\n"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML_HEADER + ""
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}{% set count.value = count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    + CHATML_PROMPT
)
QWEN_TEMPLATE = "{% set count = namespace(value=0) %}" + QWEN_TEMPLATE

IMAGES_FIRST = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
)

LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['role'] != 'assistant' %}" + IMAGES_FIRST + "{{ content['text'] + ' ' }}{% endfor %}{% else %}"
    + IMAGES_FIRST + "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)  # fmt: skip
"""LLaVA renders the images of a turn first, wherever they stand."""

ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% if message['role'] != 'assistant' %}" + IMAGES_FIRST + "{{ '\n' + content['text'] }}{% endfor %}{% else %}"
    + IMAGES_FIRST + "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip

IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

INTERNVL_TEMPLATE = (
    "{% for message in messages %}" + CHATML_HEADER + "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}" + CHATML_PROMPT
)

OVIS_TEMPLATE = INTERNVL_TEMPLATE.replace("<IMG_CONTEXT>", "<image>")

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Gemma strips the white space of each text part."""

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'text' %}{{ block['text'] }}{% elif block['type'] in ['image', 'image_url'] %}[IMG]"
    "{% endif %}{% endfor %}{% endif %}[/INST]{% elif message['role'] == 'system' %}[SYSTEM_PROMPT]"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}[/SYSTEM_PROMPT]"
    "{% else %}{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)

GLM_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class NoVideos(PushToHubMixin):
    """Takes the place of a video processor."""

    model_input_names = ()
    num_frames = fps = _auto_class = None

    def to_dict(self) -> dict:
        return {}


@dataclass(frozen=True)
class Family:
    """How to build the model and the processor of a family.

    Attributes:
        model: name of the model class.
        config: function from the tokenizer to the arguments of the configuration.
        processor: name and module (below ``transformers.models``) of the processor class.
        image_processor: model and name of the image processor, for :func:`idavlm._compat.pil_image_processor`.
        image_options: arguments of the image processor.
        tokens: special tokens that the tokenizer has as attributes.
        more_tokens: further special tokens.
        options: further arguments of the processor.
        chat_template: None for a family that has none.
        has_video: whether the processor needs a video processor.
        end: end-of-turn token.
    """

    model: str
    config: Callable[[Any], dict]
    processor: tuple[str, str]
    image_processor: tuple[str, str]
    image_options: dict = field(default_factory=dict)
    tokens: dict = field(default_factory=dict)
    more_tokens: tuple[str, ...] = ("<|im_start|>",)
    options: dict = field(default_factory=dict)
    chat_template: str | None = None
    has_video: bool = False
    end: str = "<|im_end|>"


def _text(tokenizer, **options) -> dict:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": len(tokenizer)}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return {"initializer_range": 0.1, **sizes, **tokens, **options}


def _mrope(**options) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **options}}


def _vision(**options) -> dict:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "image_size": 16, "patch_size": 4, **options}


def _qwen_vision(**options) -> dict:
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    return {**sizes, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **options}


def _qwen_tokens(tokenizer) -> dict:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _qwen(model: str, text: dict, vision: dict, processor: tuple[str, str]) -> Family:
    return Family(
        model=model,
        config=lambda tokenizer: {
            "text_config": _text(tokenizer, **text),
            "vision_config": vision,
            **_qwen_tokens(tokenizer),
        },
        processor=processor,
        image_processor=("qwen2_vl", "Qwen2VLImageProcessor"),
        image_options={
            "patch_size": 4,
            "merge_size": 2,
            "size": {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 12},
        },
        more_tokens=("<|im_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        chat_template=QWEN_TEMPLATE,
        has_video=True,
    )


def _llava(model: str, tower: dict, processor: tuple[str, str], template: str, **options) -> Family:
    image_processor = options.pop("image_processor")
    image_options = options.pop("image_options")
    processor_options = options.pop("options")
    return Family(
        model=model,
        config=lambda tokenizer: {
            "text_config": _text(tokenizer, model_type="llama"),
            "vision_config": tower,
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            **options.get("config", {}),
        },
        processor=processor,
        image_processor=image_processor,
        image_options=image_options,
        more_tokens=("<|im_start|>", "<image>", "<video>"),
        options=processor_options,
        chat_template=template,
        has_video=model.startswith("LlavaOnevision"),
    )


def _idefics(model: str, name: str) -> Family:
    return Family(
        model=model,
        config=lambda tokenizer: {
            "text_config": _text(tokenizer, model_type="llama"),
            "vision_config": _vision(),
            "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
            "scale_factor": 2,
        },
        processor=(f"{name}Processor", f"{name.lower()}.processing_{name.lower()}"),
        image_processor=(name.lower(), f"{name}ImageProcessor"),
        image_options={"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
        more_tokens=(
            "<|im_start|>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
            *(f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)),
        ),
        options={"image_seq_len": 4},
        chat_template=IDEFICS_TEMPLATE,
        has_video=name == "SmolVLM",
        end="<end_of_utterance>",
    )  # fmt: skip


_PINPOINTS = [[16, 32], [32, 16], [32, 32]]
_CLIP = _vision(model_type="clip_vision_model", projection_dim=32)
_SIGLIP = _vision(model_type="siglip_vision_model", vision_use_head=False)

_FAMILIES = {
    "qwen2_vl": _qwen(
        "Qwen2VLForConditionalGeneration",
        _mrope(),
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        ("Qwen2VLProcessor", "qwen2_vl.processing_qwen2_vl"),
    ),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLForConditionalGeneration",
        _mrope(),
        _qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        ("Qwen2_5_VLProcessor", "qwen2_5_vl.processing_qwen2_5_vl"),
    ),
    "qwen3_vl": _qwen(
        "Qwen3VLForConditionalGeneration",
        {**_mrope(mrope_interleaved=True), "head_dim": 16},
        _qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0]),
        ("Qwen3VLProcessor", "qwen3_vl.processing_qwen3_vl"),
    ),
    "qwen3_vl_moe": _qwen(
        "Qwen3VLMoeForConditionalGeneration",
        {
            **_mrope(mrope_interleaved=True), "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        _qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0]),
        ("Qwen3VLProcessor", "qwen3_vl.processing_qwen3_vl"),
    ),
    "qwen3_5": _qwen(
        "Qwen3_5ForConditionalGeneration",
        {
            **_mrope(mrope_interleaved=True, partial_rotary_factor=1.0), "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        },
        _qwen_vision(num_position_embeddings=64),
        ("Qwen3VLProcessor", "qwen3_vl.processing_qwen3_vl"),
    ),
    "llava": _llava(
        "LlavaForConditionalGeneration",
        _CLIP,
        ("LlavaProcessor", "llava.processing_llava"),
        LLAVA_TEMPLATE,
        image_processor=("clip", "CLIPImageProcessor"),
        image_options={"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
        options={
            "patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        },
    ),
    "llava_next": _llava(
        "LlavaNextForConditionalGeneration",
        _CLIP,
        ("LlavaNextProcessor", "llava_next.processing_llava_next"),
        LLAVA_TEMPLATE,
        image_processor=("llava_next", "LlavaNextImageProcessor"),
        image_options={
            "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16},
            "image_grid_pinpoints": _PINPOINTS,
        },
        options={
            "patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        },
        config={"image_grid_pinpoints": _PINPOINTS},
    ),
    "llava_onevision": _llava(
        "LlavaOnevisionForConditionalGeneration",
        _SIGLIP,
        ("LlavaOnevisionProcessor", "llava_onevision.processing_llava_onevision"),
        ONEVISION_TEMPLATE,
        image_processor=("llava_onevision", "LlavaOnevisionImageProcessor"),
        image_options={"size": {"height": 16, "width": 16}, "image_grid_pinpoints": _PINPOINTS},
        options={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        config={"image_grid_pinpoints": _PINPOINTS},
    ),
    "smolvlm": _idefics("SmolVLMForConditionalGeneration", "SmolVLM"),
    "idefics3": _idefics("Idefics3ForConditionalGeneration", "Idefics3"),
    "internvl": Family(
        model="InternVLForConditionalGeneration",
        config=lambda tokenizer: {
            "text_config": _text(tokenizer, model_type="qwen2"),
            "vision_config": _vision(image_size=[16, 16], patch_size=[4, 4]),
            "image_token_id": tokenizer.context_image_token_id,
            "image_seq_length": 4,
        },
        processor=("InternVLProcessor", "internvl.processing_internvl"),
        image_processor=("got_ocr2", "GotOcr2ImageProcessor"),
        image_options={"size": {"height": 16, "width": 16}, "max_patches": 3},
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        options={"image_seq_length": 4},
        chat_template=INTERNVL_TEMPLATE,
        has_video=True,
    ),
    "gemma3": Family(
        model="Gemma3ForConditionalGeneration",
        config=lambda tokenizer: {
            "text_config": _text(tokenizer, head_dim=16, query_pre_attn_scalar=16, sliding_window=16),
            "vision_config": _vision(model_type="siglip_vision_model", vision_use_head=False),
            "mm_tokens_per_image": 4,
            "image_token_index": tokenizer.image_token_id,
            "boi_token_index": tokenizer.boi_token_id,
            "eoi_token_index": tokenizer.eoi_token_id,
        },
        processor=("Gemma3Processor", "gemma3.processing_gemma3"),
        image_processor=("gemma3", "Gemma3ImageProcessor"),
        image_options={"size": {"height": 16, "width": 16}},
        tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        more_tokens=("<start_of_turn>",),
        options={"image_seq_length": 4},
        chat_template=GEMMA_TEMPLATE,
        end="<end_of_turn>",
    ),
    "paligemma": Family(
        model="PaliGemmaForConditionalGeneration",
        config=lambda tokenizer: {
            "text_config": _text(tokenizer, model_type="gemma", head_dim=16),
            "vision_config": _vision(model_type="siglip_vision_model", projection_dim=64, vision_use_head=False),
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "projection_dim": 64,
            "hidden_size": 64,
            "vocab_size": len(tokenizer),
        },
        processor=("PaliGemmaProcessor", "paligemma.processing_paligemma"),
        image_processor=("siglip", "SiglipImageProcessor"),
        image_options={"size": {"height": 16, "width": 16}},
        more_tokens=("<image>",),
        end="<eos>",
    ),
    "mistral3": Family(
        model="Mistral3ForConditionalGeneration",
        config=lambda tokenizer: {
            "text_config": _text(tokenizer, model_type="mistral", sliding_window=None, head_dim=16),
            "vision_config": _vision(model_type="pixtral", image_size=32, head_dim=16),
            "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
            "spatial_merge_size": 2,
        },
        processor=("PixtralProcessor", "pixtral.processing_pixtral"),
        image_processor=("pixtral", "PixtralImageProcessor"),
        image_options={"size": {"longest_edge": 32}, "patch_size": {"height": 8, "width": 8}},
        more_tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        options={"patch_size": 4, "spatial_merge_size": 2},
        chat_template=MISTRAL_TEMPLATE,
        end="</s>",
    ),
    "glm4v": Family(
        model="Glm4vForConditionalGeneration",
        config=lambda tokenizer: {
            "text_config": _text(tokenizer, **_mrope(partial_rotary_factor=1.0)),
            "vision_config": _qwen_vision(image_size=32),
            "image_token_id": tokenizer.convert_tokens_to_ids("<|image|>"),
            "video_token_id": tokenizer.convert_tokens_to_ids("<|video|>"),
            "image_start_token_id": tokenizer.convert_tokens_to_ids("<|begin_of_image|>"),
            "image_end_token_id": tokenizer.convert_tokens_to_ids("<|end_of_image|>"),
            "video_start_token_id": tokenizer.convert_tokens_to_ids("<|begin_of_video|>"),
            "video_end_token_id": tokenizer.convert_tokens_to_ids("<|end_of_video|>"),
        },
        processor=("Glm4vProcessor", "glm4v.processing_glm4v"),
        image_processor=("glm4v", "Glm4vImageProcessor"),
        image_options={
            "patch_size": 4,
            "merge_size": 2,
            "size": {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 24},
        },
        more_tokens=(
            "[gMASK]", "<sop>", "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>",
            "<|begin_of_video|>", "<|end_of_video|>", "<|user|>", "<|assistant|>", "<|system|>",
        ),
        chat_template=GLM_TEMPLATE,
        has_video=True,
        end="<|endoftext|>",
    ),
    "ovis2": Family(
        model="Ovis2ForConditionalGeneration",
        config=lambda tokenizer: {
            "text_config": _text(tokenizer, model_type="qwen2"),
            "vision_config": _vision(hidden_stride=2, vocab_size=32),
            "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
            "visual_indicator_token_ids": [
                tokenizer.convert_tokens_to_ids(token)
                for token in ("<IMG_START>", "<IMG_END>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>")
            ],
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
        },
        processor=("Ovis2Processor", "ovis2.processing_ovis2"),
        image_processor=("ovis2", "Ovis2ImageProcessor"),
        image_options={"size": {"height": 16, "width": 16}, "crop_to_patches": True, "max_patches": 3},
        more_tokens=(
            "<|im_start|>", "<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_END>", "<IMG_GRID>", "<IMG_COL>",
            "<IMG_ROW>",
        ),
        options={"image_seq_length": 4},
        chat_template=OVIS_TEMPLATE,
    ),
}  # fmt: skip

FAMILIES = tuple(_FAMILIES)
"""Names of the families."""


def tiny_processor(family: str, **options) -> ProcessorMixin:
    """The processor of a family; ``options`` replace arguments of the image processor."""
    kind = _FAMILIES[family]
    image_processor = pil_image_processor(*kind.image_processor)(**{**kind.image_options, **options})
    if family == "paligemma":
        image_processor.image_seq_length = 16
    parts = [image_processor, _tokenizer(family)]
    if kind.has_video:
        parts.append(NoVideos())
    with patch.object(ProcessorMixin, "check_argument_for_proper_class"):  # it would reject NoVideos
        return _processor_class(*kind.processor)(*parts, chat_template=kind.chat_template, **kind.options)


def tiny_model(family: str, **options) -> PreTrainedModel:
    """A model of a family with random weights, in evaluation mode; ``options`` replace arguments of its config."""
    kind = _FAMILIES[family]
    model_class = getattr(transformers, kind.model)
    tokenizer = tiny_processor(family).tokenizer  # some processors add tokens
    config = model_class.config_class(**{**kind.config(tokenizer), "tie_word_embeddings": False, **options})
    torch.manual_seed(0)
    model = model_class(config).eval()
    if family == "gemma3":  # initialised with zeros
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def save_tiny_vlm(folder: Path, family: str) -> Path:
    """Write model and processor of a family to ``folder / family``, and an ID-Former whose gates are open.

    Returns:
        The folder of the ID-Former.
    """
    model = tiny_model(family)
    model.save_pretrained(folder / family)
    tiny_processor(family).save_pretrained(folder / family)
    attach_id_former(model)
    torch.manual_seed(0)
    for parameter in model.id_former.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_id_former(model, folder / "id_former")
    return folder / "id_former"


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    kind = _FAMILIES[family]
    backend = _backend((kind.end, *kind.tokens.values(), *kind.more_tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=type(backend).from_str(backend.to_str()),
        pad_token="<|pad|>",
        bos_token="<bos>",
        eos_token=kind.end,
        additional_special_tokens=list(kind.more_tokens),
        extra_special_tokens=kind.tokens,
        chat_template=kind.chat_template,
    )


@functools.cache
def _backend(tokens: tuple[str, ...]):
    return byte_level_bpe(TEXTS, 300 + len(tokens), ["<|pad|>", "<bos>", *dict.fromkeys(tokens)])


def _processor_class(name: str, module: str) -> type[ProcessorMixin]:
    """Import a processor class. Two of them import optional packages for parts that are not used here."""
    pixtral = "transformers.models.pixtral.image_processing_"
    helper = importlib.import_module(f"{pixtral}pil_pixtral")
    with patch.dict(sys.modules):
        sys.modules.setdefault(f"{pixtral}pixtral", helper)
        loaded = importlib.import_module(f"transformers.models.{module}")
    sys.modules.setdefault(loaded.__name__, loaded)  # for pickle
    if getattr(loaded, "num2words", str) is None:  # SmolVLM, for videos
        loaded.num2words = str
    return getattr(loaded, name)
