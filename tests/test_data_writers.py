"""Writers: what a format can hold comes back from its reader, and what it cannot is counted."""

import dataclasses
import json

import pytest

from idavlm.cli.main import main
from idavlm.data import READERS, DataError, RecordDataset, parse_sample
from idavlm.data.writers import WRITERS, Losses
from tests.data_images import RecordMaker
from tests.test_data_readers import CASES

TRAINING = {
    "id": "7",
    "type": "qa_single",
    "identities": [{"name": "Kate", "images": ["k1.jpg", "k2.jpg"]}, {"name": "Tom Sawyer", "images": ["t.jpg"]}],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "In "},
                {"type": "image", "image": "a.jpg"},
                {"type": "text", "text": " and "},
                {"type": "image", "image": "b.jpg"},
                {"type": "text", "text": ", where is Kate?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Here: "}, {"type": "box", "name": "Kate"}]},
        {"role": "user", "content": "And Tom Sawyer?"},
        {"role": "assistant", "content": [{"type": "box", "name": "Tom Sawyer", "image": "b.jpg"}]},
    ],
    "boxes": [
        {"name": "Kate", "image": "a.jpg", "box": [10, 20.5, 110, 220]},
        {"name": "Tom Sawyer", "image": "a.jpg", "box": [1, 2, 30, 40]},
        {"name": "Tom Sawyer", "image": "b.jpg", "box": [5, 6, 70, 80], "label": "waving"},
    ],
    "meta": {"people": {"Kate": "nm1"}, "note": [1, {"two": None}]},
}
QUESTION = {
    "id": "8",
    "type": "location",
    "identities": [{"name": "Kate", "images": ["k1.jpg"]}],
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Where is Kate?"}]}
    ],
    "boxes": [{"name": "Kate", "image": "a.jpg", "box": [10, 20, 110, 220]}],
    "answer": "",
    "target": "Kate",
}
CHOICE = QUESTION | {"id": "9", "type": "qa_single", "answer": "Kate sits.", "false_answers": ["Kate runs."]}
CHOICE = {name: value for name, value in CHOICE.items() if name not in ("target", "boxes")}
GENERAL = {
    "id": "10",
    "messages": [
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "\nWhat is it?"}]},
        {"role": "assistant", "content": "A <b>cat</b>, 100 %.\n"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ],
}
RECORDS = {"training": TRAINING, "question": QUESTION, "choice": CHOICE, "general": GENERAL}


def box_text(box, sample):
    return f"({box.name} {box.box[0]:g})"


def round_trip(name, record):
    """The sample, what its format holds of it, and the losses."""
    sample = parse_sample(record, where="here")
    losses = Losses()
    written = json.loads(json.dumps(WRITERS[name](sample, losses, box_text)))
    return sample, parse_sample(READERS[name](written, "here"), where="here"), losses.counts


def shown(messages):
    """Role and content of each message: ``I think <a.jpg>`` for the parts "I think " and image a.jpg."""
    return [
        (message.role, "".join(f"<{part.image}>" if part.type == "image" else part.text for part in message.content))
        for message in messages
    ]


@pytest.mark.parametrize("record", RECORDS)
def test_the_schema_holds_everything(record):
    sample, again, losses = round_trip("idavlm", RECORDS[record])
    assert again == sample
    assert not losses


@pytest.mark.parametrize("name", ["llava", "messages", "sharegpt", "qwen_vl", "ms_swift"])
def test_general_conversations_come_back_from_every_format(name):
    sample, again, losses = round_trip(name, GENERAL)
    if name == "messages":
        assert shown(again.messages) == shown(sample.messages)
    else:
        assert dataclasses.replace(again, where="") == dataclasses.replace(sample, where="")
    assert set(losses) <= {"the greeting before the first question stays, and LLaMA-Factory leaves out such records"}


@pytest.mark.parametrize("name", ["llava", "messages", "sharegpt"])
def test_formats_of_text_and_images_hold_introductions_and_boxes_as_text(name):
    sample, again, losses = round_trip(name, TRAINING)
    introduction = "Kate is <k1.jpg>\nKate is <k2.jpg>\nTom Sawyer is <t.jpg>\n"
    assert shown(again.messages) == [
        ("system", "Be brief."),
        ("user", introduction + "In <a.jpg> and <b.jpg>, where is Kate?"),
        ("assistant", "Here: (Kate 10)"),
        ("user", "And Tom Sawyer?"),
        ("assistant", "(Tom Sawyer 5)"),
    ]
    assert again.images == sample.images
    assert (again.id, again.source, again.identities, again.boxes) == ("7", "general", [], [])
    lost = {
        "identities became lines of text, NAME is <image>": 1,
        "boxes in messages became text": 1,
        "boxes that no message holds are left out": 1,
        "type is left out": 1,
        "meta is left out": 1,
    }
    if name == "llava":
        lost["the system turn stays a turn, which LLaVA's own code does not expect"] = 1
    assert losses == lost


