"""Schema of records: valid records, and errors that name every fault."""

import copy
import time

import pytest

from idavlm.data import DataError, parse_sample
from idavlm.data.errors import quote

IMAGE = {"type": "image", "image": "s/9.jpg"}
TRAINING = {
    "id": "loc-17",
    "source": "identity",
    "identities": [{"name": "Kate", "images": ["k/3.jpg", "k/5.jpg"]}, {"name": "Tom", "images": ["t.jpg"]}],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "\nWhere is Kate?"}]},
        {"role": "assistant", "content": [{"type": "box", "name": "Kate"}]},
        {"role": "user", "content": "What is Kate doing?"},
        {"role": "assistant", "content": "Kate is reading."},
    ],
    "boxes": [
        {"name": "Kate", "image": "s/9.jpg", "box": [853, 112, 1237, 516]},
        {"name": "a stranger", "image": "s/9.jpg", "box": [0.5, 0, 12, 51.5]},
    ],
}
LOCATION = {
    "id": 3,
    "type": "location",
    "identities": TRAINING["identities"][:1],
    "messages": TRAINING["messages"][1:2],
    "answer": "",
    "target": "Kate",
    "boxes": TRAINING["boxes"],
}
MATCHING = {
    "type": "matching",
    "identities": TRAINING["identities"][:1],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Picture 1: "}, IMAGE]}],
    "answer": "Picture 1",
    "false_answers": ["Picture 2", "Picture 3"],
}


def test_a_training_record():
    sample = parse_sample(TRAINING, where="train.jsonl:17", image_root="/data/images")
    assert (sample.id, sample.source, sample.task, sample.where) == ("loc-17", "identity", None, "train.jsonl:17")
    assert sample.reference_images == ["k/3.jpg", "k/5.jpg", "t.jpg"]
    assert sample.images == ["k/3.jpg", "k/5.jpg", "t.jpg", "s/9.jpg"]
    assert [part.type for part in sample.messages[1].content] == ["image", "text"]
    assert sample.messages[3].content[0].text == "What is Kate doing?", "a string becomes one text part"
    part = sample.messages[2].content[0]
    assert sample.box_of(part.name, part.image).box == [853, 112, 1237, 516], "the box part knows its image"
    assert str(sample.image_root) == "/data/images"
    with pytest.raises(KeyError, match=r"no box of 'Tom' in 's/9.jpg'"):
        sample.box_of("Tom", "s/9.jpg")


def test_a_training_record_may_name_its_task():
    sample = parse_sample({**TRAINING, "type": "location"})
    assert (sample.task, sample.answer, sample.is_evaluation) == ("location", None, False)
    assert not parse_sample(TRAINING).is_evaluation


def test_null_fields_count_as_absent():
    """Tables such as parquet fill absent fields with null."""
    sample = parse_sample({**TRAINING, "type": None, "answer": None, "target": None})
    assert (sample.task, sample.is_evaluation) == (None, False)


def test_evaluation_records():
    sample = parse_sample(LOCATION)
    assert sample.is_evaluation
    assert (sample.task, sample.answer, sample.source, sample.id) == ("location", "", "identity", "3")
    assert sample.target_box.box == [853, 112, 1237, 516]
    sample = parse_sample(MATCHING, where="test.jsonl:1")
    assert (sample.false_answers, sample.target_box, sample.id) == (["Picture 2", "Picture 3"], None, "test.jsonl:1")


def test_boxes_may_have_labels():
    record = copy.deepcopy(TRAINING)
    record["boxes"][0]["label"] = "reading"
    assert [box.label for box in parse_sample(record).boxes] == ["reading", ""]
    record["boxes"][0]["label"] = ""
    with pytest.raises(DataError, match=r"boxes\[0\]\.label='' must be a non-empty string"):
        parse_sample(record)


def test_meta_and_general_records():
    record = {
        "meta": {"any": "thing"},
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}],
    }
    assert parse_sample(record).source == "general"


def test_the_record_is_not_modified():
    record = copy.deepcopy(TRAINING)
    parse_sample(record)
    assert record == TRAINING


def entry_at(record, path):
    """The container of the entry at ``path`` ("messages.1.role"), and its key."""
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        record = record[key]
    return record, last


def replaced(record, path, value):
    """``record`` with the entry at ``path`` set to ``value``."""
    record = copy.deepcopy(record)
    container, last = entry_at(record, path)
    container[last] = value
    return record


def changed(record, path, value):
    """``record`` with the entry at ``path`` set to or appended as ``value``, or removed if ``value`` is None."""
    record = copy.deepcopy(record)
    container, last = entry_at(record, path)
    if value is None:
        del container[last]
    elif isinstance(container, list) and last == len(container):
        container.append(value)
    else:
        container[last] = value
    return record


