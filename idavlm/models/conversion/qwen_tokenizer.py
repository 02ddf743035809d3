"""``qwen.tiktoken``, the vocabulary of Qwen and Qwen-VL, as a fast tokenizer of transformers."""

import base64
import binascii
from itertools import pairwise
from pathlib import Path

from idavlm.models.conversion.errors import ConversionError

FILE_NAME = "qwen.tiktoken"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pattern: what a token never crosses. One digit at a time."""
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
MARKUP = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE = ("<img>", "</img>", "<imgpad>")
SPECIAL_TOKENS = (*CONTROL, *MARKUP, *IMAGE)
"""Behind the vocabulary, in this order. Markup belongs to answers: it stays when special tokens are left out."""


def qwen_tokenizer(path: str | Path):
    """A ``PreTrainedTokenizerFast`` that gives the ids of Qwen-VL's own tokenizer.

    Text is brought to Unicode's form C first, as Qwen does. A vocabulary cut after any rank works, too.

    Args:
        path: ``qwen.tiktoken``: a line a token, in base 64, and its rank.

    Raises:
        ConversionError: no such file, or a line that is no token; ranks that are not 0, 1, 2, ...
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ranks = read_ranks(Path(path))
    letters = _letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    merges = [(names[left], names[right]) for left, right in merges_of(ranks)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
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
    """Tokens and their ranks, in order of rank."""
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


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The one merge that makes each token: what is left of it, in two parts, once all earlier merges are done.

    tiktoken joins any two neighbours that together are a token, lowest rank first. A token that is reached at all is
    reached from these two parts, for up to then its bytes were merged by lower ranks alone.
    """
    return [
        parts
        for token, rank in ranks.items()
        if len(token) > 1 and len(parts := tuple(_merged(token, ranks, rank))) == 2
    ]


def _merged(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """``token`` as byte-pair encoding has it with ranks below ``below``."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, below) for left, right in pairwise(parts)]
        lowest = min(joined)
        if lowest == below:
            break
        place = joined.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte, which byte-level tokenizers write their vocabularies in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