def test_qwen_vl_holds_identities():
    sample, again, losses = round_trip("qwen_vl", TRAINING)
    assert again.identities == sample.identities
    assert shown(again.messages)[1:3] == [
        ("user", "In <a.jpg> and <b.jpg>, where is Kate?"),
        ("assistant", "Here: (Kate 10)"),
    ]
    assert "identities became lines of text, NAME is <image>" not in losses
    renamed = json.loads(json.dumps(TRAINING).replace("Tom Sawyer", "this man"))
    assert "an identity stays text, because its name does not read as one" in round_trip("qwen_vl", renamed)[2]


def test_ms_swift_holds_boxes_with_their_names():
    sample = parse_sample(TRAINING)
    losses = Losses()
    record = WRITERS["ms_swift"](sample, losses, None)
    assert record["objects"] == {
        "ref": ["Kate", "Tom Sawyer"],
        "bbox": [[10, 20.5, 110, 220], [5, 6, 70, 80]],
        "bbox_type": "real",
        "image_id": [3, 4],
    }
    texts = [message["content"] for message in record["messages"]]
    assert texts[1].endswith("In <image> and <image>, where is <ref-object>?")
    assert texts[2:] == ["Here: <bbox>", "And <ref-object>?", "<bbox>"]
    again = parse_sample(READERS["ms_swift"](record, "here"))
    parts = [part for message in again.messages for part in message.content if part.type == "box"]
    assert [(part.image, part.box) for part in parts] == [("a.jpg", [10, 20.5, 110, 220]), ("b.jpg", [5, 6, 70, 80])]
    assert shown(again.messages)[1][1].endswith("In <a.jpg> and <b.jpg>, where is Kate?")
    assert "boxes that no message holds are left out" in losses.counts


def test_ms_swift_boxes_without_a_mention_stand_without_names():
    record = json.loads(json.dumps(TRAINING).replace("And Tom Sawyer?", "And he?"))
    _, again, losses = round_trip("ms_swift", record)
    assert "boxes stand without their names" in losses
    assert shown(again.messages)[3] == ("user", "And he?")
    relative = json.loads(json.dumps(TRAINING))
    for box in relative["boxes"]:
        box |= {"box": [0.1, 0.2, 0.5, 0.6], "relative": True}
    _, again, _ = round_trip("ms_swift", relative)
    parts = [part for message in again.messages for part in message.content if part.type == "box"]
    assert [(part.box, part.relative) for part in parts] == [([0.1, 0.2, 0.5, 0.6], True)] * 2


@pytest.mark.parametrize("name", ["llava", "messages", "sharegpt", "qwen_vl", "ms_swift"])
def test_the_answer_of_an_evaluation_record_is_its_last_turn(name):
    _, again, losses = round_trip(name, CHOICE)
    assert shown(again.messages)[-1] == ("assistant", "Kate sits.")
    assert losses["the answer of an evaluation record became its last turn"] == 1
    assert losses["false_answers are left out"] == 1
    _, again, _ = round_trip(name, QUESTION)
    last = again.messages[-1]
    if name == "ms_swift":
        assert [part.box for part in last.content] == [[10, 20, 110, 220]]
    else:
        assert shown([last]) == [("assistant", "(Kate 10)")]


def test_texts_that_a_format_would_read_otherwise_are_errors():
    record = json.loads(json.dumps(GENERAL).replace("Sure?", "What is <image> here?"))
    sample = parse_sample(record, where="train.jsonl:3")
    for name in set(WRITERS) - {"idavlm"}:
        with pytest.raises(DataError, match=r"^train.jsonl:3: a text holds '<image>'"):
            WRITERS[name](sample, Losses(), box_text)
    with pytest.raises(DataError, match="pass the box format"):
        WRITERS["llava"](parse_sample(TRAINING), Losses(), None)
    path = json.loads(json.dumps(GENERAL).replace("a.jpg", "a<b.jpg"))
    with pytest.raises(DataError, match="cannot stand between <img> and </img>"):
        WRITERS["qwen_vl"](parse_sample(path), Losses(), box_text)