TEXT = {"type": "text", "text": "x"}
KATE = {"name": "Kate", "images": ["x.jpg"]}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sorce", "identity", "unknown fields 'sorce'; allowed are"),
        ("id", [1], r"id=\[1\] must be a string"),
        ("id", True, "id=True must be a string or an integer of at most 64 bits"),
        ("source", "both", "source='both' is not known; choose one of 'identity', 'general'"),
        ("source", "general", "source='general', but the record has 2 identities"),
        ("identities", [], "source='identity', but the record has 0 identities"),
        ("identities", "Kate", "identities is str 'Kate'; expected a list"),
        ("identities.0", "Kate", r"identities\[0\] is str"),
        ("identities.0.name", " ", r"identities\[0\].name=' ' must be a non-empty string"),
        ("identities.0.images", [], r"identities\[0\].images=\[\] of 'Kate' must be a list of at least one photo"),
        ("identities.0.images", "k.jpg", "must be a list of at least one photo"),
        ("identities.0.photo", "k.jpg", r"identities\[0\] has unknown fields 'photo'"),
        ("identities.2", KATE, "identities contains 'Kate' 2 times"),
        ("identities.0.images.0", "/etc/passwd", r"identities\[0\].images\[0\]='/etc/passwd' is absolute"),
        ("identities.0.images.0", "C:\\x.jpg", "is absolute"),
        ("identities.0.images.0", "a/../../x.jpg", "leaves the image root"),
        ("identities.0.images.0", "a\\..\\x.jpg", "leaves the image root"),
        ("identities.0.images.0", "http://host/x.jpg", "is a URL; URLs are not supported"),
        ("identities.0.images.0", "data:image/png;base64,AAAA", "is a URL; URLs are not supported"),
        ("identities.0.images.0", "x\0.jpg", "must be a non-empty string"),
        ("identities.0.images.0", 3, "must be a non-empty string"),
        ("messages.1.content.0.image", "../s.jpg", r"messages\[1\].content\[0\].image='../s.jpg' leaves"),
        ("messages", [], r"messages has no user turn \(roles: none\)"),
        ("messages", [{"role": "assistant", "content": "x"}], r"no user turn \(roles: assistant\)"),
        ("messages.1.role", "human", r"messages\[1\].role='human' is not known; choose one of 'system', 'user'"),
        ("messages.2.role", "user", r"messages\[2\].role='user', expected 'assistant'"),
        ("messages.3.role", "system", r"messages\[3\].role='system', expected 'user'"),
        ("messages.4", None, "messages ends with a turn of 'user', expected 'assistant'"),
        ("messages.4.content", "  ", r"messages\[4\] of 'assistant' has no text"),
        ("messages.4.content", [], r"messages\[4\] of 'assistant' has no text"),
        ("messages.0.content", "", r"messages\[0\] of 'system' has no text"),
        ("messages.3.content", "", r"messages\[3\] of 'user' is empty"),
        ("messages.4.content", [TEXT, IMAGE], "of 'assistant' has an image; only user turns"),
        ("messages.4.content", 7, r"messages\[4\].content=7 must be a string or a list of parts"),
        ("messages.4.content", None, r"messages\[4\].content=None must be"),
        ("messages.1.content.0.type", "video", r"messages\[1\].content\[0\].type='video' is not known"),
        ("messages.1.content.0", "text", r"messages\[1\].content\[0\] is str 'text'"),
        ("messages.1.content.1.text", 4, r"messages\[1\].content\[1\].text is int 4"),
        ("messages.1.content.0.text", "x", "unknown fields 'text'; allowed are image, type"),
        ("messages.1.name", "x", r"messages\[1\] has unknown fields 'name'"),
        ("messages.2.content.0.name", "Jane", r"messages\[2\] has a box part of 'Jane', but boxes has no such entry"),
        ("messages.2.content.0.image", "t.jpg", "a box part of 'Kate' in 't.jpg', but boxes has no such entry"),
        ("boxes.0.image", "k/3.jpg", r"boxes\[0\].image='k/3.jpg' is not an image of the messages \(s/9.jpg\)"),
        ("boxes.0.box", [1, 2, 1, 4], r"boxes\[0\].box=\[1, 2, 1, 4\] of 'Kate' is empty"),
        ("boxes.0.box", [5, 2, 1, 4], "is empty"),
        ("boxes.0.box", [-5, -5, 0, 4], "is empty"),
        ("boxes.0.box", [1, 2, 3], "must be four numbers"),
        ("boxes.0.box", [1, 2, 3, float("nan")], "must be four numbers"),
        ("boxes.0.box", [1, 2, True, 4], "must be four numbers"),
        ("boxes.0.box", [0, 0, 10**400, 50], "must be four numbers .* each at most 2147483648"),
        ("boxes.0.box", [0, 0, 1e300, 50], "must be four numbers"),
        ("boxes.0.box", [0, 0, float("inf"), 50], "must be four numbers"),
        ("boxes.0.box", [10, 11, 10.0000001, 60], "is empty in 32-bit precision"),
        ("boxes.0.box", [-1, 11, 1e-60, 60], "is empty in 32-bit precision"),
        ("boxes.0.box", [[1], 2, 3, 4], "must be four numbers"),
        ("boxes.0.box", "1 2 3 4", "must be four numbers"),
        ("boxes.0.name", None, r"boxes\[0\].name=None must be a non-empty string"),
        ("boxes.2", {"name": "Kate", "image": "s/9.jpg", "box": [1, 2, 3, 4]}, r"boxes\[2\] is a second box of 'Kate'"),
        ("type", "find", "type='find' is not known; choose one of 'matching', 'location'"),
        ("answer", "x", "ends with a turn of 'assistant', expected 'user'; a record with \"answer\" is an evaluation"),
        ("false_answers", ["x"], 'false_answers is a field of evaluation records, but the record has no "answer"'),
        ("target", "Kate", 'target is a field of evaluation records, but the record has no "answer"'),
    ],
)
def test_faults_of_training_records_are_named(path, value, message):
    with pytest.raises(DataError, match=f"^train.jsonl:17: .*{message}") as caught:
        parse_sample(changed(TRAINING, path, value), where="train.jsonl:17")
    assert caught.value.kind == "record"


