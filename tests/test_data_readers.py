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
    "alpaca": {
        "id": 5,
        "history": [["<image>\nWhat?", "A cat."]],
        "instruction": "Sure?",
        "input": "",
        "output": "Yes.",
        "images": ["a.jpg"],
    },
    "ms_swift": {
        "id": 5,
        "messages": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "A <ref-object>."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "images": ["a.jpg"],
        "objects": {"ref": ["cat"], "bbox": []},
    },
    "messages": {
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
        ("messages", {"conversations": []}, "no list 'messages'"),
        ("llava", {"conversations": ["hello"]}, r"conversations\[0\] is 'hello'"),
        ("llava", {"conversations": [{"from": "tool", "value": ""}]}, "role 'tool' is not known"),
        ("llava", {"conversations": [{"from": "human", "value": 3}]}, "value of turn 0=3 is int"),
        (
            "llava",
            {"conversations": turns("a", "b"), "image": 3},
            "image is int 3; expected a path",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "'input_audio' is not known",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r"content\[0\].image_url.url=None is NoneType",
        ),
        ("messages", {"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content=None is NoneType"),
    ],
)
def test_wrong_records_are_named(reader, record, message):
    with pytest.raises(DataError, match=f"^f.json:3: .*{message}"):
        read(reader, record)


def test_urls_are_refused_in_every_format():
    part = {"type": "image_url", "image_url": {"url": "https://host/a.jpg"}}
    with pytest.raises(DataError, match=r"is a URL; URLs are not supported"):
        read("messages", {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A."}]})
    with pytest.raises(DataError, match=r"is a URL; URLs are not supported"):
        read(
            "messages", {"messages": [{"role": "user", "content": [{**part, "image_url": "data:image/png;base64,x"}]}]}
        )


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
        "messages": {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]},
    }.items():
        with contextlib.suppress(DataError):
            read(reader, record)
    assert time.perf_counter() - start < 10


# --- Chat messages: transformers, TRL, OpenAI, ms-swift --------------------------------------------------------------

ASKED = {"role": "user", "content": "Who is <image> and <image>?"}
ANSWERED = {"role": "assistant", "content": "Kate."}


def parts(*content):
    """Parts of a content: a text, ``None`` for an image without a path, or a dict."""
    return [
        {"type": "image"} if entry is None else {"type": "text", "text": entry} if isinstance(entry, str) else entry
        for entry in content
    ]


@pytest.mark.parametrize(
    ("record", "shown_question"),
    [
        ({"messages": [ASKED, ANSWERED], "images": ["a.jpg", "b.jpg"]}, "Who is <a.jpg> and <b.jpg>?"),
        ({"messages": [{"role": "user", "content": parts(None, "Who?")}, ANSWERED], "image": "a.jpg"}, "<a.jpg>Who?"),
        (
            {"messages": [{"role": "user", "content": parts(None, "Who?", None)}, ANSWERED], "images": ["a.jpg", "b"]},
            "<a.jpg>Who?<b>",
        ),
        ({"messages": [{"role": "user", "content": "Who?"}, ANSWERED], "images": ["a.jpg"]}, "<a.jpg>Who?"),
        ({"messages": [{"role": "user", "content": "Who?"}, ANSWERED], "images": []}, "Who?"),
        ({"prompt": "Who?", "completion": "Kate.", "image": "a.jpg"}, "<a.jpg>Who?"),
        (
            {
                "prompt": [{"role": "user", "content": parts(None, "Who?")}],
                "completion": [{"role": "assistant", "content": parts("Kate.")}],
                "images": ["a.jpg"],
            },
            "<a.jpg>Who?",
        ),
        (
            {"messages": [{"role": "user", "content": parts({"type": "image", "path": "a.jpg"}, "Who?")}, ANSWERED]},
            "<a.jpg>Who?",
        ),
        ({"messages": [ASKED, ANSWERED], "images": [{"path": "a.jpg"}, "b.jpg"]}, "Who is <a.jpg> and <b.jpg>?"),
    ],
)
@pytest.mark.parametrize("reader", ["messages", "ms_swift"])
def test_images_stand_for_placeholders_parts_or_precede_the_question(reader, record, shown_question):
    sample = read(reader, record)
    assert shown(sample.messages[0]) == shown_question
    assert shown(sample.messages[1]) == "Kate."