@pytest.fixture
def data(tmp_path):
    """A file of four records with images."""
    maker = RecordMaker(tmp_path / "images")
    records = [maker.record("0"), maker.record("1"), maker.question("2", "location"), maker.question("3")]
    records[0]["meta"] = {"people": {"Kate": "nm1"}, "note": [1]}
    records[0]["boxes"][1]["label"] = "reading"
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def convert(source, out, *options):
    return main(["data", "convert", str(source), "--out", str(out), *map(str, options)])


@pytest.mark.parametrize("embed", [False, True])
def test_parquet_holds_everything_and_the_images(data, embed):
    pytest.importorskip("datasets")
    table = data / ("embedded" if embed else "paths") / "own.parquet"
    images = () if embed else ("--images", data / "images")
    assert convert(data / "own.jsonl", table, *(["--embed-images"] if embed else [])) == 0
    assert convert(table, data / "again.jsonl", *images) == 0
    first, again = (RecordDataset(data / f"{name}.jsonl") for name in ("own", "again"))
    for number in range(len(first)):
        one, other = (dataclasses.replace(each[number], where="") for each in (first, again))
        assert one == other
    if embed:
        held = RecordDataset(table, data / "nowhere")[0]
        assert held.image_root.images["0/kate.png"] == (data / "images" / "0" / "kate.png").read_bytes()
        assert held.image_root.images.keys() == {"0/kate.png", "0/tom.png", "0/scene.png"}


def test_convert_there_and_back(data, capsys):
    """LLaVA: text and images; boxes in LLaVA's format; a list in a .json file; all losses are printed."""
    out = data / "llava.json"
    assert convert(data / "own.jsonl", out, "--to", "llava", "--image-prefix", "images") == 0
    printed = capsys.readouterr().out
    assert "4 records: " in printed
    assert "4 records: identities became lines of text" in printed
    assert "1 records: false_answers are left out" in printed
    records = json.loads(out.read_text())
    assert records[0]["image"] == ["images/0/kate.png", "images/0/tom.png", "images/0/scene.png"]
    assert records[0]["conversations"][1] == {"from": "gpt", "value": "[0.125, 0.208, 0.438, 0.833]"}
    assert convert(out, data / "back.jsonl", "--reader", "llava", "--images", data) == 0
    back = RecordDataset(data / "back.jsonl", data)
    assert back[0].images == records[0]["image"]
    assert main(["data", "validate", str(data / "back.jsonl"), "--images", str(data), "--workers", "1"]) == 0


def test_formats_of_readers_become_the_schema(tmp_path):
    for name, record in CASES.items():
        source = tmp_path / f"{name}.jsonl"
        source.write_text(json.dumps(record) + "\n")
        assert convert(source, tmp_path / f"{name}.own.jsonl", "--reader", name) == 0
        sample = RecordDataset(tmp_path / f"{name}.own.jsonl")[0]
        assert shown(sample.messages)[:2] == [("user", "<a.jpg>\nWhat?"), ("assistant", "A cat.")], name


def test_mistakes_of_the_command(data, capsys):
    source = data / "own.jsonl"
    mistakes = {
        ("--out", data / "x.csv"): "must end with .jsonl, .json or .parquet",
        ("--out", source): "is the file that is read",
        ("--out", data / "x.parquet", "--to", "llava"): "is a table of the schema",
        ("--out", data / "x.jsonl", "--embed-images"): "--embed-images needs a .parquet file",
        ("--out", data / "x.jsonl", "--box-format", "unit"): "--box-format has no effect with --to idavlm",
        ("--out", data / "x.jsonl", "--to", "llava", "--box-format", "units"): "box_format='units' is not known",
        ("--out", data / "x.jsonl", "--image-prefix", "/data"): "paths of the schema stay below the image root",
        ("--out", data / "x.jsonl", "--to", "sharegpt"): "own.jsonl:1: the messages hold a box of 'Kate'; pass the box",
    }
    for options, message in mistakes.items():
        assert main(["data", "convert", str(source), *map(str, options)]) == 2
        assert message in capsys.readouterr().err
        assert not (data / "x.jsonl").exists()
    (data / "bad.jsonl").write_text(source.read_text() + "{}\n")
    assert main(["data", "convert", str(data / "bad.jsonl"), "--out", str(data / "x.jsonl")]) == 2
    assert main(["data", "convert", str(data / "bad.jsonl"), "--out", str(data / "x.jsonl"), "--on-error", "skip"]) == 0
    assert "1 skipped (1 record)" in capsys.readouterr().out
    assert len((data / "x.jsonl").read_text().splitlines()) == 4
