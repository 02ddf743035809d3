"""One small tokenizer for each family of tokenizers that language models use, all with the same special tokens."""

import json
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from idavlm.conversion.qwen_tokenizer import qwen_tokenizer
from idavlm.data.chat_templates import CHATML
from idavlm.experimental.small_models import byte_level_bpe, small_tokenizer
from tests.released import TEXT, sentencepiece_tokenizer, write_tiktoken

SPECIALS = ["<|im_start|>", "<|im_end|>", "<image>", "<pad>", "<s>", "</s>"]


def _texts() -> list[str]:
    return [TEXT.read_text(encoding="utf-8"), "Kate is reading. Tom is waving. Where is Kate?"]


def _with_specials(tokenizer, **rules):
    """Add the special tokens and the template that all families share."""
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    added = [AddedToken(token, special=True, **{"normalized": False, **rules}) for token in SPECIALS]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


def _vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    state = json.loads(byte_level_bpe(_texts(), 600, ["<|endoftext|>"]).to_str())["model"]
    return state["vocab"], [tuple(merge) for merge in state["merges"]]


def gpt2():
    vocabulary, merges = _vocabulary_and_merges()
    return _with_specials(GPT2Tokenizer(vocab=vocabulary, merges=merges))


def qwen2():
    vocabulary, merges = _vocabulary_and_merges()
    return _with_specials(Qwen2Tokenizer(vocab=vocabulary, merges=merges))


def qwen():
    with tempfile.TemporaryDirectory() as folder:
        write_tiktoken(Path(folder) / "qwen.tiktoken", 900)
        return _with_specials(qwen_tokenizer(Path(folder) / "qwen.tiktoken"))


def small():
    return _with_specials(small_tokenizer(_texts(), vocab_size=600))


def stripping():
    """As Phi-3's: special tokens absorb the spaces after them."""
    tokenizer = _with_specials(small_tokenizer(_texts(), vocab_size=600), rstrip=True)
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>").replace("{{ '\n' }}", "")
    return tokenizer


def sentencepiece():
    return _with_specials(sentencepiece_tokenizer(320))


def llama():
    """transformers' own class; its tokens are split as SentencePiece does, unknown characters into bytes."""
    pieces = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>"])}
    pieces |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    state = json.loads(sentencepiece_tokenizer(320).backend_tokenizer.to_str())["model"]
    for token in state["vocab"]:
        pieces.setdefault(token, len(pieces))
    return _with_specials(LlamaTokenizer(vocab=pieces, merges=[tuple(merge) for merge in state["merges"]]))


def unigram():
    """As T5's: the special tokens are pieces of the vocabulary, so text can be tokenized into them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return _with_specials(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


def wordpiece():
    """As BERT's: text is lower-cased, signs are split off."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return _with_specials(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))


FAMILIES = {
    function.__name__: function
    for function in (small, stripping, gpt2, qwen2, qwen, sentencepiece, llama, unigram, wordpiece)
}


def metaspace(texts: list[str]):
    """As SentencePiece's: a text begins with a space, a token alone is decoded without it. It has no special tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def joining(*joined: str) -> Tokenizer:
    """Byte-level BPE without a split into words: each string of ``joined`` becomes one token, other bytes their own."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for text in joined:
        for size in range(2, len(text) + 1):
            vocabulary.setdefault(text[:size], len(vocabulary))
            merges.append((text[: size - 1], text[size - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class Slow:
    """A tokenizer without offsets, like the Python tokenizers of transformers."""

    is_fast = False

    def __init__(self, fast):
        self.fast = fast

    def __getattr__(self, name):
        return getattr(self.fast, name)

    def __len__(self):
        return len(self.fast)

    def __call__(self, texts, **options):
        assert not options.pop("return_offsets_mapping")
        return self.fast(texts, **options)
