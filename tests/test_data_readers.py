"""Readers: other formats are converted to the schema, with placeholders, roles and references."""

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idavlm.data import READERS, DataError, RecordDataset, parse_sample


def read(reader, record):
    return parse_sample(READERS[reader](record, "f.json:3"), where="f.json:3")


def shown(message):
    """``I think <a.jpg>`` for the parts "I think " and image a.jpg."""
    return "".join(f"<{part.image}>" if part.type == "image" else part.text for part in message.content)


def turns(*values, names=("human", "gpt")):
    return [{"from": names[i % 2], "value": value} for i, value in enumerate(values)]


CASES = {
    "llava": {"id": 5, "image": "a.jpg", "conversations": turns("<image>\nWhat?", "A cat.", "Sure?", "Yes.")},
    "yi_vl": {
        "id": 5,
        "image": "a.jpg",
        "conversations": turns("<image_placeholder>\nWhat?", "A cat.", "Sure?", "Yes.", names=("human", "assistant")),
    },
    "sharegpt": {"id": 5, "images": ["a.jpg"], "conversations": turns("<image>\nWhat?", "A cat.", "Sure?", "Yes.")},
    "qwen_vl": {
        "id": 5,
        "conversations": turns("<img>a.jpg</img>\nWhat?", "A cat.", "Sure?", "Yes.", names=("user", "assistant")),
    },
    "openai": {
        "id": 5,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}},
                    {"type": "text", "text": "\nWhat?"},
                ],
            },
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        ],
    },
    "idavlm": {
        "id": 5,
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
    },
}


@pytest.mark.parametrize("reader", CASES)
def test_one_conversation_in_every_format(reader):
    sample = read(reader, CASES[reader])
    assert [message.role for message in sample.messages] == ["user", "assistant", "user", "assistant"]
    assert [shown(message) for message in sample.messages] == ["<a.jpg>\nWhat?", "A cat.", "Sure?", "Yes."]
    assert (sample.id, sample.source, sample.identities) == ("5", "general", [])


@pytest.mark.parametrize("reader", CASES)
def test_from_a_json_list_and_from_lines(tmp_path, reader):
    (tmp_path / "list.json").write_text(json.dumps([CASES[reader]] * 3))
    (tmp_path / "lines.jsonl").write_text((json.dumps(CASES[reader]) + "\n") * 3)
    for name in ("list.json", "lines.jsonl"):
        data = RecordDataset(tmp_path / name, tmp_path, reader=reader)
        assert len(data) == 3
        assert shown(data[2].messages[0]) == "<a.jpg>\nWhat?"


def test_llava_without_and_with_several_images():
    assert read("llava", {"conversations": turns("Hello", "Hi.")}).images == []
    sample = read("llava", {"image": ["a.jpg", "b.jpg"], "conversations": turns("<image> or <image>?", "The first.")})
    assert shown(sample.messages[0]) == "<a.jpg> or <b.jpg>?"


@pytest.mark.parametrize(
    ("reader", "record", "numbers"),
    [
        ("llava", {"image": "a.jpg", "conversations": turns("What?", "A.")}, "0 <image> but 'image' has 1"),
        ("llava", {"conversations": turns("<image>What?", "A.")}, "1 <image> but 'image' has 0"),
        ("yi_vl", {"image": "a.jpg", "conversations": turns("<image>What?", "A.")}, "0 <image_placeholder> but"),
        ("sharegpt", {"images": ["a.jpg"], "conversations": turns("<image><image>", "A.")}, "2 <image> but 'images'"),
        ("qwen_vl", {"conversations": turns("<img>a.jpg", "A.")}, "1 <img> but 0 </img>, 0 complete pairs"),
        ("qwen_vl", {"conversations": turns("</img>a.jpg<img>", "A.")}, "1 <img> but 1 </img>, 0 complete pairs"),
    ],
)
def test_the_number_of_placeholders_must_match_the_images(reader, record, numbers):
    with pytest.raises(DataError, match=f"^f.json:3: .*{numbers}") as caught:
        read(reader, record)
    assert caught.value.kind == "placeholders"


def test_sharegpt_with_a_system_prompt():
    sample = read("sharegpt", {"system": "Be brief.", "conversations": turns("Hello", "Hi.")})
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]


def test_qwen_references_and_scenes():
    lines = ["Kate is <img>k/1.jpg</img>", " Tom Sawyer is <img>t.jpg</img>", "Kate is <img>k/2.jpg</img>"]
    text = "\n".join([*lines, "In <img>s.jpg</img>, who?"])
    sample = read("qwen_vl", {"conversations": turns(text, "Kate.", names=("user", "assistant"))})
    assert [(identity.name, identity.images) for identity in sample.identities] == [
        ("Kate", ["k/1.jpg", "k/2.jpg"]),
        ("Tom Sawyer", ["t.jpg"]),
    ]
    assert sample.source == "identity"
    assert shown(sample.messages[0]) == "In <s.jpg>, who?"
    assert sample.message_images == ["s.jpg"]


@pytest.mark.parametrize(
    "start", ["This is", "Here is", "The picture is", "Picture 1 is", "Picture 1:", "I think Kate is in"]
)
def test_qwen_images_that_do_not_introduce_an_identity(start):
    sample = read("qwen_vl", {"conversations": turns(f"{start} <img>a.jpg</img>\nWhat?", "A.")})
    assert sample.identities == []
    assert shown(sample.messages[0]) == f"{start} <a.jpg>\nWhat?"


@pytest.mark.parametrize("name", ["<sks>", "<my_cat>", "the <sks> dog"])
def test_qwen_names_in_angle_brackets(name):
    sample = read("qwen_vl", {"conversations": turns(f"{name} is <img>a.jpg</img>\nWhere is {name}?", "A.")})
    assert [(identity.name, identity.images) for identity in sample.identities] == [(name, ["a.jpg"])]


