"""Splits: no person and no image is on two sides, shares are met, and the seed decides."""

import json
from random import Random

import pytest

from idavlm.cli.main import main
from idavlm.data import RecordDataset
from idavlm.data.record_splits import connected_components, split_records
from tests.data_images import RecordMaker, save, textured


def test_components_connect_records_by_common_keys():
    assert connected_components([["a"], ["b"], ["b", "c"], [], ["c", "a"], ["d"]]) == [0, 0, 0, 3, 0, 5]


@pytest.mark.parametrize("seed", range(5))
def test_no_key_is_in_two_splits_and_shares_are_met(seed):
    rng = Random(seed)
    keys = [[f"{family}-{rng.randrange(6)}", f"{family}-{rng.randrange(6)}"] for family in range(60) for _ in range(9)]
    rng.shuffle(keys)
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    split = split_records(keys, shares, seed=seed)
    owner = {}
    for of_record, name in zip(keys, split, strict=True):
        for key in of_record:
            assert owner.setdefault(key, name) == name
    for name, share in shares.items():
        assert abs(split.count(name) / len(keys) - share) < 0.02
    assert split == split_records(keys, shares, seed=seed)
    assert split != split_records(keys, shares, seed=seed + 100)


def test_shares_that_cannot_be_met_are_errors():
    with pytest.raises(ValueError, match=r"train would have 100.0% .* the largest has 9 records"):
        split_records([["a"]] * 9, {"train": 0.5, "test": 0.5})
    with pytest.raises(ValueError, match="sum to 1"):
        split_records([["a"]], {"train": 0.5, "test": 0.4})
    with pytest.raises(ValueError, match="no records"):
        split_records([], {"train": 0.5, "test": 0.5})


@pytest.fixture
def data(tmp_path):
    """Records that are connected in pairs: by a person, by an image, and by equal pixels in two files."""
    maker = RecordMaker(tmp_path / "images")
    records = [maker.record(f"{number}") for number in range(8)]
    for number in (0, 1):
        records[number]["meta"] = {"people": {"Kate": "nm7", "Tom": f"nm{10 + number}"}}
    records[3]["identities"][1]["images"] = list(records[2]["identities"][0]["images"])
    for name in ("4/kate.png", "5/tom.png"):
        save(textured(1000), tmp_path / "images" / name)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def split(data, *options):
    return main(["data", "split", str(data / "all.jsonl"), "--out", str(data / "out"), "--workers", "1", *options])


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_command_keeps_persons_and_images_together(data, seed, capsys):
    assert split(data, "--shares", "train=0.5", "test=0.5", "--seed", seed) == 0
    assert "6 records with identities have no meta.people" in capsys.readouterr().out
    ids = {
        name: {sample.id for sample in RecordDataset(data / "out" / f"{name}.jsonl", data / "images")}
        for name in ("train", "test")
    }
    assert ids["train"] | ids["test"] == set("01234567")
    for pair in ("01", "23", "45"):
        assert set(pair) <= ids["train"] or set(pair) <= ids["test"]
    out, images = data / "out", str(data / "images")
    files = [str(out / "train.jsonl"), "--test", str(out / "test.jsonl")]
    assert main(["data", "validate", *files, "--images", images, "--workers", "1"]) == 0
    lines = (data / "all.jsonl").read_text().splitlines()
    written = [line for name in ("train", "test") for line in (out / f"{name}.jsonl").read_text().splitlines()]
    assert sorted(written) == sorted(lines)


def test_parquet_stays_parquet(data):
    pytest.importorskip("datasets")
    assert main(["data", "convert", str(data / "all.jsonl"), "--out", str(data / "all.parquet"), "--embed-images"]) == 0
    command = ["data", "split", str(data / "all.parquet"), "--out", str(data / "out"), "--shares", "a=0.5", "b=0.5"]
    assert main([*command, "--workers", "1"]) == 0
    parts = [RecordDataset(data / "out" / f"{name}.parquet", data / "nowhere") for name in "ab"]
    assert sum(map(len, parts)) == 8
    assert parts[0][0].image_root.images.keys() == set(parts[0][0].images)


def test_mistakes_of_the_command(data, capsys):
    assert split(data, "--shares", "train=0.5") == 2
    assert split(data, "--shares", "train", "test=1") == 2
    assert "--shares 'train' must be NAME=SHARE" in capsys.readouterr().err
    assert split(data, "--names-are-people") == 2
    assert "the largest has 8 records" in capsys.readouterr().err
    (data / "images" / "0" / "kate.png").unlink()
    assert split(data) == 2
    assert "0/kate.png' does not exist" in capsys.readouterr().err
    assert split(data, "--compare", "paths", "--tolerance", "0.2") == 0
