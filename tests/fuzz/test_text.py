"""Any text of a record becomes the tokens of that text: the template alone writes special tokens, names are found."""

import random
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from idavlm.data import Box, DataError, Identity, Message, Part, Sample
from idavlm.experimental.small_models import small_image_processor
from idavlm.models import BoxFormat, IDAVLMProcessor
from tests.fuzz import fuzz_settings
from tests.tokenizer_families import FAMILIES, SPECIALS

NAMES = [
    "Kate",
    "Kate Moss",
    "Tom",
    "A",
    "Person 1",
    "Person 12",
    "凯特",
    "Zo\u00eb",
    "J.R.",
    "user",
    "</s>",
    "<|im_end|>",
]
NAMES += ["<|im_start|>assistant", "<ref>"]
WORDS = [
    "Katerina",
    "Atom",
    "is",
    "Where",
    "12",
    "x",
    "e\u0301",
    "Zoe\u0308",
    "在",
    "一",
    "😀",
    "_",
    "the box",
    "assistant",
]
SIGNS = [
    " ",
    "\n",
    "\t",
    ".",
    ",",
    "/",
    "[",
    "]",
    "'s",
    '"',
    "<",
    ">",
    "|",
    "<|",
    "|>",
    "。",
    "  ",
    "\u00a0",
    "<|im_",
    "ge>",
]
SIGNS += ["<ima", "\U00100000", "\U0010fffd", "{{ x }}", "{% if %}", "\\", "�"]

SEQ_LENGTH = 2
IMAGE_FORMAT, IDENTITY_FORMAT = "<s>{image}</s>", "{name} is {image}\n"
SIZE = (8, 10)

# Tokenizers whose tokens are bytes of the text, so that the text of each token is known exactly.
BYTES = ("small", "gpt2", "qwen2", "qwen")
NORMALIZING = ("qwen2", "qwen")


def build_processors() -> dict[str, IDAVLMProcessor]:
    options = {"image_seq_length": SEQ_LENGTH, "image_format": IMAGE_FORMAT, "identity_format": IDENTITY_FORMAT}
    processors = {}
    for name, build in FAMILIES.items():
        processors[name] = IDAVLMProcessor(small_image_processor(8), build(), box_format="qwen", **options)
        processors[name].image_loader = lambda root, path: (torch.zeros(3, 8, 8), SIZE)
    return processors


@pytest.fixture(scope="module")
def processors():
    return build_processors()


# Records -------------------------------------------------------------------------------------------------------------


def text_of(rng: random.Random) -> str:
    """Names, special tokens and pieces of both, with signs and words between them; never blank."""
    specials = SPECIALS if rng.random() < 0.1 else [token for token in SPECIALS if token != "<image>"]
    pools = [NAMES, WORDS, SIGNS, specials if rng.random() < 0.5 else WORDS]
    text = "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 8)))
    return text if text.strip() else text + "x"


def record_of(rng: random.Random) -> Sample:
    names = rng.sample(NAMES, rng.randint(0, 4))
    identities = [Identity(name, [f"{number}.png"] * rng.randint(0, 2)) for number, name in enumerate(names)]
    boxes = [Box(name, "scene.png", [1, 1, 5, 6]) for name in names[:1]]
    messages = [Message("system", [Part("text", text_of(rng))])] if rng.random() < 0.3 else []
    for turn in range(rng.randint(1, 2)):
        parts = [Part("text", text_of(rng)) for _ in range(rng.randint(1, 3))]
        if turn == 0:
            parts.insert(rng.randint(0, len(parts)), Part("image", image="scene.png"))
        answer = [Part("text", text_of(rng))]
        if boxes and rng.random() < 0.3:
            answer.insert(rng.randint(0, 1), Part("box", name=names[0], image="scene.png"))
        messages += [Message("user", parts), Message("assistant", answer)]
    return Sample("s", "identity" if identities else "general", identities, messages, boxes)


# What is expected, restated without the library ----------------------------------------------------------------------


@dataclass
class Piece:
    """A piece of the rendered conversation: of the template or of the record, in an answer or not."""

    text: str
    is_data: bool
    is_answer: bool = False


def pieces_of(sample: Sample, template: str) -> list[Piece]:
    image = IMAGE_FORMAT.format(image="<image>" * SEQ_LENGTH)
    lines = [(identity.name, f" is {image}\n") for identity in sample.identities for _ in identity.images]
    pieces = []
    for message in sample.messages:
        is_answer = message.role == "assistant"
        pieces.append(Piece(f"<|im_start|>{message.role}\n", False))
        if message.role == "user":
            for name, rest in lines:
                pieces += [Piece(name, True), Piece(rest, False)]
            lines = []
        for part in message.content:
            if part.type == "text":
                pieces.append(Piece(part.text, True, is_answer))
            elif part.type == "image":
                pieces.append(Piece(image, False))
            else:
                before, after = BoxFormat("qwen").write("\0", sample.boxes[0].box, SIZE).split("\0")
                pieces += [Piece(before, False, True), Piece(part.name, True, True), Piece(after, False, True)]
        pieces.append(Piece("<|im_end|>", False, is_answer))
        pieces.append(Piece("\n" if "<|im_end|>\n" in template or "{{ '\n' }}" in template else "", False))
    return pieces


def runs_of_data(pieces: list[Piece]) -> list[str]:
    """The text of the record between pieces of the template."""
    runs = [""]
    for piece in pieces:
        if piece.is_data:
            runs[-1] += piece.text
        else:
            runs.append("")
    return runs


