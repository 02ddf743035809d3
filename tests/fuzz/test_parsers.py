"""Any answer of a model is parsed, in time that grows with its length: numbers, letters, yes or no, boxes."""

import json
import random
import time
import unicodedata
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from idavlm.evaluation import is_refusal, parse_image_number, parse_letter, parse_yes_no
from idavlm.evaluation.judge import parse_score, parse_winner
from idavlm.models import BoxFormat
from idavlm.utils import contains_name
from idavlm.utils.json_text import find_json
from tests.fuzz import fuzz_settings

PIECES = [
    "image ", "Image", "photo", "option ", "1", "2", "12", "30", "C", "b", "II", "I ", "one", "sıx", "third", "3rd",
    "not ", "isn't ", "no ", "yes", "but ", "and ", "or ", "rather than ", "is ", "the ", "answer ", "my ", "final ",
    "answer is ", "Answer:", "答案是", "图", "第", "三", "不是", "而是", "#", "# ", "Kate", "Kate is ", "px",
    "[1, 2, 3, 4]",
    "(1,2)", "(3,4)", "<box>", "</box>", "<|box_start|>", "<|box_end|>", "<ref>", "1 2 3 4 ", "%", "x1=", "y1: ",
    "left: 3", "width", "1,1,1,1", "-", "-1", ".5", "1.", "1e400",
    "9999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999",
    "<think>", "</think>", " ", "  ", "\n", "\n\n", "\t", ",", ".", ";", ":", "/", "[", "]", "(", ")", "{", "<", ">",
    '"', "'", "*", "_", "İ", "ſ", "²", "٣", "①", "ﷺ", "\u2028", "\x00", "\ud83d", "é", "，", "。",
    "<answer>", "</answer>", "\\boxed{", "}", "\\text{", "$", "```json\n", "```", '{"answer": ', '"label": "Kate"',
    '"bbox_2d": [1, 2, 3, 4]', '{"', '": ', '", ', "true", "null", '{"x1": 1', "[{", "}]", "'", "bbox", "Tom",
    "Kate's", "Ann", "Joanna", "image 2: no", "refused", "I cannot identify ", "Not sure", "对不起", "我不知道", "是的",
    "对",
    "राम", "ा", "\u200c", "นี", "(A) ", "Score: 7", "/10", "overall ", "[[A]]", "tie", "◁/think▷", "<|im_end|>",
    "wait ", "**", "| 3 |", "# ", "//",
]  # fmt: skip
FORMATS = [*map(BoxFormat, BoxFormat.KINDS), BoxFormat("bins32")]
SECONDS = 3
"""Far more CPU time than an answer of 20,000 characters takes, and far less than a pattern that goes back over it."""


def short_text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 14)))


def long_text(rng: random.Random) -> str:
    """One to three pieces repeated, between other text."""
    unit = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 3)))
    return short_text(rng) + unit * (20_000 // len(unit)) + short_text(rng)


def check(text: str, name: str) -> str:
    """Parse an answer in every way and return what was found."""
    start = time.process_time()
    number = parse_image_number(text, count=4, name=name)
    assert number is None or 1 <= number <= 4
    letter = parse_letter(text)
    assert letter is None or "A" <= letter <= "Z"
    assert parse_yes_no(text) in (True, False, None)
    assert is_refusal(text) in (True, False)
    assert contains_name(text + " Kate", "Kate")
    assert not contains_name("", name)
    score = parse_score(text)
    assert score is None or 1 <= score <= 10
    assert parse_winner(text) in ("A", "B", "tie", None)
    boxes = 0
    for form in FORMATS:
        box, reason = form.read(text, (30, 50), name=name)
        assert (box is None) == (reason in ("none", "empty", "convention"))
        if box is not None:
            assert 0 <= box[0] < box[2] <= 50
            assert 0 <= box[1] < box[3] <= 30
            boxes += 1
    seconds = time.process_time() - start
    length = max(len(unicodedata.normalize("NFKC", text)), 20_000)
    assert seconds < SECONDS * length / 20_000, f"{seconds:.1f} s for {text[:100]!r} ... {text[-100:]!r}"
    return " and ".join(["number"] * (number is not None) + ["box"] * bool(boxes)) or "nothing"


@fuzz_settings(300)
@given(rng=st.randoms(use_true_random=False), name=st.sampled_from(["", "Kate"]))
def test_any_answer_is_parsed(rng, name):
    check(short_text(rng), name)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**14), 10**14) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)


@fuzz_settings(100)
@given(value=st.lists(values, min_size=1, max_size=4) | st.dictionaries(st.text(max_size=10), values, min_size=1))
def test_valid_json_is_read_as_json_reads_it(value):
    for text in (json.dumps(value), json.dumps(value, indent=1, ensure_ascii=False)):
        assert find_json(text) == [(0, len(text), json.loads(text))]
        assert find_json(f"Here: {text}. Done")[0][2] == value


@fuzz_settings(100)
@given(value=st.lists(values, min_size=1, max_size=4), length=st.integers(0, 200))
def test_json_that_ends_too_early_is_no_error(value, length):
    for _, _, found in find_json(json.dumps(value)[:length]):
        json.dumps(found)


@fuzz_settings(8)
@given(rng=st.randoms(use_true_random=False))
def test_a_long_answer_is_parsed_in_time(rng):
    check(long_text(rng), "Kate")


def run(count: int, seed: int) -> Counter:
    """Parse ``count`` answers, one of a hundred of them long; returns how often each outcome occurred."""
    rng, outcomes = random.Random(seed), Counter()
    for number in range(count):
        is_long = number % 100 == 99
        text = long_text(rng) if is_long else short_text(rng)
        outcomes[f"{'long' if is_long else 'short'}: {check(text, rng.choice(['', 'Kate']))}"] += 1
    return outcomes
