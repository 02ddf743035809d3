"""Statistics and pages of records: counts that can be checked by hand, and what a page shows."""

import json
import re

import pytest
from PIL import Image

from idavlm.cli.main import main
from idavlm.data import DataError, RecordDataset
from idavlm.data.record_page import write_record_page
from idavlm.data.record_statistics import Distribution, record_statistics
from tests.data_images import RecordMaker


@pytest.fixture
def data(tmp_path):
    maker = RecordMaker(tmp_path / "images")
    records = [maker.record("0"), maker.record("1"), maker.question("2")]
    records[1]["identities"][0]["images"].append(maker.image("1/kate_2.png"))
    records[1]["meta"] = {"people": {"Kate": "nm1", "Tom": "nm2"}, "distractors": ["Tom"]}
    records[0]["messages"][3]["content"] = "<b>Tom</b> is reading."
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_distributions():
    values = Distribution()
    for value in (1, 1, 2, 3, 100):
        values.add(value)
    assert values.summary() == {"n": 5, "mean": 21.4, "min": 1, "p5": 1, "median": 2, "p95": 100, "max": 100}
    assert Distribution().summary() == {"n": 0}


def test_counts(data):
    samples = list(RecordDataset(data / "all.jsonl"))
    found = record_statistics(
        [*samples, DataError("broken")], num_tokens=lambda sample: 10 * len(sample.images)
    ).to_dict()
    assert found["records"] == {
        "all": 3,
        "source identity": 3,
        "type none": 2,
        "evaluation": 1,
        "type qa_single": 1,
    }
    assert found["unreadable"] == {"records": 1}
    counts = found["distributions"]
    assert counts["identities per record"] == {1: 1, 2: 2}
    assert counts["photos per identity"] == {1: 4, 2: 1}
    assert counts["distractors per record"] == {0: 2, 1: 1}
    assert counts["turns per record"] == {1: 1, 4: 2}
    assert counts["boxes per record"] == {2: 3}
    # 50 x 75 and 50 x 80 pixels of 160 x 120
    assert counts["box area, per mille of the image"] == {195: 3, 208: 3}
    assert counts["tokens per record"] == {20: 1, 30: 1, 40: 1}
    assert found["names"] == {"different": 2, "most_frequent": {"Kate": 3, "Tom": 2}}
    assert found["persons"] == 2


def test_command_prints_and_plots(data, capsys):
    pytest.importorskip("matplotlib")
    assert main(["data", "stats", str(data / "all.jsonl"), "--out", str(data / "stats")]) == 0
    printed = capsys.readouterr().out
    assert "| identities per record | 3 | 1.667 | 1 | 1 | 2 | 2 | 2 |" in printed
    assert "2 names; the most frequent: Kate 3, Tom 2" in printed
    assert json.loads((data / "stats" / "stats.json").read_text())["persons"] == 2
    with Image.open(data / "stats" / "stats.png") as figure:
        assert min(figure.size) > 500
        assert len(figure.convert("RGB").getcolors(2**24)) > 50


def test_page_shows_images_turns_and_problems(data):
    samples = list(RecordDataset(data / "all.jsonl"))
    (data / "images" / "1" / "tom.png").unlink()
    problems = {samples[0].where: [("error", "box_outside: too <far>")]}
    assert write_record_page(data / "page.html", samples, title="All", total=3, problems=problems) == 3
    page = (data / "page.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 3 + 3 + 2
    assert "does not exist below the image root" in page
    assert "box_outside: too &lt;far&gt;" in page
    assert "&lt;b&gt;" in page, "texts of records are no markup"
    assert "<b>" not in page
    assert re.search(r'<span class=box style="--colour: #1b6ca8">Kate \[20, 25, 70, 100\]</span>', page)
    assert re.search(r'<span class=name style="--colour: #e08e45">Tom</span>', page)
    assert "false answer" in page


def test_command_shows_the_records_of_a_report(data, capsys):
    pages = {name: data / f"{name}.html" for name in ("some", "ids", "faulty")}
    assert main(["data", "show", str(data / "all.jsonl"), "--out", str(pages["some"]), "--count", "2"]) == 0
    assert "2 of 3 records" in capsys.readouterr().out
    assert main(["data", "show", str(data / "all.jsonl"), "--out", str(pages["ids"]), "--ids", "2"]) == 0
    assert "1 of 3 records" in capsys.readouterr().out
    record = json.loads((data / "all.jsonl").read_text().splitlines()[1])
    record["boxes"][0]["box"] = [20, 25, 999, 100]
    (data / "bad.jsonl").write_text((data / "all.jsonl").read_text() + json.dumps(record | {"id": "bad"}) + "\n")
    report = ["--json", str(data / "report.json"), "--workers", "1"]
    assert main(["data", "validate", str(data / "bad.jsonl"), *report]) == 1
    command = ["data", "show", str(data / "bad.jsonl"), "--out", str(pages["faulty"])]
    assert main([*command, "--report", str(data / "report.json")]) == 0
    page = pages["faulty"].read_text()
    assert page.count("<article>") == 1
    assert "box_outside: box [20, 25, 999, 100]" in page
    assert main([*command, "--ids", "none"]) == 2
    assert "none of the 4 records can be shown" in capsys.readouterr().err
