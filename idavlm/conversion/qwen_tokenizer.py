"""Convert ``qwen.tiktoken``, the vocabulary of Qwen and Qwen-VL, to a fast tokenizer of transformers."""

import base64
import binascii
from pathlib import Path

from idavlm.conversion.errors import ConversionError

FILE_NAME = "qwen.tiktoken"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenization pattern of Qwen; digits are separate tokens."""
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
MARKUP = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE = ("<img>", "</img>", "<imgpad>")
SPECIAL_TOKENS = (*CONTROL, *MARKUP, *IMAGE)
"""Ids follow the vocabulary in this order. Markup is part of answers: ``skip_special_tokens`` keeps it."""


def qwen_tokenizer(path: str | Path):
    """A ``PreTrainedTokenizerFast`` that returns the ids of Qwen-VL's own tokenizer.

    Text is normalized to Unicode NFC first, as in Qwen. A vocabulary that is truncated after any rank is supported.

    Args:
        path: ``qwen.tiktoken``: one token in base 64 and its rank per line.

    Raises:
        ConversionError: the file is missing, a line is invalid, or the ranks are not 0, 1, 2, ...
    """
    from tokenizers import AddedToken, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        """Reads and checks the file without the package tiktoken."""

        load_tiktoken_bpe = staticmethod(lambda file: read_ranks(Path(file)))

    tokenizer = Converter(str(path), pattern=SPLIT).converted()
    tokenizer.normalizer = normalizers.NFC()
    for tokens, special in ((CONTROL, True), (MARKUP, False), (IMAGE, True)):
        added = [AddedToken(token, special=special, normalized=False) for token in tokens]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks in order of rank."""
    ranks: dict[bytes, int] = {}
    if not path.is_file():
        raise ConversionError(f"{path}: no such file.")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ConversionError(f"{path}, line {number}: expected a token in base 64 and its rank.") from error
    if list(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ConversionError(f"{path}: expected the ranks 0, 1, 2, ... in order and all 256 bytes among the tokens.")
    return ranks
