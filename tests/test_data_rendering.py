"""Chat labels: exactly the assistant turns are labelled, or an error is raised."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from idavlm.data import DataError, render_chat
from idavlm.data.rendering import Segment
from tests.tokenizer_families import Slow

HEADER = "{{ '<|im_start|>' + message['role'] + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = (
    "{% for message in messages %}" + HEADER + "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}" + PROMPT
)
MARKED = (
    "{% for message in messages %}" + HEADER + "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
NO_SPECIAL_TOKENS = (
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n###\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# An empty thinking block is added to the last answer only, as in Qwen 3.
THINKING = (
    "{% for message in messages %}" + HEADER + "{% if loop.last and message['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}" + PROMPT
)


@pytest.fixture(scope="module")
def tokenizer():
    return build()


def build(*, byte_level=True, merges=()):
    """A small byte-level tokenizer; with ``byte_level=False`` without the split into words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=byte_level)
    backend.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    found.add_special_tokens({"additional_special_tokens": special[3:]})
    # Special tokens without a name in the configuration, as in Phi.
    found.add_tokens([AddedToken(token, special=True) for token in ("<|end|>", "<|user|>", "<|assistant|>")])
    return found


CHAT = [
    {"role": "user", "content": [Segment("Kate is "), Segment("<image>", is_markup=True), Segment("\nWhere is Kate?")]},
    {"role": "assistant", "content": "[12, 3, 40, 5]"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, très sûre 😀."},
]


def labelled(tokenizer, messages=CHAT, **options):
    """The labelled text, one string per run of labels."""
    ids, labels, _ = render_chat(tokenizer, messages, **options)
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    runs, open_run = [], False
    for token, label in zip(ids, labels, strict=True):
        if label != -100:
            if not open_run:
                runs.append([])
            runs[-1].append(token)
        open_run = label != -100
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "start", "end"),
    [
        (CHATML, "", "<|im_end|>"),
        (MARKED, "", "<|im_end|>"),
        (MISTRAL, " ", "</s>"),
        (PHI, "", "<|end|>"),
        (NO_SPECIAL_TOKENS, "", "\n###\n"),
    ],
    ids=["chatml", "marked", "mistral", "phi", "no_special_tokens"],
)
def test_labels_are_the_answers_and_their_ends(tokenizer, template, start, end):
    tokenizer.chat_template = template
    assert labelled(tokenizer) == [start + "[12, 3, 40, 5]" + end, start + "Yes, très sûre 😀." + end]
    assert labelled(tokenizer, CHAT[:2]) == [start + "[12, 3, 40, 5]" + end]


def test_generation_tags_and_comparison_give_the_same_labels(tokenizer):
    assert render_chat(tokenizer, CHAT, chat_template=CHATML) == render_chat(tokenizer, CHAT, chat_template=MARKED)


def test_training_starts_with_exactly_the_prompt_of_generation(tokenizer):
    tokenizer.chat_template = CHATML
    ids, labels, _ = render_chat(tokenizer, CHAT)
    for turns in (1, 3):
        prompt, none, _ = render_chat(tokenizer, CHAT[:turns], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] != -100
        assert labels[len(prompt) - 1] == -100
        assert set(none) == {-100}


def test_text_that_the_template_adds_to_an_answer_is_labelled(tokenizer):
    """The model must generate it, because it follows the generation prompt."""
    found = labelled(tokenizer, CHAT, chat_template=THINKING)
    assert found == ["[12, 3, 40, 5]<|im_end|>", "<think>\n\n</think>\n\nYes, très sûre 😀.<|im_end|>"]