def test_messages_with_a_system_field_and_system_turns():
    roles = [message.role for message in read("messages", {"messages": [ASKED, ANSWERED], "images": ["a", "b"],
                                                            "system": "Be brief."}).messages]  # fmt: skip
    assert roles == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": [ASKED, ANSWERED], "images": ["a.jpg"]}, "has 2 <image> but 'images' has 1 images"),
        ({"messages": [ASKED, ANSWERED]}, "has 2 <image> but 'images' has 0 images"),
        ({"messages": [ASKED, ANSWERED], "images": ["a"], "image": "b"}, "'images' and 'image' both hold images"),
        ({"messages": [ASKED, ANSWERED], "images": [3, "a"]}, "images holds 3; expected the path of an image"),
        ({"messages": [{"role": "user", "content": parts({"type": "video"})}, ANSWERED]}, "type='video' is not known"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool' is not known"),
        ({"messages": [ASKED, {"role": "assistant", "content": "<image>"}], "images": ["a"] * 3}, "only user turns"),
        ({"prompt": "Who?"}, "ends with a turn of 'user', expected 'assistant'"),
    ],
)
def test_messages_that_do_not_fit_their_images(record, problem):
    with pytest.raises(DataError, match=f"^f.json:3: .*{problem}"):
        read("messages", record)


def test_messages_of_this_library_introduce_identities():
    """The same records train with TRL and with RecordDataset."""
    content = parts(
        {"type": "identity", "name": "Kate", "images": ["k1.jpg", "k2.jpg"]},
        {"type": "image", "identity": "Tom"},
        None,
        "Who is this?",
    )
    sample = read("messages", {"messages": [{"role": "user", "content": content}, ANSWERED], "images": ["t", "s"]})
    assert [(identity.name, identity.images) for identity in sample.identities] == [
        ("Kate", ["k1.jpg", "k2.jpg"]),
        ("Tom", ["t"]),
    ]
    assert shown(sample.messages[0]) == "<s>Who is this?"


SWIFT = {
    "messages": [
        {"role": "user", "content": "<image>Find the <ref-object> and the <ref-object>."},
        {"role": "assistant", "content": "<bbox> and <bbox>"},
    ],
    "images": ["a.jpg"],
    "objects": {"ref": ["dog", "cat"], "bbox": [[9, 16, 135, 212], [1, 2, 3, 4]]},
}


def swift(**objects):
    return {**SWIFT, "objects": {**SWIFT["objects"], **objects}}


def boxes_of(message):
    return [(part.name, part.image, part.box, part.relative) for part in message.content if part.type == "box"]


def test_boxes_of_ms_swift_fill_their_placeholders():
    sample = read("ms_swift", SWIFT)
    assert shown(sample.messages[0]) == "<a.jpg>Find the dog and the cat."
    assert boxes_of(sample.messages[1]) == [
        ("", "a.jpg", [9, 16, 135, 212], False),
        ("", "a.jpg", [1, 2, 3, 4], False),
    ]
    sample = read("ms_swift", swift(bbox=[[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]], bbox_type="norm1"))
    assert boxes_of(sample.messages[1])[0] == ("", "a.jpg", [0.1, 0.2, 0.3, 0.4], True)
    pixels = sample.with_pixel_boxes({"a.jpg": (100, 200)}.get)
    assert [part.box for part in pixels.messages[1].content if part.type == "box"] == [
        pytest.approx([20, 20, 60, 40]),
        [0, 0, 200, 100],
    ]
    assert sample.messages[1].content[0].relative, "the sample itself is not changed"


def test_boxes_of_ms_swift_lie_in_the_image_that_is_named():
    record = swift(image_id=[1, 0]) | {"images": ["a.jpg", "b.jpg"]}
    record["messages"] = [{"role": "user", "content": "<image><image><ref-object><ref-object>"}, SWIFT["messages"][1]]
    assert [image for _, image, _, _ in boxes_of(read("ms_swift", record).messages[1])] == ["b.jpg", "a.jpg"]