@pytest.mark.parametrize(
    ("record", "path", "value", "message"),
    [
        (LOCATION, "type", "find", "type='find' is not known; choose one of 'matching', 'location'"),
        (LOCATION, "target", None, "target=None of a location record has no box in the last image"),
        (LOCATION, "target", "Jane", "target='Jane' of a location record has no box"),
        (LOCATION, "type", None, 'a record with "answer" is an evaluation record and needs "type"; choose one of'),
        (LOCATION, "answer", None, "ends with a turn of 'user', expected 'assistant'; .* needs \"answer\""),
        (LOCATION, "answer", 3, "answer is int 3; expected a string"),
        (
            LOCATION,
            "messages.1",
            {"role": "assistant", "content": "x"},
            "ends with a turn of 'assistant', expected 'user'",
        ),
        (MATCHING, "answer", " ", "answer=' ' of a matching record is empty"),
        (MATCHING, "false_answers", "Picture 2", "false_answers is str"),
        (MATCHING, "false_answers.0", "Picture 1", r"false_answers\[0\]='Picture 1' equals the correct answer"),
        (MATCHING, "false_answers.0", "", r"false_answers\[0\]='' must be a non-empty string"),
        (MATCHING, "target", 3, "target=3 must be a non-empty string"),
    ],
)
def test_faults_of_evaluation_records_are_named(record, path, value, message):
    with pytest.raises(DataError, match=f"^test.jsonl:2: .*{message}"):
        parse_sample(changed(record, path, value), where="test.jsonl:2")


@pytest.mark.parametrize("record", [None, 3, "x", [TRAINING]])
def test_a_record_is_an_object(record):
    with pytest.raises(DataError, match=r"^f:1: the record is .*; expected a JSON object"):
        parse_sample(record, where="f:1")


def test_a_name_with_boxes_in_two_images_needs_the_image():
    other = {"type": "image", "image": "s/10.jpg"}
    record = changed(TRAINING, "messages.1.content.2", other)
    record = changed(record, "boxes.2", {"name": "Kate", "image": "s/10.jpg", "box": [1, 2, 3, 4]})
    with pytest.raises(DataError, match=r"has boxes in several images \(s/9.jpg, s/10.jpg\); add .image."):
        parse_sample(record)
    sample = parse_sample(changed(record, "messages.2.content.0.image", "s/10.jpg"))
    assert sample.messages[2].content[0].image == "s/10.jpg"


NEAR_KATE = ["kate", "KATE", "Kate ", " Kate", "Kate\n", "Kate\u00a0"]


@pytest.mark.parametrize("name", NEAR_KATE)
def test_a_name_that_differs_in_case_or_white_space_is_an_error(name):
    """Otherwise its box would be ignored, or its question be about an unknown identity."""
    message = rf"={name!r} is nearly the name 'Kate'; write both alike"
    for record, path, field in (
        (TRAINING, "boxes.0.name", r"boxes\[0\]\.name"),
        (TRAINING, "messages.2.content.0.name", r"messages\[2\] has a box part whose name"),
        (LOCATION, "target", "target"),
    ):
        with pytest.raises(DataError, match=field + message.replace("\\", "\\\\")):
            parse_sample(changed(record, path, name))


