"""The fast tokenizer of ``qwen.tiktoken`` equals a reimplementation of tiktoken on a small vocabulary.

For the released vocabulary and tiktoken itself run ``python -m benchmarks.qwen_tokenizer``.
"""

import random

import pytest
import regex
from transformers import AutoTokenizer

from benchmarks.qwen_tokenizer import strings, wrong
from idavlm.conversion.qwen_tokenizer import SPECIAL_TOKENS, SPLIT, qwen_tokenizer, read_ranks
from tests.released import write_tiktoken


class Restated:
    """tiktoken: split at special tokens, then by the pattern; in each piece merge the pair of lowest rank first."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.special = {token: number for number, token in enumerate(SPECIAL_TOKENS, len(ranks))}
        self.cut = regex.compile("(" + "|".join(map(regex.escape, SPECIAL_TOKENS)) + ")")
        self.pieces = regex.compile(SPLIT)

    def encode(self, text: str, allowed_special: str) -> list[int]:
        ids = []
        for part in self.cut.split(text):
            if part in self.special:
                ids.append(self.special[part])
            else:
                ids += [i for piece in self.pieces.findall(part) for i in self.encode_piece(piece.encode())]
        return ids

    def encode_piece(self, piece: bytes) -> list[int]:
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 1:
            joined = [self.ranks.get(parts[i] + parts[i + 1], 10**9) for i in range(len(parts) - 1)]
            place = joined.index(min(joined))
            if joined[place] == 10**9:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return [self.ranks[part] for part in parts]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen") / "qwen.tiktoken"
    write_tiktoken(path, 1500)
    return path


def test_ids_are_tiktokens_and_decode_back(path, tmp_path):
    qwen_tokenizer(path).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    data = strings(random.Random(0), 100)
    results = list(wrong(data, lambda texts: tokenizer(texts).input_ids, tokenizer.decode, Restated(read_ranks(path))))
    assert [(kind, other, lost) for kind, _, other, lost in results] == [(kind, 0, 0) for kind in data]
    assert all(count == 100 for _, count, _, _ in results)


def test_special_tokens_have_qwen_vls_places(path):
    tokenizer = qwen_tokenizer(path)
    places = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|extra_0|>": 3, "<|extra_204|>": 207}
    places |= {"<ref>": 208, "</quad>": 213, "<img>": 214, "</img>": 215, "<imgpad>": 216}
    for token, place in places.items():
        assert tokenizer.convert_tokens_to_ids(token) == 1500 + place
    assert len(tokenizer) == 1717