def test_boxes_of_identities_supervise_the_identity_map():
    record = swift(ref=["Kate", "dog"]) | {"identities": [{"name": "Kate", "images": ["k.jpg"]}]}
    sample = read("ms_swift", record)
    assert [(box.name, box.image, box.box) for box in sample.boxes] == [("Kate", "a.jpg", [9, 16, 135, 212])]
    relative = swift(ref=["Kate", "dog"], bbox=[[0.5, 0, 1, 1]] * 2, bbox_type="norm1")
    sample = read("ms_swift", relative | {"identities": record["identities"]})
    assert sample.boxes[0].relative
    assert sample.with_pixel_boxes({"a.jpg": (10, 20)}.get).boxes[0].box == [10, 0, 20, 10]


@pytest.mark.parametrize(
    ("objects", "problem"),
    [
        ({"ref": ["dog"]}, "the text has 2 <ref-object> but 'objects.ref' has 1 entries"),
        ({"bbox": []}, "the text has 2 <bbox> but 'objects.bbox' has 0 entries"),
        ({"bbox": [[1, 2], [3, 4]]}, r"objects.bbox\[0\]=\[1, 2\] must be four numbers .*; points are not supported"),
        ({"bbox": [[3, 2, 1, 4], [0, 0, 1, 1]]}, r"messages\[1\].content\[0\].box=\[3, 2, 1, 4\] of '' is empty"),
        ({"bbox_type": "norm1"}, "must be four numbers .* in 0..1 of width and height"),
        ({"bbox_type": "norm1000"}, "bbox_type='norm1000' is not known; choose one of 'real', 'norm1'"),
        ({"image_id": [0]}, "image_id has 1 entries for 2 boxes"),
        ({"image_id": [0, 1]}, r"objects.image_id\[1\]=1 must be the path of an image or its number, from 0"),
        ({"ref": "dog"}, "objects.ref='dog' must be a list"),
        ({"width": 640}, "does not use the fields 'objects.width'"),
    ],
)
def test_objects_that_do_not_fit_the_text(objects, problem):
    with pytest.raises(DataError, match=f"^f.json:3: .*{problem}"):
        read("ms_swift", swift(**objects))


# --- LLaMA-Factory and Qwen ------------------------------------------------------------------------------------------


def test_alpaca_joins_instruction_and_input():
    record = {"instruction": "<image>What is it?", "input": "Be brief.", "output": "A dog.", "images": ["a.jpg"]}
    sample = read("alpaca", record | {"system": "You see."})
    assert [shown(message) for message in sample.messages] == ["You see.", "<a.jpg>What is it?\nBe brief.", "A dog."]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"instruction": "x"}, "no 'instruction' and 'output'"),
        ({"instruction": "x", "output": 3}, "output=3 is int"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, r"history\[0\]=\['a'\] must be \[question, answer\]"),
        ({"instruction": "<image>", "output": "y"}, "has 1 <image> but 'images' has 0"),
        ("x", "the record is str 'x'; expected an object"),
    ],
)
def test_wrong_alpaca_records_are_named(record, problem):
    with pytest.raises(DataError, match=f"^f.json:3: .*{problem}"):
        read("alpaca", record)


@pytest.mark.parametrize("image", ["", None, []])
def test_an_empty_image_is_no_image(image):
    assert read("llava", {"image": image, "conversations": turns("Hello", "Hi.")}).images == []


def test_a_first_turn_of_the_assistant_is_kept():
    sample = read("llava", {"conversations": turns("Hello, ask me.", "What is 1+1?", "2.", names=("gpt", "human"))})
    assert [message.role for message in sample.messages] == ["assistant", "user", "assistant"]


def test_a_packed_list_is_one_sample_per_record(tmp_path):
    one, two = ({"image": name, "conversations": turns("<image>Who?", name)} for name in ("a.jpg", "b.jpg"))
    for name, text in {
        "list.json": json.dumps([[one, two], two, [one]]),
        "lines.jsonl": "\n".join(map(json.dumps, [[one, two], two, [one]])),
        "first.jsonl": "\n".join(map(json.dumps, [[one], [two], two, one])),
    }.items():
        (tmp_path / name).write_text(text)
        data = RecordDataset(tmp_path / name, tmp_path, reader="llava")
        assert len(data) == 4
        assert shown(data[0].messages[0]) == "<a.jpg>Who?"
    (tmp_path / "faulty.json").write_text(json.dumps([[one, {"image": "x"}], []]))
    with pytest.raises(DataError, match=r"faulty.json\[0\]\[1\]: the record has no list 'conversations'"):
        RecordDataset(tmp_path / "faulty.json", tmp_path, reader="llava")
    with pytest.warns(UserWarning, match="2 skipped"):
        assert len(RecordDataset(tmp_path / "faulty.json", tmp_path, reader="llava", on_error="skip")) == 1


