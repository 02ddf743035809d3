"""RecordDataset on a file with faults: errors with file and line, or skipped samples that are counted."""

import json
import os
import re

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from idavlm.data import DataError, RecordDataset, open_image
from tests.test_data_schema import TRAINING


@pytest.fixture
def faulty(tmp_path):
    """Twelve lines. Lines 1, 3, 6, 8, 10 and 11 obey the schema; the images of 6 and 8 are broken, 11 has no label."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 30), "red").save(images / "good.png")
    (images / "cut.png").write_bytes((images / "good.png").read_bytes()[:60])

    def line(name="good.png", answer="A.", **more):
        content = [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": messages, **more})

    lines = [
        line(id="one"),
        '{"id": 2, "messages": [',
        line(id="three"),
        line(answer=" "),
        line("../secret.png"),
        line("cut.png"),
        "",
        line("missing.png"),
        line().replace('"user"', '"narrator"'),
        line(id="ten"),
        line(id="eleven", answer="no labels"),
        "\xff\xfe",
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="latin-1")
    return tmp_path / "train.jsonl"


def encode(sample):
    for path in sample.images:
        open_image(sample.image_root, path)
    labels = -100 if "no labels" in sample.messages[-1].content[0].text else 1
    return {"labels": torch.tensor([labels]), "id": sample.id}


BAD_LINES = {2: "json", 4: "record", 5: "record", 6: "image", 8: "image", 9: "record", 11: "labels", 12: "json"}


def test_every_fault_is_raised_with_file_and_line(faulty):
    with pytest.raises(DataError, match=r"train.jsonl:2: invalid JSON"):
        RecordDataset(faulty)
    for number, line in enumerate(faulty.read_bytes().splitlines(), 1):
        if not line:
            continue
        alone = faulty.with_name("alone.jsonl")
        alone.write_bytes(b"\n" * (number - 1) + line)
        if number not in BAD_LINES:
            assert RecordDataset(alone, encode=encode)[0]["id"]
            continue
        with pytest.raises(DataError, match=rf"^{re.escape(str(alone))}:{number}: ") as caught:
            RecordDataset(alone, encode=encode)[0]
        assert caught.value.kind == BAD_LINES[number]
        if number in (6, 8):
            assert caught.value.file in ("cut.png", "missing.png")


def test_faults_are_skipped_and_counted(faulty):
    with pytest.warns(UserWarning, match=r"train.jsonl: 5 skipped \(3 record, 2 json\)"):
        data = RecordDataset(faulty, encode=encode, on_error="skip")
    assert len(data) == 6
    assert data.errors.counts == {"json": 2, "record": 3}
    with pytest.warns(UserWarning, match="skipped: ") as warned:
        read = [data[i]["id"] for i in [*range(6), *reversed(range(6))]]
    read, again = read[:6], read[6:]
    assert read == ["one", "three", "ten", "ten", "ten", "one"], "replaced by the next valid sample, wrapping around"
    assert again == read[::-1]
    assert len([w for w in warned if "skipped:" in str(w.message)]) == 3, "one warning per file"
    assert data.errors.counts == {"json": 2, "record": 3, "image": 2, "labels": 1}
    for number in BAD_LINES:
        assert f"train.jsonl:{number}: " in str(data.errors)
    assert data[-1]["id"] == data[5]["id"]
    with pytest.raises(IndexError, match="index 6 of a data set of 6"):
        data[6]


def encode_with_process(sample):
    return encode(sample) | {"process": os.getpid()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_decode_images_and_the_main_process_counts_what_they_skip(faulty, context):
    data = RecordDataset(faulty, encode=encode_with_process, on_error="skip")
    loader = DataLoader(data, batch_size=3, num_workers=1, collate_fn=list, multiprocessing_context=context)
    samples = [sample for batch in loader for sample in batch]
    assert [sample["id"] for sample in samples] == ["one", "three", "ten", "ten", "ten", "one"]
    assert os.getpid() not in {sample["process"] for sample in samples}
    assert data.errors.counts == {"json": 2, "record": 3, "image": 2, "labels": 1}
    assert "train.jsonl:6: image 'cut.png' is not an image or is damaged" in str(data.errors)


def test_an_error_in_a_worker_keeps_its_message(faulty):
    lines = faulty.read_text("latin-1").splitlines()
    faulty.write_text(lines[5])
    with pytest.raises(DataError, match=r"train.jsonl:1: image 'cut.png'"):
        list(DataLoader(RecordDataset(faulty, encode=encode), num_workers=1, collate_fn=list))


@pytest.mark.filterwarnings("ignore")
def test_no_valid_sample_is_an_error(tmp_path, faulty):
    path = tmp_path / "bad.jsonl"
    path.write_text("x\ny\n")
    with pytest.raises(DataError, match=r"no record of .*bad.jsonl can be used. 2 skipped \(2 json\)"):
        RecordDataset(path, on_error="skip")
    path.write_text(faulty.read_text("latin-1").splitlines()[5])
    data = RecordDataset(path, encode=encode, on_error="skip")
    with pytest.raises(DataError, match=r"no sample of .*bad.jsonl can be used. 1 skipped \(1 image\)"):
        data[0]
    path.write_text("")
    with pytest.raises(DataError, match="nothing skipped"):
        RecordDataset(path)
    path.write_text("[1, 2")
    with pytest.raises(DataError, match="invalid JSON list"):
        RecordDataset(path)
    with pytest.raises(DataError, match="does not exist or is not a file"):
        RecordDataset(tmp_path / "none.jsonl")


def test_positions_in_a_json_list(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([TRAINING, {"id": 1}]))
    with pytest.raises(DataError, match=r"list.json\[1\]: messages has no user turn"):
        RecordDataset(tmp_path / "list.json")


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    text = "\ufeff" + "\r\n".join([json.dumps(TRAINING), "", json.dumps(TRAINING)]) + "\r\n"
    (tmp_path / "t.jsonl").write_bytes(text.encode())
    data = RecordDataset(tmp_path / "t.jsonl")
    assert [data[0].where[-2:], data[1].where[-2:]] == [":1", ":3"]
    assert data[0].image_root == tmp_path / "images"


def test_other_errors_are_not_skipped(faulty):
    def broken(sample):
        raise ZeroDivisionError

    with pytest.warns(UserWarning, match="skipped"):
        data = RecordDataset(faulty, encode=broken, on_error="skip")
    with pytest.raises(ZeroDivisionError) as caught:
        data[0]
    assert caught.value.__notes__ == [f"(while {faulty}:1 was encoded)"]


def test_options_are_checked(faulty):
    with pytest.raises(ValueError, match="on_error='ignore' is not known"):
        RecordDataset(faulty, on_error="ignore")
    with pytest.raises(ValueError, match="reader='coco' is not known; choose one of 'alpaca', 'idavlm'"):
        RecordDataset(faulty, reader="coco")
