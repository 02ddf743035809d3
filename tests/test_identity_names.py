"""Which tokens of a prompt are the names of identities."""

import unicodedata

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from idavlm.data import DataError, Identity, Message, Part, Sample, render_chat
from idavlm.data.rendering import Segment
from idavlm.experimental.small_models import small_image_processor
from idavlm.models import IDAVLMProcessor
from idavlm.models.identity_names import find_names, propagate_names, split_at_names
from tests.small_models import TEXTS, sample, small_processor
from tests.tokenizer_families import FAMILIES, joining, metaspace

TOKENIZERS = {name: build() for name, build in FAMILIES.items()} | {"metaspace": metaspace(TEXTS)}
TEXT_ALONE = "{{ messages[0]['content'] }}"


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def spelled(tokenizer, text: str, names: list[str]) -> list[tuple[str, int]]:
    """Return ``(text, identity)`` of each run of tokens that spells a name, with all characters of these tokens."""
    messages = [{"role": "user", "content": split_at_names([Segment(text)], names)}]
    ids, _, identities = render_chat(tokenizer, messages, chat_template=TEXT_ALONE)
    options = {"add_special_tokens": False, "split_special_tokens": True}
    offsets = tokenizer(text, return_offsets_mapping=True, **options)
    assert offsets["input_ids"] == ids
    runs: list[list] = []
    for (start, end), identity, before in zip(offsets["offset_mapping"], identities, [None, *identities], strict=False):
        if identity is not None and identity == before:
            runs[-1][1] = end
        elif identity is not None:
            runs.append([start, end, identity])
    return [(text[start:end].strip(), identity) for start, end, identity in runs]


def found(text: str, names: list[str]) -> list[tuple[str, int]]:
    """Return ``(text, identity)`` of each name in the text."""
    return [(text[start:end], identity) for start, end, identity in find_names(text, names)]


BEFORE = [
    "",
    " ",
    "\n",
    "\t",
    "  ",
    "/",
    "[",
    "(",
    ",",
    ".",
    ":",
    "-",
    "'",
    '"',
    "“",
    "«",
    "…",
    "*",
    "_",
    "#",
    "@",
    "<",
    "=",
]
BEFORE += [
    "。",
    "、",
    "在",
    "の",
    "는",
    "😀",
    "\u00a0",
    "\u200b",
    "Yes.",
    "Bob/",
    "Tom\n",
    "Kate and ",
    "<|im_end|>",
    "<pad>",
]
AFTER = [
    "",
    " ",
    "\n",
    "\t",
    "/",
    "]",
    ")",
    ",",
    ".",
    "?",
    "'s",
    "’s",  # noqa: RUF001
    '"',
    "”",
    "»",
    "_",
    ">",
    "是",
    "は",
    "가",
    "😀",
    "/Bob",
]
AFTER += [" is reading.", "...", "\u3000", "</s>"]


@pytest.mark.parametrize("before", BEFORE)
def test_a_name_is_found_next_to_any_sign(tokenizer, before):
    for after in AFTER:
        text = f"{before}Kate{after}"
        count = 2 if "Kate" in before else 1
        assert found(text, ["Kate"]) == [("Kate", 0)] * count
        if tokenizer is TOKENIZERS["unigram"] and ("|>" in text or "<pad>" in text or "</s>" in text):
            continue  # refused, see the tests of special tokens
        runs = spelled(tokenizer, text, ["Kate"])
        assert [identity for _, identity in runs] == [0] * count
        assert all("Kate" in run for run, _ in runs)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "unigram"])
def test_encoded_samples_mark_names_next_to_any_sign(family):
    processor = IDAVLMProcessor(small_image_processor(8), TOKENIZERS[family], image_seq_length=4)
    for before in BEFORE:
        texts = [Part("text", f"Is {before}Kate?"), Part("text", f"\nAnd {before}Zoe\u0308.")]
        messages = [Message("user", texts), Message("assistant", [Part("text", "Yes.")])]
        sample = Sample("t", "identity", [Identity("Kate", []), Identity("Zo\u00eb", [])], messages)
        encoded = processor.encode(sample)
        found = encoded["token_identity_index"][encoded["name_mask"]].unique()
        assert found.tolist() == [0, 1], before


