"""Which tokens of a prompt are the names of identities."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from idavlm.data import DataError, Identity, Message, Part, Sample
from idavlm.experimental.small_models import small_tokenizer
from idavlm.models.identity_names import find_names, propagate_names
from tests.small_models import TEXTS, small_processor


def metaspace_tokenizer(texts) -> PreTrainedTokenizerFast:
    """As SentencePiece's: a text begins with a space, a token alone is decoded without it."""
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


TOKENIZERS = {
    "byte-level": small_tokenizer(TEXTS, vocab_size=320),
    "metaspace": metaspace_tokenizer(TEXTS),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def found(tokenizer, text: str, names: list[str]) -> list[tuple[str, int]]:
    """Return ``(text, identity)`` of each run of tokens that spells a name."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    identities = find_names(tokenizer, ids, [-100] * len(ids), names)
    runs: list[list] = []
    for token, identity, before in zip(ids, identities, [-1, *identities], strict=False):
        if identity >= 0 and identity == before:
            runs[-1][0].append(token)
        elif identity >= 0:
            runs.append([[token], identity])
    return [(tokenizer.decode(tokens).strip(), identity) for tokens, identity in runs]


@pytest.mark.parametrize(
    "text",
    [
        "Kate",
        "Kate is reading.",
        "Where is Kate",
        "Where is Kate?",
        "(Kate)",
        "Tom\nKate is",
        "Kate's",
        "is Kate, is",
        "Kate\n",
    ],
)
def test_a_name_is_found_wherever_it_stands(tokenizer, text):
    assert found(tokenizer, text, ["Kate"]) == [("Kate", 0)]


@pytest.mark.parametrize(
    "text", ["Katerina is", "Where is Kates?", "SuperKate", "xKate is", "Kate2 is", "2Kate", "kate"]
)
def test_only_whole_words_count(tokenizer, text):
    assert found(tokenizer, text, ["Kate"]) == []


def test_the_longer_name_wins(tokenizer):
    names = ["Kate", "Kate Moss", "Tom", "Person 1", "Person 12"]
    text = "Kate Moss and Kate and Tom, Person 12 and Person 1 and Person 123"
    expected = [("Kate Moss", 1), ("Kate", 0), ("Tom", 2), ("Person 12", 4), ("Person 1", 3)]
    assert found(tokenizer, text, names) == expected


@pytest.mark.parametrize("name", ["Zébulon Ångström", "Anna-Maria O'Neill", "凯特", "R2-D2", "Иван"])
def test_names_of_several_tokens(name):
    tokenizer = TOKENIZERS["byte-level"]
    assert len(tokenizer.encode(name)) > 1
    text = f"{name} is\n{name}. Where is {name}?"
    assert found(tokenizer, text, ["Tom", name]) == [(name, 1)] * 3


def test_names_between_chinese_characters_need_no_spaces():
    assert found(TOKENIZERS["byte-level"], "凯特在哪里", ["凯特"]) == [("凯特", 0)]


def test_names_in_answers_do_not_count(tokenizer):
    ids = tokenizer.encode("Kate is Kate", add_special_tokens=False)
    size = len(tokenizer.encode("Kate", add_special_tokens=False))
    labels = [-100] * (len(ids) - size) + ids[-size:]
    identities = find_names(tokenizer, ids, labels, ["Kate"])
    assert [identity >= 0 for identity in identities] == [place < size for place in range(len(ids))]
    # A name of which only a part is a label is no name of the prompt.
    if size > 1:
        labels = [-100] * (len(ids) - 1) + ids[-1:]
        assert find_names(tokenizer, ids, labels, ["Kate"])[-size:] == [-1] * size


def test_what_is_remembered_is_forgotten_with_new_tokens():
    tokenizer = small_tokenizer(TEXTS, vocab_size=320)
    assert found(tokenizer, "Kate is reading.", ["Kate"]) == [("Kate", 0)]
    tokenizer.add_tokens(["Kate"])
    assert found(tokenizer, "Kate is reading.", ["Kate"]) == [("Kate", 0)]


def test_no_names_to_find(tokenizer):
    ids = tokenizer.encode("Kate is reading.", add_special_tokens=False)
    assert find_names(tokenizer, ids, ids, []) == [-1] * len(ids)
    assert find_names(tokenizer, [], [], ["Kate"]) == []


def test_names_after_the_headers_of_turns_and_placeholders():
    tokenizer = small_processor().tokenizer
    text = "<|user|>Kate is <image>\nTom is <image>\n<image>Kate?<|end|><|assistant|>Tom"
    ids = tokenizer.encode(text, add_special_tokens=False)
    spans = [
        tokenizer.decode([token])
        for token, identity in zip(ids, find_names(tokenizer, ids, [-100] * len(ids), ["Kate", "Tom"]), strict=True)
        if identity >= 0
    ]
    assert "".join(spans).replace(" ", "") == "KateTomKateTom"


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
