"""The characters data set: exact boxes, disjoint splits, reproducible bytes, and no partially built folders."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from idavlm.data import parse_sample
from idavlm.datasets.characters import ACTIVITIES, CharacterLook, build_characters, draw_characters, drawing, images
from idavlm.datasets.record_composer import FIRST_NAMES, MAX_INTRODUCED, TEST_SHARES

OPTIONS = {
    "num_train": 12,
    "num_test": 8,
    "num_train_scenes": 12,
    "num_test_scenes": 8,
    "num_general": 6,
    "num_train_records": 150,
    "num_test_records": 16,
    "num_general_records": 12,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_characters(tmp_path_factory.mktemp("characters") / "data", **OPTIONS)


def records(root, name):
    return [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def characters(count, seed=0):
    rng = np.random.default_rng(seed)
    activities = [ACTIVITIES[i] for i in rng.permutation(len(ACTIVITIES))[:count]]
    return [CharacterLook.from_seed(seed, number) for number in range(count)], activities


def photograph(monkeypatch, light, looks, activities, seed, size):
    """The image on a background of one brightness, without shadows."""
    monkeypatch.setattr(images, "background", lambda *_: Image.new("RGB", (size, size), (light,) * 3))
    monkeypatch.setattr(images, "_shadow", lambda: Image.new("L", (8, 8)))
    monkeypatch.setattr(images, "in_light", lambda image, rng: image)
    image, boxes = draw_characters(looks, activities, np.random.default_rng(seed), size)
    return np.asarray(image).astype(int), boxes


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [64, 128])
def test_boxes_are_those_of_the_covered_pixels(monkeypatch, seed, size):
    """The figure is measured as the pixels that do not differ between a black and a white background."""
    looks, activities = characters(1, seed)
    activities = [ACTIVITIES[seed % len(ACTIVITIES)]]
    black, boxes = photograph(monkeypatch, 0, looks, activities, seed, size)
    white, _ = photograph(monkeypatch, 255, looks, activities, seed, size)
    rows, columns = np.nonzero(255 - (white - black).max(-1) >= 128)
    assert boxes == [(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_characters_are_side_by_side_inside_the_image(monkeypatch, count):
    for seed in range(8):
        _, boxes = photograph(monkeypatch, 0, *characters(count, seed), seed, 128)
        assert all(0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128 for x1, y1, x2, y2 in boxes)
        assert all(y2 - y1 >= 30 for _, y1, _, y2 in boxes), "large enough to recognise the activity"
        for (_, _, x2, _), (following, _, x4, _) in pairwise(boxes):
            assert x2 - following <= 0.3 * (x4 - following), "a neighbour hides most of the character"


def test_names_are_words():
    assert len(set(FIRST_NAMES)) == len(FIRST_NAMES) >= 100
    assert all(name.isalpha() and name.istitle() and len(name) > 1 for name in FIRST_NAMES)


def test_a_look_is_a_function_of_its_seed():
    assert CharacterLook.from_seed(3, 1) == CharacterLook.from_seed(3, 1)
    assert len({CharacterLook.from_seed(0, number) for number in range(200)}) == 200


def test_two_images_of_one_character_differ():
    looks, activities = characters(1)
    first, second = (draw_characters(looks, activities, np.random.default_rng(seed), 64)[0] for seed in (0, 1))
    assert np.abs(np.asarray(first, dtype=int) - np.asarray(second)).mean() > 5


def test_every_record_obeys_the_schema(root):
    image_root = root / "images"
    for name in ("train", "test", "general"):
        for number, record in enumerate(records(root, name), 1):
            sample = parse_sample(record, where=f"{name}.jsonl:{number}", image_root=image_root)
            assert sample.source == ("general" if name == "general" else "identity")
            assert all((image_root / path).is_file() for path in sample.images)
            assert not set(sample.reference_images) & set(sample.message_images)
            assert {identity.name for identity in sample.identities} <= set(FIRST_NAMES)
            for box in sample.boxes:
                x1, y1, x2, y2 = box.box
                assert 0 <= x1 < x2 <= 128
                assert 0 <= y1 < y2 <= 128


def test_counts_and_kinds(root):
    description = json.loads((root / "dataset.json").read_text())
    tests = Counter(record["type"] for record in records(root, "test"))
    assert tests == {task: round(16 * share) for task, share in TEST_SHARES.items()}
    counts = {"train_images": 12 * 4 + 12, "test_images": 8 * 4 + 8, "general_images": 6}
    assert description["counts"] == {"train": 150, "test": sum(tests.values()), "general": 12, **counts}
    with Image.open(root / "images/train/photos/0000-0.jpg") as image:
        assert (image.size, image.mode) == ((128, 128), "RGB")


def test_held_out_identities_stay_held_out(root):
    splits = json.loads((root / "dataset.json").read_text())["splits"]
    assert (len(splits["train"]), len(splits["test"])) == (12, 8)
    assert not set(splits["train"]) & set(splits["test"])
    looks = [{drawing.look_of(identity, 0) for identity in splits[split]} for split in ("train", "test")]
    assert not looks[0] & looks[1]
    for name, folder in (("train", "train/"), ("test", "test/"), ("general", "general/")):
        for record in records(root, name):
            sample = parse_sample(record)
            assert all(path.startswith(folder) for path in sample.images)


def test_evaluation_records_can_be_answered(root):
    for record in records(root, "test"):
        sample = parse_sample(record)
        assert all(len(identity.images) == 2 for identity in sample.identities)
        assert sample.answer not in sample.false_answers
        if sample.task == "matching":
            assert len(sample.message_images) == 4
            assert len({path.split("-")[0] for path in sample.message_images}) == 4, "four different identities"
            assert sorted([sample.answer, *sample.false_answers]) == [f"Picture {i}" for i in range(1, 5)]
            name = record["messages"][0]["content"][-1]["text"].removeprefix("\nWhich picture shows ")[:-1]
            (box,) = (box for box in sample.boxes if box.name == name)
            assert sample.answer == f"Picture {sample.message_images.index(box.image) + 1}"
        elif sample.task == "location":
            assert sample.target_box is not None
        elif sample.task == "qa_single":
            assert len(set(sample.false_answers)) == 3


def test_training_conversations_have_several_questions(root):
    turns = Counter()
    for record in records(root, "train"):
        sample = parse_sample(record)
        assert not sample.is_evaluation
        assert sample.task == record["id"].rpartition("-")[0], "training records name their task"
        turns[sum(message.role == "assistant" for message in sample.messages)] += 1
        assert 1 <= len(sample.identities) <= MAX_INTRODUCED
        assert {len(identity.images) for identity in sample.identities} <= {1, 2}
    assert turns[1] > 20, "roll calls, captions, scenes with one identity"
    assert sum(count for number, count in turns.items() if number >= 3) > 20, "one question per introduced identity"


def test_persons_of_training_records_are_not_in_evaluation_records(root):
    train, test = (
        {person for record in records(root, split) for person in record["meta"]["people"].values()}
        for split in ("train", "test")
    )
    assert len(train) > 2
    assert len(test) > 2
    assert train.isdisjoint(test)


def test_the_same_options_give_the_same_bytes(root, tmp_path):
    again = build_characters(tmp_path / "again", **OPTIONS, num_workers=1)
    assert digests(again) == digests(root)
    other = build_characters(tmp_path / "other", **OPTIONS, seed=1)
    assert digests(other)["train.jsonl"] != digests(root)["train.jsonl"]


def test_built_again_only_for_other_options(tmp_path):
    root = build_characters(tmp_path / "data", **OPTIONS, size=48)
    stamp = (root / "train.jsonl").stat().st_mtime_ns
    assert build_characters(root, **OPTIONS, size=48, num_workers=1) == root
    assert (root / "train.jsonl").stat().st_mtime_ns == stamp
    build_characters(root, **OPTIONS | {"num_train_records": 20}, size=48)
    assert len(records(root, "train")) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing, "draw_objects", fail)
    with pytest.raises(KeyboardInterrupt):
        build_characters(tmp_path / "data", **OPTIONS, num_workers=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_build_leaves_no_data_set_and_the_next_one_cleans_up(tmp_path):
    root = tmp_path / "data"
    build = multiprocessing.get_context("fork").Process(
        target=build_characters, args=(root,), kwargs={**OPTIONS, "num_train": 3000}
    )
    build.start()
    while not list(tmp_path.glob(".data.unfinished-*/images/train/photos/*.jpg")):
        assert build.is_alive()
        time.sleep(0.02)
    os.kill(build.pid, signal.SIGKILL)
    build.join()
    time.sleep(0.2)  # its worker process ends at the next image
    assert not root.exists()
    build_characters(root, **OPTIONS, size=48)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("option", "value"), [("num_train", 4), ("num_photos", 3), ("size", 20), ("num_workers", 0), ("seed", -1)]
)
def test_options_out_of_range(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        build_characters(tmp_path / "data", **OPTIONS | {option: value})
    assert not list(tmp_path.iterdir())


def test_other_files_are_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"contains no dataset\.json"):
        build_characters(tmp_path, **OPTIONS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
