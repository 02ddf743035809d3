"""Tiny checkpoints in the released formats with tokenizers."""

import base64
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from idavlm.experimental.small_models import byte_level_bpe

FIXTURES = Path(__file__).parent / "fixtures"
TEXT = FIXTURES / "tokenizer_text.md"

_LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS = {"llava-1.5": ["<unk>", "<s>", "</s>"], "yi-vl": ["<unk>", "<|startoftext|>", "</s>"], "iaa": _LLAMA_3}


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