def test_a_token_with_a_name_and_what_is_next_to_it_belongs_to_the_name():
    """Of two names in one token, the first counts."""
    merged = PreTrainedTokenizerFast(tokenizer_object=joining("(Ka", "e/Bo"))
    assert spelled(merged, "is (Kate) or (Tom)", ["Kate"]) == [("(Kate", 0)]
    assert spelled(merged, "Kate/Bob.", ["Kate", "Bob"]) == [("Kate/Bo", 0), ("b", 1)]


@pytest.mark.parametrize(
    "text",
    ["Katerina is", "Where is Kates?", "SuperKate", "xKate is", "Kate2 is", "2Kate", "kate", "Kateé", "Kate\u0301"],
)
def test_only_whole_words_count(tokenizer, text):
    assert found(text, ["Kate"]) == []
    assert spelled(tokenizer, text, ["Kate"]) == []


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("凯特在哪里", "凯特", 1),
        ("Kate在哪里，凯特2岁", "凯特", 1),  # noqa: RUF001
        ("ケイトはケイトリンとケイト", "ケイト", 2),
        ("私がケイト・モス", "ケイト", 1),
        ("민수는 김민수와", "민수", 2),
        ("राम और रामा", "राम", 1),
        ("กานต์กานดา", "กาน", 2),
        ("กาน์", "กาน", 0),
        ("Zoe Zoë", "Zoe", 1),
        ("علی و علی‌ها", "علی", 1),  # noqa: RUF001
    ],
)
def test_names_in_other_scripts(text, name, count):
    """Where words have no spaces between them, a name may touch other words; accents and vowel signs continue it."""
    for form in ("NFC", "NFD"):
        assert len(find_names(unicodedata.normalize(form, text), [name])) == count


def test_the_longer_name_wins(tokenizer):
    names = ["Kate", "Kate Moss", "Tom", "Person 1", "Person 12"]
    text = "Kate Moss and Kate and Tom, Person 12 and Person 1 and Person 123, Kate Mossy"
    expected = [("Kate Moss", 1), ("Kate", 0), ("Tom", 2), ("Person 12", 4), ("Person 1", 3), ("Kate", 0)]
    assert found(text, names) == expected
    assert [identity for _, identity in spelled(tokenizer, text, names)] == [identity for _, identity in expected]