# --- Identities and boxes in foreign formats, and fields that are not used -------------------------------------------

FOREIGN = [name for name in CASES if name != "idavlm"]
KATE = [{"name": "Kate", "images": ["k1.jpg", "k2.jpg"]}]


@pytest.mark.parametrize("reader", FOREIGN)
@pytest.mark.parametrize("image", ["a.jpg", 0, None])
def test_identities_and_boxes_may_be_added_to_every_format(reader, image):
    box = {"name": "Kate", "box": [1, 2, 3, 4]} | ({} if image is None else {"image": image})
    sample = read(reader, {**CASES[reader], "identities": KATE, "boxes": [box]})
    assert (sample.source, sample.reference_images) == ("identity", ["k1.jpg", "k2.jpg"])
    assert [(box.name, box.image, box.box) for box in sample.boxes] == [("Kate", "a.jpg", [1, 2, 3, 4])]
    for wrong in (3, True, "b.jpg"):
        with pytest.raises(DataError, match=r"boxes\[0\].image="):
            read(reader, {**CASES[reader], "identities": KATE, "boxes": [{**box, "image": wrong}]})


@pytest.mark.parametrize("reader", FOREIGN)
@pytest.mark.parametrize("field", ["identities", "boxes"])
def test_identities_and_boxes_that_are_no_lists_are_named(reader, field):
    with pytest.raises(DataError, match=f"^f.json:3: {field} is int -1; expected a list"):
        read(reader, {**CASES[reader], field: -1})
    if field == "boxes":
        with pytest.raises(DataError, match=r"^f.json:3: boxes is int -1; expected a list"):
            read("mmid", {**MMID, "boxes": -1})


def test_identities_of_the_text_follow_those_of_the_field():
    text = "Tom is <img>t.jpg</img>\n<img>s.jpg</img>Who?"
    sample = read("qwen_vl", {"identities": KATE, "conversations": turns(text, "Kate.")})
    assert [identity.name for identity in sample.identities] == ["Kate", "Tom"]


@pytest.mark.parametrize("reader", list(CASES))
def test_a_field_that_the_reader_does_not_use_is_an_error_or_a_counted_warning(tmp_path, reader):
    record = {**CASES[reader], "width": 640}
    with pytest.raises(DataError, match=r"^f.json:3: the reader does not use the fields 'width'; remove them"):
        read(reader, record)
    lines = [record, CASES[reader], {**record, "model": "x"}, {**CASES[reader], "meta": {"any": 1}}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"r.jsonl:1: the reader does not use the fields 'width'"):
        RecordDataset(tmp_path / "r.jsonl", tmp_path, reader=reader)
    message = rf"the reader '{reader}' does not use the fields 'width' in 2 records, 'model' in 1 records"
    with pytest.warns(UserWarning, match=message):
        data = RecordDataset(tmp_path / "r.jsonl", tmp_path, reader=reader, unused_fields="warn")
    assert len(data) == 4
    assert data[0].id == "5"
    assert data.unused_field_counts == {"width": 2, "model": 1}


def test_fields_of_turns_and_parts_count_as_unused():
    turn = {"from": "human", "value": "Hi", "weight": 1}
    with pytest.raises(DataError, match=r"does not use the fields 'conversations\[0\].weight'"):
        read("llava", {"conversations": [turn, {"from": "gpt", "value": "Hi"}]})
    message = {"role": "user", "content": [{"type": "text", "text": "Hi", "cache": True}]}
    with pytest.raises(DataError, match=r"does not use the fields 'messages\[0\].content\[0\].cache'"):
        read("messages", {"messages": [message, ANSWERED]})
    with pytest.raises(DataError, match=r"does not use the fields 'messages\[1\].loss'"):
        read("ms_swift", {"messages": [{"role": "user", "content": "Hi"}, {**ANSWERED, "loss": False}]})
    assert read("llava", {"conversations": turns("a", "b"), "video": "", "videos": [], "extra": None}).images == []


def test_unused_fields_is_checked(tmp_path):
    with pytest.raises(ValueError, match="unused_fields='drop' is not known; choose one of 'raise', 'warn'"):
        RecordDataset(tmp_path / "r.jsonl", unused_fields="drop")