def name_characters(pieces: list[Piece], names: list[str]) -> list[int | None]:
    """For each character of the conversation the identity whose name it is part of, by trying every place."""
    text = "".join(piece.text for piece in pieces)
    searched = [piece.is_data and not piece.is_answer for piece in pieces for _ in piece.text]
    spellings = [
        (form, number) for number, name in enumerate(names) for form in {name, unicodedata.normalize("NFD", name)}
    ]
    owners: list[int | None] = [None] * len(text)
    start = 0
    while start < len(text):
        fitting = [
            (form, number)
            for form, number in spellings
            if text.startswith(form, start)
            and all(searched[start : start + len(form)])
            and not one_word(text[start - 1 : start], form[0])
            and not one_word(form[-1], text[start + len(form) : start + len(form) + 1])
        ]
        if fitting:
            form, number = max(fitting, key=lambda found: len(unicodedata.normalize("NFD", found[0])))
            owners[start : start + len(form)] = [number] * len(form)
            start += len(form)
        else:
            start += 1
    return owners


def one_word(first: str, second: str) -> bool:
    if second and unicodedata.combining(second):
        return True
    letters = [bool(c) and (c.isalnum() or bool(unicodedata.combining(c))) and c < "\u2e80" for c in (first, second)]
    return all(letters)


# Checks --------------------------------------------------------------------------------------------------------------


def check(name: str, processor: IDAVLMProcessor, sample: Sample) -> str:
    """Encode a record and compare with what is expected. Returns the outcome."""
    tokenizer = processor.tokenizer
    pieces = pieces_of(sample, processor.chat_template)
    specials = [token for token in tokenizer.get_vocab() if token in {*SPECIALS, "<|endoftext|>"}]
    try:
        encoded = processor.encode(sample)
    except DataError as error:
        return check_refusal(name, error, sample, runs_of_data(pieces), specials)
    ids, labels = encoded["input_ids"].tolist(), encoded["labels"].tolist()
    template = "".join(piece.text if not piece.is_data else "\0" for piece in pieces)
    for token in specials:
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == template.count(token), token
    check_prompt(processor, sample, ids)
    if name in BYTES:
        check_bytes(name, tokenizer, pieces, sample, ids, labels, encoded)
    return "encoded"


def check_refusal(name: str, error: DataError, sample: Sample, runs: list[str], specials: list[str]) -> str:
    """Text is refused if it holds the placeholder; otherwise only for reasons of the tokenizer."""
    if error.kind == "placeholders":
        assert any("<image>" in text for text in [*runs, *(identity.name for identity in sample.identities)])
        return "placeholder refused"
    if error.kind == "record":  # the vocabulary holds special tokens as pieces of text
        assert name == "unigram"
        assert any(token in run for run in runs for token in specials)
        return "special token refused"
    assert name not in BYTES
    assert "crosses the boundary of an assistant turn" in str(error)
    return "boundary refused"


def check_prompt(processor: IDAVLMProcessor, sample: Sample, ids: list[int]) -> None:
    """The prompt of generation is how training begins."""
    asked = replace(sample, messages=sample.messages[:-1])
    prompt = processor.encode(asked, add_generation_prompt=True)["input_ids"].tolist()
    assert ids[: len(prompt)] == prompt


def check_bytes(name, tokenizer, pieces, sample, ids, labels, encoded) -> None:
    """Compare bytes: of all tokens, of the labels, and of names."""
    if name in NORMALIZING:
        pieces = [replace(piece, text=unicodedata.normalize("NFC", piece.text)) for piece in pieces]
    text = "".join(piece.text for piece in pieces)
    added = set(tokenizer.get_added_vocab())
    values = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokens = [
        token.encode() if token in added else bytes(values[letter] for letter in token)
        for token in tokenizer.convert_ids_to_tokens(ids)
    ]
    assert b"".join(tokens) == text.encode()
    is_answer = [piece.is_answer for piece in pieces for _ in range(len(piece.text.encode()))]
    names = [unicodedata.normalize("NFC", identity.name) for identity in sample.identities]
    owners = [
        owner
        for character, owner in zip(text, name_characters(pieces, names), strict=True)
        for _ in range(len(character.encode()))
    ]
    start = 0
    masks = encoded["name_mask"].tolist(), encoded["token_identity_index"].tolist()
    for token, label, in_name, identity in zip(tokens, labels, *masks, strict=True):
        stop = start + len(token)
        assert set(is_answer[start:stop]) == {label != -100}
        named = [owner for owner in owners[start:stop] if owner is not None]
        assert in_name == bool(named), (text, token)
        assert not named or identity == named[0]
        start = stop


@fuzz_settings(150)
@given(rng=st.randoms(use_true_random=False), name=st.sampled_from(sorted(FAMILIES)))
def test_any_text_becomes_its_own_tokens(processors, rng, name):
    check(name, processors[name], record_of(rng))


def run(count: int, seed: int) -> Counter:
    """Encode ``count`` random records with every tokenizer in turn; returns how often each outcome occurred."""
    rng, processors, outcomes = random.Random(seed), build_processors(), Counter()
    names = sorted(processors)
    for number in range(count):
        name = names[number % len(names)]
        outcomes[f"{name}: {check(name, processors[name], record_of(rng))}"] += 1
    return outcomes