@pytest.mark.parametrize(
    "name", ["Zébulon Ångström", "Anna-Maria O'Neill", "凯特", "R2-D2", "Иван", "J.R.", "<b>", "각"]
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_any_spelling(name, form):
    """The normal form of neither the name nor the text matters."""
    text = f"{name} is\n{name}. Where is {name}?"
    written = unicodedata.normalize(form, text)
    for names in (["Tom", unicodedata.normalize("NFC", name)], ["Tom", unicodedata.normalize("NFD", name)]):
        assert found(written, names) == [(unicodedata.normalize(form, name), 1)] * 3
        for tokenizer in (TOKENIZERS["small"], TOKENIZERS["qwen"]):
            assert [identity for _, identity in spelled(tokenizer, written, names)] == [1] * 3


def test_names_in_answers_do_not_count(processor):
    for answer in ("Kate.", "Kate"):
        messages = [Message("user", [Part("text", "Who?")]), Message("assistant", [Part("text", answer)])]
        encoded = processor.encode(Sample("t", "identity", [Identity("Kate", [])], messages))
        assert not encoded["name_mask"].any()


def test_names_in_the_template_do_not_count(processor):
    """Only messages name identities."""
    other = small_processor(chat_template="assistant, Kate: " + processor.chat_template)
    messages = [Message("user", [Part("text", "Where is Kate?")]), Message("assistant", [Part("text", "Here.")])]
    user = other.tokenizer.convert_tokens_to_ids("<|user|>")
    for name, count in (("Kate", 1), ("assistant", 0)):
        encoded = other.encode(Sample("t", "identity", [Identity(name, [])], messages))
        assert encoded["name_mask"].any() == count
        before_message = encoded["token_identity_index"][: encoded["input_ids"].tolist().index(user)]
        assert (before_message == -1).all()


def test_a_template_that_rewrites_names_is_an_error(processor):
    other = small_processor(chat_template=processor.chat_template.replace("['content']", "['content'] | title"))
    messages = [Message("user", [Part("text", "Where is Kate?")]), Message("assistant", [Part("text", "Here.")])]
    with pytest.raises(DataError, match=r"the chat template does not write the content of messages\[0\]"):
        other.encode(Sample("t", "identity", [Identity("Kate", [])], messages))


def test_no_names_to_find():
    assert find_names("Kate is reading.", []) == []
    assert find_names("Kate is reading.", ["  "]) == []
    assert find_names("", ["Kate"]) == []


def test_names_are_not_found_in_markup():
    content = [
        Segment("<image>", is_markup=True),
        Segment("the image, Ka"),
        Segment("te "),
        Segment("K", is_markup=True),
    ]
    pieces = split_at_names([*content, Segment("ate")], ["image", "Kate"])
    assert "".join(piece.text for piece in pieces) == "<image>the image, Kate Kate"
    assert [piece.text for piece in pieces if piece.identity is not None] == ["image", "Kate"]


def test_names_after_the_headers_of_turns_and_placeholders(processor, root):
    encoded = processor.encode(sample(root))
    spelled = [processor.tokenizer.decode(token) for token in encoded["input_ids"][encoded["name_mask"]]]
    assert "".join(spelled).replace(" ", "") == "KateTomKateKate"


def test_placeholders_are_expanded_around_names():
    processor = small_processor()
    rows = processor._repeat_placeholders([7, processor.image_token_id, 8], [-100, -100, 8], [0, -1, 1])
    expected = ([7, *[processor.image_token_id] * 4, 8], [-100] * 5 + [8], [0, -1, -1, -1, -1, 1])
    assert [row.tolist() for row in rows] == list(expected)


def test_text_without_identities():
    general = Sample(
        "t", "general", [], [Message("user", [Part("text", "Kate?")]), Message("assistant", [Part("text", "A")])]
    )
    assert (small_processor().encode(general)["token_identity_index"] == -1).all()
    introduced = Sample("t", "identity", [Identity("Kate", [])], general.messages)
    assert (small_processor().encode(introduced)["token_identity_index"] == 0).any()


def test_a_name_extends_to_what_follows_until_an_image_a_name_or_the_end_of_an_answer():
    prompt, answer, image = -100, 5, 9
    names = [-1, 0, -1, -1, -1, 1, -1, -1, -1, 0, -1]
    tokens = [1, 1, 1, image, 1, 1, 1, 1, 1, 1, 1]
    labels = [prompt] * 6 + [answer] * 2 + [prompt] * 3
    assert propagate_names(names, tokens, labels, image) == [-1, 0, 0, -1, -1, 1, 1, 1, -1, 0, 0]


def test_question_and_answer_are_about_its_name():
    messages = [Message("user", [Part("text", "Is Kate here?")]), Message("assistant", [Part("text", "Kate is")])]
    encoded = small_processor().encode(Sample("t", "identity", [Identity("Kate", [])], messages))
    index, labels = encoded["token_identity_index"], encoded["labels"]
    first = index.tolist().index(0)
    assert 0 < first < labels.ne(-100).nonzero()[0]
    assert (index[first:] == 0).all()
    assert (index[:first] == -1).all()


def test_names_of_a_conversation_are_the_same_in_generation_as_in_training():
    turns = [("user", "Is Kate here?"), ("assistant", "Tom is."), ("user", "Where is Tom?"), ("assistant", "A")]
    messages = [Message(role, [Part("text", text)]) for role, text in turns]
    processor, identities = small_processor(), [Identity("Kate", []), Identity("Tom", [])]
    whole = processor.encode(Sample("t", "identity", identities, messages))
    prompt = processor.encode(Sample("t", "identity", identities, messages[:-1]), add_generation_prompt=True)
    length = len(prompt["input_ids"])
    assert torch.equal(prompt["input_ids"], whole["input_ids"][:length])
    assert torch.equal(prompt["token_identity_index"], whole["token_identity_index"][:length])
    answer = (whole["labels"] != -100)[:length]
    assert prompt["token_identity_index"][answer].unique().tolist() == [0]  # about Kate, though it names Tom
    assert set(prompt["token_identity_index"].tolist()) == {-1, 0, 1}


def test_a_template_that_rewrites_earlier_turns_is_an_error():
    processor = small_processor()
    rewriting = "{% if add_generation_prompt %}again {% endif %}" + processor.chat_template
    processor.chat_template = rewriting
    messages = [Message(role, [Part("text", "Kate")]) for role in ("user", "assistant", "user")]
    with pytest.raises(DataError, match="earlier turns differently"):
        processor.encode(Sample("t", "identity", [Identity("Kate", [])], messages), add_generation_prompt=True)