def test_the_normal_form_of_a_name_does_not_matter():
    composed, decomposed = "Zo\u00eb Moss", "Zoe\u0308 Moss"
    for introduced, other in ((composed, decomposed), (decomposed, composed)):
        for record in (TRAINING, LOCATION):
            record = changed(record, "identities.0.name", introduced)
            record = changed(record, "boxes.0.name", other)
            if record["messages"][-1]["role"] == "assistant":
                record = changed(record, "messages.2.content.0.name", other)
            else:
                record = changed(record, "target", other)
            sample = parse_sample(record)
            assert sample.boxes[0].name == introduced
            assert {part.name for message in sample.messages for part in message.content} <= {"", introduced}
            assert sample.target in (None, introduced)
    twice = changed(changed(TRAINING, "identities.0.name", composed), "identities.1.name", decomposed)
    with pytest.raises(DataError, match="identities contains 'Zoë Moss' 2 times"):
        parse_sample(twice)


def test_names_of_identities_may_differ_in_case():
    sample = parse_sample(changed(TRAINING, "identities.1.name", "kate"))
    assert [identity.name for identity in sample.identities] == ["Kate", "kate"]
    assert sample.boxes[0].name == "Kate"


WHOLE = {
    **LOCATION,
    "messages": [
        *TRAINING["messages"][:3],
        {"role": "user", "content": [{"type": "box", "name": "Kate", "image": "s/9.jpg"}, IMAGE, {**TEXT}]},
    ],
    "source": "identity",
    "answer": "x",
    "false_answers": ["y"],
}
"""An evaluation record with every field."""


def paths_of(value, prefix=""):
    """The paths of all entries of a record."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        path = f"{prefix}.{key}" if prefix else str(key)
        yield path
        yield from paths_of(entry, path)


@pytest.mark.parametrize("path", list(paths_of(WHOLE)))
def test_every_field_rejects_values_of_other_types(path):
    parse_sample(WHOLE)
    for value in (
        None,
        True,
        3,
        2.5,
        10**5000,
        float("nan"),
        "",
        "x\ud83dy",
        [],
        {},
        [[]],
        ["x"],
        {"x": 1},
        [None] * 4,
    ):
        try:
            sample = parse_sample(replaced(WHOLE, path, value), where="f:1")
        except DataError:
            continue
        assert "\\ud83d" not in repr(sample)
        assert isinstance(sample.id, str)


@pytest.mark.parametrize("path", list(paths_of(WHOLE)))
def test_messages_quote_at_most_200_characters_of_a_value(path):
    for value in ("y" * 5000, ["y" * 5000], "y\0" * 5000, 10**4000, {"y" * 5000: "y" * 5000}, ["y"] * 5000):
        message = ""
        try:
            parse_sample(replaced(WHOLE, path, value), where="f:1")
        except DataError as error:
            message = str(error)
        assert "y" * 201 not in message
        assert "0" * 201 not in message
        assert len(message) < 1200


def test_half_a_surrogate_pair_is_named():
    for path, field in {
        "messages.4.content": "messages[4].content",
        "messages.1.content.1.text": "messages[1].content[1].text",
        "identities.0.name": "identities[0].name",
        "identities.0.images.0": "identities[0].images[0]",
        "id": "id",
    }.items():
        with pytest.raises(DataError) as caught:
            parse_sample(changed(TRAINING, path, "Kate \ud83d"), where="f:1")
        assert f"f:1: {field}='Kate \\ud83d' is not valid Unicode: character 5 is half of a surrogate pair" in str(
            caught.value
        )
    parse_sample(changed(TRAINING, "meta", {"any": "\ud83d"}))


def test_quoting():
    assert quote("short") == "'short'"
    assert quote("x" * 201) == "'" + "x" * 200 + "'..."
    assert quote(b"x" * 201) == "b'" + "x" * 200 + "'..."
    assert quote([1] * 500) == repr([1] * 500)[:200] + "..."
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert quote(nested) == "a list that is too long to be shown"
    assert quote(10**5000) == "a int that is too long to be shown"


def test_records_with_thousands_of_entries():
    """Time and messages grow with the length of the record, not with its square."""
    number = 20_000
    images = [{"type": "image", "image": f"{place}.jpg"} for place in range(number)]
    boxes = [{"name": "Kate", "image": f"{place}.jpg", "box": [0, 0, 1, 1]} for place in range(number)]
    parts = [{"type": "box", "name": "Kate", "image": f"{place}.jpg"} for place in range(number)]
    record = {
        "identities": [{"name": f"Kate {place}", "images": ["k.jpg"]} for place in range(number)],
        "messages": [{"role": "user", "content": images}, {"role": "assistant", "content": parts}],
        "boxes": boxes,
    }
    start = time.perf_counter()
    parse_sample(record)
    with pytest.raises(DataError) as caught:
        parse_sample({**record, "boxes": [{**boxes[0], "image": "other.jpg"}]})
    assert time.perf_counter() - start < 10
    assert len(str(caught.value)) < 1000