@pytest.mark.parametrize("start", ["<ref>Kate</ref> is", "<box> is", "a < b is", "<a b> is"])
def test_qwen_tags_are_no_names(start):
    sample = read("qwen_vl", {"conversations": turns(f"{start} <img>a.jpg</img>\nWhere?", "A.")})
    assert sample.identities == []


def test_qwen_grounding_stays_text():
    answer = "<ref>Kate</ref><box>(1,2),(3,4)</box>"
    sample = read("qwen_vl", {"conversations": turns("Kate is <img>k.jpg</img>\nWhere?", answer)})
    assert shown(sample.messages[1]) == answer


@given(st.text(st.sampled_from("ab \nis<img>/Kate."), max_size=60))
def test_qwen_text_is_converted_or_refused_but_never_lost(text):
    try:
        record = READERS["qwen_vl"]({"conversations": turns(text, "A.")}, "f.json:3")
    except DataError:
        return
    parts = record["messages"][0]["content"]
    kept = sum(len(part["text"]) for part in parts if part["type"] == "text")
    assert kept == len(text) or record["identities"] or any(part["type"] == "image" for part in parts)


@pytest.mark.parametrize(
    ("reader", "record", "message"),
    [
        ("llava", {"messages": []}, "no list 'conversations'"),
        ("llava", [1], "no list 'conversations'"),
        ("openai", {"conversations": []}, "no list 'messages'"),
        ("llava", {"conversations": ["hello"]}, r"conversations\[0\] is 'hello'"),
        ("llava", {"conversations": [{"from": "tool", "value": ""}]}, "role 'tool' is not known"),
        ("llava", {"conversations": [{"from": "human", "value": 3}]}, "value of turn 0=3 is int"),
        (
            "llava",
            {"conversations": turns("a", "b"), "image": 3},
            "image is int 3; expected a path",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "'input_audio' is not known",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r"content\[0\].image_url.url=None is NoneType",
        ),
        ("openai", {"messages": [{"role": "user", "content": None}]}, "must be a string or a list"),
    ],
)
def test_wrong_records_are_named(reader, record, message):
    with pytest.raises(DataError, match=f"^f.json:3: .*{message}"):
        read(reader, record)


def test_urls_are_refused_in_every_format():
    part = {"type": "image_url", "image_url": {"url": "https://host/a.jpg"}}
    with pytest.raises(DataError, match=r"is a URL; URLs are not supported"):
        read("openai", {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A."}]})
    with pytest.raises(DataError, match=r"is a URL; URLs are not supported"):
        read("openai", {"messages": [{"role": "user", "content": [{**part, "image_url": "data:image/png;base64,x"}]}]})


MMID = {
    "id": 1,
    "type": "location",
    "question": "Kate is <img>image_1</img>\n<img>image_2</img>\nWhere is Kate?",
    "image_1": "k.jpg",
    "image_2": "s.jpg",
    "ground_target": "Kate",
    "answer": "[1, 2, 3, 4]",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": ["location"]}, r"type=\['location'\] is not known"),
        ({"type": {"a": 1}}, "is not known"),
        ({"answer": "[" * 100_000}, r"answer='\[+'... of a location item is not"),
        ({"answer": "9" * 5000}, "of a location item is not"),
        ({"answer": '{"a": 1}'}, r"boxes\[0\].box={'a': 1} of 'Kate' must be four numbers"),
        ({"answer": "[NaN, 2, 3, 4]"}, "must be four numbers"),
        ({"ground_target": None}, "ground_target=None is NoneType"),
        ({"image_2": 3}, "image_2=3 is int"),
    ],
)
def test_wrong_items_of_mmid_are_named(changes, message):
    assert read("mmid", MMID).target_box.box == [1, 2, 3, 4]
    with pytest.raises(DataError, match=f"^f.json:3: .*{message}") as caught:
        read("mmid", MMID | changes)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("tea/coffee / milk /water", ["tea", "coffee", "milk", "water"]),
        ("in 1/2 hour / at 3 / 4 / 5/x", ["in 1/2 hour", "at 3", "4", "5/x"]),
    ],
)
def test_slashes_separate_the_false_answers_of_mmid(text, choices):
    item = {**MMID, "type": "QA_singleimage", "answer": "x", "false answers": text}
    assert read("mmid", item).false_answers == choices


def test_windows_line_ends_in_a_question():
    text = "Kate is <img>k.jpg</img>\r\nTom is <img>t.jpg</img>.\r\n<img>s.jpg</img>\r\nWhere?"
    sample = read("qwen_vl", {"conversations": turns(text, "A.", names=("user", "assistant"))})
    assert [identity.name for identity in sample.identities] == ["Kate", "Tom"]
    assert sample.message_images == ["s.jpg"]


@pytest.mark.parametrize(
    "unit", ["<img>", "</img>", "</img><img>", " is <img>", " ", "\t", "x is <img>a</img> ", " / ", "1/", "<image>"]
)
def test_the_time_of_readers_grows_with_the_length_of_the_text(unit):
    """Each text has 100,000 characters. Patterns that go back over it take minutes."""
    text = unit * (100_000 // len(unit)) + "x"
    start = time.perf_counter()
    for reader, record in {
        "qwen_vl": {"conversations": turns(text, text, names=("user", "assistant"))},
        "mmid": {**MMID, "type": "QA_singleimage", "question": text, "answer": text, "false answers": text},
        "llava": {"conversations": turns(text, text)},
        "openai": {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]},
    }.items():
        with contextlib.suppress(DataError):
            read(reader, record)
    assert time.perf_counter() - start < 10
