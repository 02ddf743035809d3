"""Tiny checkpoints in the released formats with tokenizers."""

import base64
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from idavlm.data import chat_templates
from idavlm.experimental.small_models import byte_level_bpe

FIXTURES = Path(__file__).parent / "fixtures"
TEXT = FIXTURES / "tokenizer_text.md"

_LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS = {"llava-1.5": ["<unk>", "<s>", "</s>"], "yi-vl": ["<unk>", "<|startoftext|>", "</s>"], "iaa": _LLAMA_3}

IMAGE = 3
"""Id of the image token of :func:`transformers_llava`."""
OWN_TEMPLATE = chat_templates.QWEN_CHATML + "{# of the tokenizer #}"


def released(system: str, folder: Path) -> Path:
    """A copy of ``<system>-tiny`` in ``folder``, tokenizer included."""
    copy = folder / f"{system}-tiny"
    shutil.copytree(FIXTURES / f"{system}-tiny", copy)
    (copy / "expected.safetensors").unlink()
    if system == "ida-vlm":
        write_tiktoken(copy / "qwen.tiktoken", 386)  # so that <img> is token 600
    else:
        tiny_tokenizer(SPECIALS[system], 320).save_pretrained(copy)
    return copy


def tower() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = AutoConfig.for_model("chinese_clip_vision_model", image_size=28, patch_size=14, **sizes)
    return AutoModel.from_config(config)


def language_model() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_key_value_heads=2, **sizes))


def llava_tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer(["<unk>", "<s>", "<|im_end|>", "<image>"], 300)
    made.chat_template = OWN_TEMPLATE
    return made


def transformers_llava(folder: Path) -> LlavaForConditionalGeneration:
    """Save a LLaVA of transformers with a Chinese-CLIP tower, tokenizer and image processor included."""
    vision, language = tower(), language_model()
    config = LlavaConfig(vision_config=vision.config, text_config=language.config, image_token_index=IMAGE)
    llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower.load_state_dict(vision.state_dict())
    llava.model.language_model.load_state_dict(language.model.state_dict())
    llava.lm_head.load_state_dict(language.lm_head.state_dict())
    llava.save_pretrained(folder)
    llava_tokenizer().save_pretrained(folder)
    preprocessor = FIXTURES / "llava-1.5-tiny" / "clip-vision-tiny" / "preprocessor_config.json"
    (folder / preprocessor.name).write_text(preprocessor.read_text().replace("56", "28"))
    return llava


def expected(system: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{system}-tiny" / "expected.safetensors")


def released_weights(system: str) -> dict[str, torch.Tensor]:
    """All tensors of ``<system>-tiny``, under the released names."""
    folder = FIXTURES / f"{system}-tiny"
    weights = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        weights |= load_file(path)
    return weights or torch.load(folder / "pytorch_model.bin", weights_only=True)


def tiny_tokenizer(specials: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of exactly ``size`` tokens, ``specials`` first."""
    tokenizer = _trained(size, specials)
    roles = ("bos_token", "eos_token") if specials == _LLAMA_3 else ("unk_token", "bos_token", "eos_token")
    names = dict(zip(roles, specials, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def sentencepiece_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Like that of Llama: ``▁`` for spaces and at the beginning of a text, but not after special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TEXT.read_text(encoding="utf-8").split(" "), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_tiktoken(path: Path, size: int) -> None:
    """A vocabulary of ``size`` tokens in the format of ``qwen.tiktoken``."""
    letters = _trained(size, []).get_vocab()
    alphabet = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokens = sorted(letters, key=letters.get)
    lines = [
        f"{base64.b64encode(bytes(alphabet[letter] for letter in token)).decode()} {rank}"
        for rank, token in enumerate(tokens)
    ]
    path.write_text("\n".join(lines) + "\n")


def _trained(size: int, specials: list[str]) -> Tokenizer:
    tokenizer = byte_level_bpe([TEXT.read_text(encoding="utf-8")], size, specials)
    assert tokenizer.get_vocab_size() == size
    return tokenizer


def _byte_letters() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [letter for _, letter in sorted(bytes_to_unicode().items())]
