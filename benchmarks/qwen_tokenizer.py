"""Comparison of the converted Qwen tokenizer with tiktoken on 10,000 strings, with the real vocabulary.

The vocabulary ``qwen.tiktoken`` is part of the package dashscope on PyPI. tiktoken is needed in addition to idavlm:

    pip install tiktoken && pip download dashscope --no-deps -d /tmp/dashscope
    unzip -o /tmp/dashscope/*.whl 'dashscope/resources/*' -d /tmp/dashscope
    python -m benchmarks.qwen_tokenizer /tmp/dashscope/dashscope/resources/qwen.tiktoken
"""

import argparse
import random
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from idavlm.conversion.qwen_tokenizer import SPECIAL_TOKENS, SPLIT, qwen_tokenizer, read_ranks
from idavlm.utils import markdown_table

ROOT = Path(__file__).parent.parent


def strings(rng: random.Random, share: int) -> dict[str, list[str]]:
    """``share`` strings of each of nine kinds."""
    files = [path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py")) if path.stat().st_size]
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    hanzi = [chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(3000)] + list("。！？的是不了在人有我 \n123abc") * 20  # noqa: RUF001
    emoji = [chr(code) for start, end in ((0x1F300, 0x1FAFF), (0x2600, 0x27BF)) for code in range(start, end)]
    emoji += ["\u200d", "\ufe0f", "\U0001f3fd", " ", "a"] * 50
    markup = [*SPECIAL_TOKENS[:3], *SPECIAL_TOKENS[-9:], "Kate", " is ", "(12,34)", "\n", "图"]

    def cut(texts: list[str]) -> str:
        text = rng.choice(texts)
        start = rng.randrange(len(text))
        return text[start : start + rng.randint(1, 300)]

    def drawn(letters: list[str], max_length: int) -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(1, max_length)))

    def any_letters() -> str:
        codes = (rng.randrange(0x30000) for _ in range(rng.randint(1, 60)))
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)

    makers: dict[str, Callable[[], str]] = {
        "code": lambda: cut(files),
        "English": lambda: cut(pages),
        "Chinese": lambda: drawn(hanzi, 100),
        "emoji": lambda: drawn(emoji, 40),
        "random bytes": lambda: rng.randbytes(rng.randint(1, 200)).decode(rng.choice(("utf-8", "latin-1")), "replace"),
        "repetitions": lambda: "".join(rng.choice("a=-. \n\t\r_/#0") * rng.randint(1, 40) for _ in range(6)),
        "few letters": lambda: drawn(rng.sample("abcdefghijklmnopqrstuvwxyz的是我", 3), 40),
        "any Unicode": any_letters,
        "special tokens": lambda: drawn(markup, 20),
    }
    return {kind: [make() for _ in range(share)] for kind, make in makers.items()}


def wrong(data: dict[str, list[str]], encode, decode, reference) -> Iterator[tuple[str, int, int, int]]:
    """For each kind: the number of strings, of strings with other ids, and of strings that are not decoded back."""
    for kind, texts in data.items():
        ids = encode(texts)
        normalized = [unicodedata.normalize("NFC", text) for text in texts]
        expected = [reference.encode(text, allowed_special="all") for text in normalized]
        other = sum(found != true for found, true in zip(ids, expected, strict=True))
        lost = sum(decode(found) != text for found, text in zip(ids, normalized, strict=True))
        yield kind, len(texts), other, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the file qwen.tiktoken")
    parser.add_argument("--strings", type=int, default=10_000, help="strings to compare (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the strings (default: %(default)s)")
    args = parser.parse_args()
    import tiktoken

    ranks = read_ranks(args.path)
    special = {token: number for number, token in enumerate(SPECIAL_TOKENS, len(ranks))}
    reference = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
    data = strings(random.Random(args.seed), -(-args.strings // 9))
    start = time.perf_counter()
    ours = qwen_tokenizer(args.path)
    print(f"converted in {time.perf_counter() - start:.0f} s\n")
    rows = wrong(data, lambda texts: ours(texts).input_ids, ours.decode, reference)
    print(markdown_table(["kind", "strings", "other ids", "not decoded back"], rows))


if __name__ == "__main__":
    main()