def test_a_system_turn_and_stripped_content(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    messages.append({"role": "assistant", "content": "Hello.  "})
    assert labelled(tokenizer, messages, chat_template=CHATML) == ["Hello.  <|im_end|>"]
    stripping = CHATML.replace("message['content'] +", "message['content'] | trim +")
    assert labelled(tokenizer, messages, chat_template=stripping) == ["Hello.<|im_end|>"]


def test_a_question_after_the_last_answer_is_not_labelled(tokenizer):
    for template, end in (
        (CHATML, "<|im_end|>"),
        (MARKED, "<|im_end|>"),
        (NO_SPECIAL_TOKENS, "\n###\n"),
        (PHI, "<|end|>"),
    ):
        assert labelled(tokenizer, CHAT[:3], chat_template=template) == ["[12, 3, 40, 5]" + end]
    fails(tokenizer, "turn 1 changes if another turn follows", CHAT[:3], chat_template=THINKING)


def test_without_assistant_turns_nothing_is_labelled(tokenizer):
    assert labelled(tokenizer, CHAT[:1], chat_template=CHATML) == []
    assert labelled(tokenizer, CHAT[:1], chat_template=MARKED) == []


def test_a_tokenizer_without_offsets_gives_the_same_labels(tokenizer):
    for template in (CHATML, MISTRAL, NO_SPECIAL_TOKENS):
        tokenizer.chat_template = template
        assert render_chat(Slow(tokenizer), CHAT) == render_chat(tokenizer, CHAT)
    with pytest.raises(DataError, match="needs a fast tokenizer"):
        render_chat(Slow(tokenizer), CHAT, chat_template=MARKED)


@settings(max_examples=100, deadline=None)
@given(
    contents=st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=6).map(
        lambda found: found[: len(found) // 2 * 2]
    )
)
def test_any_text_is_labelled_exactly(tokenizer, contents):
    """Any text, including text that occurs in other turns, emoji, newlines and spaces."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    expected = [text + "<|im_end|>" for text in contents[1::2]]
    expected = [tokenizer.decode(tokenizer(text).input_ids) for text in expected]
    assert labelled(tokenizer, messages, chat_template=CHATML) == expected
    assert labelled(tokenizer, messages, chat_template=MARKED) == expected


# Errors --------------------------------------------------------------------------------------------------------------


def fails(tokenizer, message, messages=CHAT, **options):
    with pytest.raises(DataError, match=message) as caught:
        render_chat(tokenizer, messages, **options)
    return caught.value.kind


def test_a_conversation_that_is_too_long_is_an_error(tokenizer):
    ids = render_chat(tokenizer, CHAT, chat_template=CHATML).input_ids
    assert render_chat(tokenizer, CHAT, chat_template=CHATML, max_length=len(ids))[0] == ids
    message = rf"has {len(ids)} tokens, more than max_length={len(ids) - 1}"
    assert fails(tokenizer, message, chat_template=CHATML, max_length=len(ids) - 1) == "length"


def test_a_template_that_rejects_the_messages(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert fails(tokenizer, "rejects the messages: no system role", messages, chat_template=MISTRAL) == "template"
    assert fails(tokenizer, "rejects the messages", chat_template="{{ nothing.at.all }}") == "template"
    assert fails(tokenizer, "rejects the messages", chat_template=MARKED + "{{ a.b.c }}") == "template"


def test_no_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat_template; set tokenizer.chat_template"):
        render_chat(tokenizer, CHAT)


def test_a_prompt_that_is_no_prefix(tokenizer):
    other = CHATML.replace(PROMPT, "{% if add_generation_prompt %}{{ '<|im_start|>bot\n' }}{% endif %}")
    message = r"continues with 'assistant.*the generation prompt of turn 1 with 'bot"
    assert fails(tokenizer, message, chat_template=other) == "template"


def test_changed_content(tokenizer):
    changing = CHATML.replace("message['content']", "(message['content'] | upper)")
    fails(tokenizer, r"does not write the content of messages\[0\] \('Kate is", chat_template=changing)
    changing = CHATML.replace("message['content']", "(message['content'][:20])")
    fails(tokenizer, r"does not write the content of messages\[0\]", chat_template=changing)
    changing = CHATML.replace(
        "message['content']", "(message['content'] | upper if message['role'] == 'assistant' else message['content'])"
    )
    fails(tokenizer, "content of turn 3 .* is not found", chat_template=changing)


def test_turns_without_an_end_or_with_different_ends(tokenizer):
    fails(
        tokenizer,
        "have no end-of-turn text, so a model could not learn to stop",
        chat_template=CHATML.replace("<|im_end|>", ""),
    )
    differing = CHATML.replace("+ '<|im_end|>'", "+ ('</s>' if loop.index == 4 else '<|im_end|>')")
    fails(tokenizer, "turn 1 ends with .*, the last turn with '</s>'", chat_template=differing)


def test_an_answer_that_changes_the_tokens_of_its_prompt():
    """Vicuna's prompt ends with a space that is merged into the first token of the answer."""
    merged = build(byte_level=False, merges=[("Ġ", "Y")])
    messages = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    fails(
        merged,
        "turn 1: the tokens of the generation prompt change if the answer follows",
        messages,
        chat_template=VICUNA,
    )
    assert labelled(build(), messages, chat_template=VICUNA.replace("' }}{% endif %}", "' }}{% endif %}")) == [
        "Yes.</s>"
    ]


def test_a_token_across_the_boundary_of_a_marked_span():
    merged = build(byte_level=False, merges=[("Ċ", "Y")])
    fails(merged, r"the token '\\nY' crosses the boundary of an assistant turn", chat_template=MARKED)
