"""Builders of tuning data: rules of each source, as the library builds it and as IDA-VLM published it."""

import argparse
import gc
import hashlib
import json
import os
import random
import signal
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idavlm.cli import data_build
from idavlm.data import DataError, ImageStore, RecordDataset
from idavlm.datasets.tuning import (
    VCR,
    DescriptionFile,
    Flickr30kEntities,
    MovieNet,
    PhotoFolder,
    PublishedFlickr30k,
    PublishedMovieNet,
    RefCOCO,
    Splits,
    build_tuning_data,
    changed_crop,
    check_splits,
    film_key,
    read_held_out,
)
from idavlm.datasets.tuning.image_files import PartImages
from idavlm.datasets.tuning.names import FEMININE, MASCULINE, NEUTRAL, draw_names, join_words
from idavlm.datasets.tuning.published import NAMES
from idavlm.utils import lock_folder
from tests.annotation_sets import (
    FILM_SCENES,
    FLICKR_SENTENCES,
    LEFT,
    RIGHT,
    SOLO,
    VCR_BOXES,
    film_cast,
    movienet_body,
    python2_pickle,
    shikra_line,
    vcr_frame,
    vcr_line,
    write_album,
    write_coco_images,
    write_film,
    write_flickr,
    write_jxu124,
    write_lines,
    write_lmms,
    write_refcoco,
    write_vcr,
)
from tests.judge_server import JudgeServer

TRAIN_ONLY = Splits(val=0.0, test=0.0)


def records(out: Path, split: str = "train") -> list[dict]:
    path = out / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def problems(out: Path) -> list[str]:
    return [json.loads(line)["problem"] for line in (out / "problems.jsonl").read_text().splitlines()]


def text(message: dict) -> str:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part.get("text", "") for part in parts).strip()


def names_by_key(record: dict) -> dict[str, str]:
    return {key.partition("#")[2] or key: name for name, key in record["meta"]["people"].items()}


def distractors(record: dict) -> list[str]:
    boxed = {box["name"] for box in record["boxes"]}
    return [identity["name"] for identity in record["identities"] if identity["name"] not in boxed]


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file of a built data set."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_readable(out: Path, reader: str = "idavlm") -> None:
    """All records obey the schema, all images open, and all boxes are inside."""
    store, sizes = ImageStore(out / "images"), {}
    for path in out.glob("t*.jsonl"):
        for sample in RecordDataset(path, reader=reader):
            for image in sample.images:
                if image not in sizes:
                    sizes[image] = store.open(image).size
            for box in sample.boxes:
                width, height = sizes[box.image]
                assert 0 <= box.box[0] < box.box[2] <= width
                assert 0 <= box.box[1] < box.box[3] <= height


def vcr(folder: Path, **options) -> VCR:
    return VCR(folder, folder / "vcr1images", **{"splits": TRAIN_ONLY, "distractors": 0.0} | options)


def build_vcr_lines(folder: Path, lines: list, **options) -> dict:
    """Build from some lines, whose frames exist; return ``dataset.json``."""
    write_lines(folder / "train.jsonl", lines)
    return build_tuning_data(vcr(folder, **options), folder / "out")


# What all builders share


def test_a_reference_from_the_scene_has_none_of_its_pixels():
    """No four neighbouring pixels of a changed crop are in the scene, mirrored or not; in a plain crop all are."""
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)

    def runs(image: np.ndarray) -> set[bytes]:
        rows = [*image, *image[:, ::-1]]
        return {row[start : start + 4].tobytes() for row in rows for start in range(len(row) - 3)}

    scene, box = Image.fromarray(noise), [20, 10, 100, 110]
    known = runs(noise)
    sizes = set()
    for seed in range(20):
        crop = changed_crop(scene, box, random.Random(seed))
        assert not runs(np.asarray(crop)) & known
        sizes.add(crop.size)
    assert len(sizes) > 10
    assert all(0.85 * 0.6 * 80 - 2 <= width <= 0.9 * 80 + 1 for width, _ in sizes)
    assert runs(np.asarray(scene.crop(tuple(box)))) <= known


def test_the_images_of_a_part_are_freed_with_it(tmp_path):
    """Without a cycle of references: workers would keep the images of many parts until a full garbage collection."""
    write_vcr(tmp_path, 1, films=1)
    images = PartImages(tmp_path / "vcr1images", tmp_path / "out", 0, "link")
    [path] = (tmp_path / "vcr1images").rglob("*.jpg")
    image = weakref.ref(images.open(str(path.relative_to(tmp_path / "vcr1images"))))
    assert image() is not None
    gc.disable()
    try:
        del images
        assert image() is None
    finally:
        gc.enable()


def test_names_are_different_and_not_in_the_texts():
    for seed in range(30):
        drawn = draw_names(["neutral"] * 5 + ["feminine", "masculine"], random.Random(seed), ["Alex and Robin sit"])
        assert len(set(drawn)) == 7
        assert not {"Alex", "Robin"} & set(drawn)
        assert drawn[5] in FEMININE
        assert drawn[6] in MASCULINE
    assert not set(NEUTRAL) & (set(FEMININE) | set(MASCULINE))
    assert not set(FEMININE) & set(MASCULINE)


def test_tokens_become_sentences():
    words = ["Kate", "'", "s", "friend", "(", "Tom", ")", "is", "n't", "in", "a", "t", "-", "shirt", "?"]
    assert join_words(words) == "Kate's friend (Tom) isn't in a t-shirt?"


def test_a_key_is_in_the_same_split_for_all_sources_and_seeds():
    splits = Splits(val=0.1, test=0.2)
    counts = Counter(splits.of(f"coco:{number}") for number in range(5000))
    assert abs(counts["val"] / 5000 - 0.1) < 0.02
    assert abs(counts["test"] / 5000 - 0.2) < 0.02
    assert all(splits.of(f"coco:{n}") == Splits(0.1, 0.2).of(f"coco:{n}") for n in range(50))
    train = next(f"coco:{number}" for number in range(5000) if splits.of(f"coco:{number}") == "train")
    assert splits.of(train, own="val") == "val"
    assert Splits(0.1, 0.2, {train: "test"}).of(train, own="val") == "test"
    with pytest.raises(ValueError, match="test=1"):
        Splits(0.0, 1.0)
    with pytest.raises(ValueError, match=r"val=0\.5 and test=0\.5 leave nothing"):
        Splits(0.5, 0.5)


def test_a_film_has_one_key_in_vcr_and_movienet():
    assert film_key("lsmdc_3008_FIGHT_CLUB") == film_key("Fight Club (1999)") == "film:fightclub"
    assert film_key("movieclips_Charlie_St._Cloud") == film_key("Charlie St. Cloud") != film_key("Charlie")


def test_the_check_of_splits_finds_a_planted_leak(tmp_path):
    folder = write_vcr(tmp_path, 12)
    build_tuning_data(vcr(folder, splits=Splits(0.0, 0.6), distractors=0.5), tmp_path / "out")
    counts = check_splits([tmp_path / "out"])
    assert counts["train"]["records"] == len(records(tmp_path / "out"))
    assert counts["test"]["keys"] > 0
    assert counts["train"]["keys"] > 0
    leaked = records(tmp_path / "out", "test")[0]
    lines = (tmp_path / "out" / "train.jsonl").read_text()
    (tmp_path / "out" / "train.jsonl").write_text(lines + json.dumps(leaked) + "\n")
    expected = r"test\.jsonl:1: 'film:film\d' is in 'test' here and in 'train' in .*train\.jsonl:"
    with pytest.raises(DataError, match=expected):
        check_splits([tmp_path / "out"])


def test_another_build_holds_out_what_the_first_one_does(tmp_path):
    folder = write_vcr(tmp_path, 8)
    write_lines(folder / "val.jsonl", [vcr_line("lsmdc_0_Film_0/0@0.jpg", 50)])
    build_tuning_data(vcr(folder), tmp_path / "first")
    held_out = read_held_out([tmp_path / "first"])
    assert held_out["film:film0"] == "val"
    write_film(tmp_path / "movienet", "tt0", film_cast(), scenes=FILM_SCENES, title="Film 0 (1979)")
    write_film(tmp_path / "movienet", "tt9", film_cast(), scenes=FILM_SCENES, title="Film 9")
    source = movienet(tmp_path / "movienet", splits=Splits(0.0, 0.0, held_out))
    build_tuning_data(source, tmp_path / "second", compare=[tmp_path / "first"])
    assert {record["meta"]["images"][0] for record in records(tmp_path / "second", "val")} == {"film:film0"}
    assert not records(tmp_path / "second")  # tt9 has the same cast, and its actors are held out
    with pytest.raises(DataError, match="film:film0"):
        build_tuning_data(movienet(tmp_path / "movienet"), tmp_path / "third", compare=[tmp_path / "first"])


# VCR


def test_vcr_takes_tags_from_token_lists(tmp_path):
    folder = write_vcr(tmp_path, 6)
    build_tuning_data(vcr(folder), tmp_path / "out")
    for record in records(tmp_path / "out"):
        names = names_by_key(record)
        question, answer, reason, rationale = map(text, record["messages"])
        assert question == f"Why does {names['0']} look at {names['1']} for 2 hours?"
        assert answer == f"{names['1']} spoke."
        assert reason in ("Why?", "Explain why.", "How do you know?", "Give a reason for the answer.")
        assert rationale == f"{names['1']}'s mouth is open."
        assert {box["name"]: box["box"] for box in record["boxes"]} == {
            names["0"]: [10, 10, 70, 110],
            names["1"]: [80, 10, 140, 110],
        }
    check_readable(tmp_path / "out")


def test_vcr_scales_boxes_to_the_file_and_cuts_them_at_its_edges(tmp_path):
    image = vcr_frame(tmp_path, "f", 0, size=(320, 240), boxes=[[-20, 10, 70, 130, 1], *VCR_BOXES[1:]])
    build_vcr_lines(tmp_path, [vcr_line(image)])
    (record,) = records(tmp_path / "out")
    box = next(box["box"] for box in record["boxes"] if box["name"] == names_by_key(record)["0"])
    assert box == [0, 20, 140, 240]


@pytest.mark.parametrize(("pronoun", "names"), [("he", MASCULINE), ("her", FEMININE), ("they", NEUTRAL)])
def test_vcr_names_agree_with_pronouns(tmp_path, pronoun, names):
    image = vcr_frame(tmp_path, "f", 0)
    one = {"question": ["What", "will", pronoun, "say", "to", [0], "?"], "answer_choices": [["Hi", "."]] * 4}
    one["rationale_choices"] = [["Yes", "."]] * 4
    several = vcr_line(image, 1, question=["Why", "does", pronoun, "look", "at", [0], "and", [1], "?"])
    build_vcr_lines(tmp_path, [vcr_line(image, 0, **one), several])
    first, second = records(tmp_path / "out")
    assert first["identities"][0]["name"] in names
    assert all(identity["name"] in NEUTRAL for identity in second["identities"])


@pytest.mark.parametrize(
    ("fields", "boxes", "reason"),
    [
        ({"question": ["Why"], "answer_choices": [["Yes"]] * 4, "rationale_choices": [["No"]] * 4}, None, "no person"),
        ({"objects": ["person"] * 6, "question": [[0, 1, 2, 3, 4, 5]]}, [[5, 5, 99, 99, 1]] * 6, "more than 5 people"),
        ({}, [[10, 10, 40, 40, 1], *VCR_BOXES[1:]], "smaller than 8%"),
        ({"objects": ["person", "person", "cup", "cup"], "question": [[2], "or", [3]]}, None, "two objects of one"),
    ],
)
def test_vcr_leaves_out(tmp_path, fields, boxes, reason):
    image, good = vcr_frame(tmp_path, "f", 0, boxes=boxes), vcr_frame(tmp_path, "g", 1)
    description = build_vcr_lines(tmp_path, [vcr_line(image, 0, **fields), vcr_line(good, 1)])
    assert len(records(tmp_path / "out")) == 1
    (found,) = description["dropped"]
    assert reason in found
    assert not problems(tmp_path / "out")


def test_vcr_objects_are_written_as_their_class(tmp_path):
    image = vcr_frame(tmp_path, "f", 0)
    build_vcr_lines(tmp_path, [vcr_line(image, question=[[2], "is", "of", [0, 1, 3], "?"])])
    (record,) = records(tmp_path / "out")
    names = names_by_key(record)
    assert text(record["messages"][0]) == f"The cup is of {names['0']}, {names['1']} and {names['3']}?"


def test_vcr_distractors_are_of_other_films_and_anywhere_in_the_order(tmp_path):
    folder = write_vcr(tmp_path, 40)
    description = build_tuning_data(vcr(folder, distractors=1.0), tmp_path / "out")
    assert description["counts"] == {"distractors": 40}
    places, answers = Counter(), Counter()
    for record in records(tmp_path / "out"):
        (name,) = distractors(record)
        film = record["meta"]["scenes"][0]["of"].split("/")[0]
        assert not record["meta"]["people"][name].startswith(f"vcr:{film}/")
        assert len(record["meta"]["images"]) == 2
        places[[identity["name"] for identity in record["identities"]].index(name)] += 1
        question, answer = record["messages"][-2:]
        is_absent = text(question) == f"Where is {name}?"
        assert text(answer) == (f"{name} is not in the image." if is_absent else "")
        answers[is_absent] += 1
        assert name not in text(record["messages"][0]) + text(record["messages"][1]) + text(record["messages"][3])
    assert set(places) == {0, 1, 2}
    assert min(answers.values()) > 5
    build_tuning_data(vcr(folder, distractors=0.25), tmp_path / "some")
    assert 2 <= sum(bool(distractors(record)) for record in records(tmp_path / "some")) <= 18


def test_vcr_test_records_have_the_false_answers(tmp_path):
    folder = write_vcr(tmp_path, 8)
    build_tuning_data(vcr(folder, splits=Splits(0.0, 0.6)), tmp_path / "out")
    test = records(tmp_path / "out", "test")
    assert test
    assert {record["meta"]["images"][0] for record in test}.isdisjoint(
        record["meta"]["images"][0] for record in records(tmp_path / "out")
    )
    for record in test:
        names = names_by_key(record)
        assert record["answer"] == f"{names['1']} spoke."
        a = names["0"]
        assert record["false_answers"] == [f"{a} is bored.", f"{a} wants the cup.", "They are asleep."]
    check_readable(tmp_path / "out")


def test_vcr_reports_faults_by_line_and_keeps_the_rest(tmp_path):
    image, bare, flat = (vcr_frame(tmp_path, film, 0) for film in "abc")
    (tmp_path / "vcr1images" / bare).unlink()
    metadata = {"width": 160, "height": 120, "boxes": [1, 2, 3, 4]}
    (tmp_path / "vcr1images" / flat).with_suffix(".json").write_text(json.dumps(metadata))
    faults = [
        "{",
        "[]",
        vcr_line(image, question=["Why", [7], "?"]),
        vcr_line(image, question="Why?"),
        vcr_line(image, answer_label=4),
        vcr_line(image, objects=None),
        vcr_line(image, metadata_fn="gone.json"),
        vcr_line(image, img_fn="../a.jpg"),
        vcr_line(bare),
        vcr_line(flat),
    ]
    lines = [line for fault in faults for line in (fault, vcr_line(image))]
    description = build_vcr_lines(tmp_path, lines)
    assert len(records(tmp_path / "out")) == len(faults)
    assert description["problems"] == len(faults)
    found = [int(problem.partition("train.jsonl:")[2].partition(":")[0]) for problem in problems(tmp_path / "out")]
    assert found == list(range(1, 2 * len(faults), 2))


def junk(rng: random.Random):
    values = [None, True, -1, 3, 1e9, 0.5, "", "x", "\ud800", "a/../b", [], [1], [[]], {}, {"a": 1}, [None] * 4]
    return rng.choice(values)


def mutate(value, rng: random.Random):
    """Replace a random node of a JSON value."""
    if rng.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return junk(rng)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        return value | {key: mutate(value[key], rng)}
    index = rng.randrange(len(value))
    return [*value[:index], mutate(value[index], rng), *value[index + 1 :]]


def test_no_damaged_annotation_stops_a_build(tmp_path):
    """Randomly damaged annotations of every format are left out or reported; nothing else happens."""
    rng = random.Random(0)
    image = vcr_frame(tmp_path, "f", 0)
    lines = [json.dumps(mutate(vcr_line(image), rng)) for _ in range(150)]
    description = build_vcr_lines(tmp_path, [*lines, vcr_line(image)], distractors=0.5)
    assert description["problems"] > 50
    assert records(tmp_path / "out")[-1]["meta"]["annotation"] == "train.jsonl:151"
    build_tuning_data(vcr(tmp_path, as_published=True), tmp_path / "published")

    for number in range(12):
        folder = tmp_path / f"film{number}"
        write_film(folder, "tt1", film_cast(), scenes=FILM_SCENES)
        for kind in ("annotation", "meta"):
            path = folder / "files" / kind / "tt1.json"
            content = json.loads(path.read_text())
            for _ in range(3):
                content = mutate(content, rng)
            path.write_text(json.dumps(content))
        build_tuning_data(movienet(folder), folder / "out")
        build_tuning_data(PublishedMovieNet(folder / "files", folder / "240P"), folder / "published")

    refs = [{"image_id": image, "ann_id": 10 * image, "split": "train"} for image in (1, 2, 3)]
    folder = write_refcoco(tmp_path / "refcoco", refs)
    write_coco_images(tmp_path / "coco")
    instances = json.loads((folder / "instances.json").read_text())
    for number in range(20):
        kinds = ("annotations", "images")
        damaged = {name: [mutate(entry, rng) for entry in instances[name]] for name in kinds}
        (folder / "instances.json").write_text(json.dumps(damaged | {"categories": instances["categories"]}))
        for published in (False, True):
            source = refcoco(folder, tmp_path / "coco", as_published=published, categories=None)
            build_tuning_data(source, tmp_path / f"refcoco{number}{published}")

    write_lines(tmp_path / "shikra.jsonl", [json.dumps(mutate(shikra_line("1"), rng)) for _ in range(40)])
    write_flickr(tmp_path / "flickr", ["1"])
    images = tmp_path / "flickr" / "flickr30k-images"
    build_tuning_data(PublishedFlickr30k(tmp_path / "shikra.jsonl", images), tmp_path / "shikra")


# VCR as published


def published_vcr(folder: Path, lines: list) -> tuple[list[list[str]], dict]:
    """Texts of the records that the published rules make of lines."""
    description = build_vcr_lines(folder, lines, as_published=True)
    conversations = [record["conversations"] for record in records(folder / "out")]
    return [[turn["value"] for turn in turns] for turns in conversations], description


def orig(image: str, number: int, question: str, answer: str = "Yes.", **fields) -> dict:
    return vcr_line(image, number, question_orig=question, answer_orig=answer, rationale_orig="Yes.", **fields)


def test_published_vcr_takes_every_number_for_a_tag(tmp_path):
    image = vcr_frame(tmp_path, "f", 0)
    texts, description = published_vcr(
        tmp_path,
        [
            orig(image, 0, "Does 1 wait 2 hours ?"),
            orig(image, 1, "Is '1 with 1's hat '2' or (2) ?"),
            orig(image, 2, "Does 1 have 0 friends ?"),
            orig(image, 3, "Is 1 on the 2nd floor with 2 ?"),
            orig(image, 4, "Is 1 on the 2nd floor ?"),
            orig(image, 5, "Does 1 have 9 lives ?"),
            orig(image, 6, "Does 1 like 3 ?"),
        ],
    )
    two, quoted, zero, second = (turns[0].rpartition("\n")[2].split(". ")[-1] for turns in texts[:4])
    names = [word for word in two.split() if word in NAMES]
    assert two == f"Does {names[0]} wait {names[1]} hours ?"
    kate = next(word for word in quoted.replace("'", " ").split() if word in NAMES)
    assert quoted == f"Is '1 with {kate}'s hat '2' or (2) ?"
    zeroth = [word for word in zero.split() if word in NAMES]
    assert len(zeroth) == 2  # the last object, which is not introduced
    assert zeroth[1] not in texts[2][0].rpartition("<img>")[0].replace(zero, "")
    both = [word.removesuffix("nd") for word in second.split() if word.removesuffix("nd") in NAMES]
    assert second == f"Is {both[0]} on the {both[1]}nd floor with {both[1]} ?"
    assert description["dropped"] == {
        "a number is larger than the number of objects": 1,
        "an object is smaller than 8%": 0,
        "the published script fails at a number that is no tag": 1,
    } or set(description["dropped"]) == {
        "a number is larger than the number of objects",
        "the published script fails at a number that is no tag",
    }
    assert "image 1" in texts[4][0]  # an object that is no person
    assert len(texts) == 5


def test_published_vcr_trains_the_half_with_the_scene_first_as_general_images(tmp_path):
    folder = write_vcr(tmp_path, 40)
    build_tuning_data(vcr(folder, as_published=True), tmp_path / "out")
    first = Counter()
    samples = RecordDataset(tmp_path / "out" / "train.jsonl", reader="qwen_vl")
    for sample, record in zip(samples, records(tmp_path / "out"), strict=True):
        prompt = record["conversations"][0]["value"]
        scene_first = prompt.startswith("In the image 0: <img>scenes/")
        first[scene_first] += 1
        assert bool(sample.identities) != scene_first
        assert len(sample.images) == 3
        if scene_first:
            assert "\nthere are some object or person images. " in prompt
        else:
            assert "\nIn the image <img>scenes/" in prompt
        assert record["conversations"][2]["value"] in ("explain why", "give a reason for the answer")
    assert min(first.values()) > 10
    check_readable(tmp_path / "out", "qwen_vl")


def test_published_vcr_crops_are_the_pixels_of_the_scene_and_shared(tmp_path):
    folder = write_vcr(tmp_path, 8, films=1)
    build_tuning_data(vcr(folder, as_published=True), tmp_path / "out")
    crops = sorted((tmp_path / "out" / "images" / "crops").rglob("*.jpg"))
    assert [crop.name for crop in crops] == ["0@0_0.jpg", "0@0_1.jpg"]  # of 16 references
    scene = Image.open(folder / "vcr1images" / "lsmdc_0_Film_0" / "0@0.jpg").crop((10, 10, 70, 110))
    crop = np.asarray(Image.open(crops[0]), dtype=float)
    both = (scene, scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    differences = [np.abs(crop - np.asarray(other, dtype=float)).mean() for other in both]
    assert min(differences) < 4 < max(differences)


def test_published_names_hold_three_names_twice():
    assert len(NAMES) == 100
    assert {name for name, count in Counter(NAMES).items() if count == 2} == {"Elizabeth", "Jessica", "Sharon"}


# Flickr30k


def flickr(folder: Path, **options) -> Flickr30kEntities:
    options = {"splits": TRAIN_ONLY, "distractors": 0.0} | options
    return Flickr30kEntities(folder, folder / "flickr30k-images", **options)


def test_flickr_replaces_phrases_where_they_stand(tmp_path):
    description = build_tuning_data(flickr(write_flickr(tmp_path, ["100"])), tmp_path / "out")
    first, two, crowd = records(tmp_path / "out")
    names = names_by_key(first)
    caption = f"{names['0']} in a red hat looks at {names['1']} while it rains on the street."
    assert text(first["messages"][1]) == caption
    assert {box["name"]: box["box"] for box in first["boxes"]} == {
        names["0"]: [10, 10, 70, 110],  # the file counts from 1
        names["1"]: [80, 10, 140, 110],
    }
    both = names_by_key(two)
    assert text(two["messages"][1]) == f"{both['0']} and {both['1']} walk beside a parked car on a very quiet street."
    man = names_by_key(crowd)["0"]
    assert text(crowd["messages"][1]) == f"A crowd of people stands near {man} on the old stone bridge today."
    assert all(name in MASCULINE for name in [*names.values(), *both.values(), man])
    assert description["dropped"] == {"fewer than 10 words": 1, "no phrase names a person with a box": 1}
    check_readable(tmp_path / "out")


def test_flickr_holds_out_its_lists_and_unrelated_captions(tmp_path):
    folder = write_flickr(tmp_path, ["100", "101", "102"])
    (folder / "train.txt").write_text("100\n")
    (folder / "val.txt").write_text("101\n")
    (folder / "test.txt").write_text("102\n")
    (folder / "UNRELATED_CAPTIONS").write_text("# format: <imageID> <sentence number>\n100 2\n")
    description = build_tuning_data(flickr(folder), tmp_path / "out")
    assert description["records"] == {"train": 2, "val": 3, "test": 3}
    assert description["dropped"]["the caption is listed as unrelated"] == 1
    assert all(record["type"] == "caption_single" and record["answer"] for record in records(tmp_path / "out", "test"))
    assert json.loads((tmp_path / "out" / "held_out.json").read_text()) == {
        "val": ["flickr30k:101", *_people(tmp_path / "out", "val")],
        "test": ["flickr30k:102", *_people(tmp_path / "out", "test")],
    }


def _people(out: Path, split: str) -> list[str]:
    return list(dict.fromkeys(key for record in records(out, split) for key in record["meta"]["people"].values()))


def test_flickr_distractors_and_faults(tmp_path):
    folder = write_flickr(tmp_path, ["100", "101", "102"])
    (folder / "Sentences" / "101.txt").write_text("\n".join(["[/EN#1/people A man is not closed .", *FLICKR_SENTENCES]))
    (folder / "Annotations" / "102.xml").write_text("<annotation><size>")
    description = build_tuning_data(flickr(folder, distractors=1.0), tmp_path / "out")
    assert description["records"]["train"] == 6
    assert description["counts"]["distractors"] == 6
    assert all(len(distractors(record)) == 1 for record in records(tmp_path / "out"))
    first, second = problems(tmp_path / "out")
    assert "Sentences/101.txt:1: " in first
    assert "Annotations/102.xml" in second


def test_flickr_refuses_the_other_format(tmp_path):
    write_lines(tmp_path / "CWB_flickr30k_train.jsonl", [shikra_line("1")])
    with pytest.raises(ValueError, match=r"no types of phrases; it serves as_published=True only"):
        Flickr30kEntities(tmp_path / "CWB_flickr30k_train.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"reads Shikra's\s+CWB_flickr30k_train.jsonl"):
        PublishedFlickr30k(tmp_path, tmp_path)


def test_published_flickr_replaces_phrases_by_their_text(tmp_path):
    write_flickr(tmp_path, ["100"])
    long = " one two three four five six seven eight nine ."
    lines = [
        shikra_line("100", 0),
        shikra_line(
            "100", 1, sentence="<ph_st>Man<ph_ed> waits for <ph_st>a moment<ph_ed>" + long, boxes_seq=[[0], [1]]
        ),
        shikra_line("100", 2, sentence="<ph_st>Trees<ph_ed>" + long, boxes_seq=[[0]]),
        shikra_line("100", 3, sentence="<ph_st>Two men<ph_ed> talk" + long, boxes_seq=[[0, 1]]),
        shikra_line("100", 4, sentence="<ph_st>A girl<ph_ed> runs ."),
        shikra_line("100", 5, boxes=[[0, 0, 10, 10], [80, 10, 140, 110]]),
    ]
    write_lines(tmp_path / "shikra.jsonl", lines)
    source = PublishedFlickr30k(tmp_path / "shikra.jsonl", tmp_path / "flickr30k-images")
    description = build_tuning_data(source, tmp_path / "out")
    same, moment, trees, two = (
        [turn["value"] for turn in record["conversations"]] for record in records(tmp_path / "out")
    )
    introduced = [word for word in same[0].split() if word in NAMES]
    first, later = introduced
    assert same[0].startswith(f"Given some people characters, {first} is <img>crops/0/{first}.jpg</img>\n, ")
    assert same[1] == f"{later} in a hat looks at {later} while it rains outside ."
    (mom,) = (word for word in moment[0].split() if word in NAMES)
    assert moment[1].startswith(f"Man waits for {mom} one")
    assert trees[0].startswith(". ")
    first, second = (word for word in two[0].split() if word in NAMES)
    assert two[1].startswith(f"{first} and {second} talk")
    assert description["dropped"] == {"a box is smaller than 3000 square pixels": 1, "fewer than 10 words": 1}
    check_readable(tmp_path / "out", "qwen_vl")


# RefCOCO


def refcoco(folder, images: Path, **options) -> RefCOCO:
    return RefCOCO(folder, images, **{"splits": TRAIN_ONLY, "distractors": 0.0} | options)


def test_refcoco_splits_images_over_all_sets(tmp_path):
    """An image that one set holds out is held out; an individual of two sets is one individual."""
    unc = write_refcoco(
        tmp_path / "refcoco",
        [{"image_id": image, "ann_id": 10 * image, "split": "train"} for image in (1, 2, 3)],
    )
    umd = write_refcoco(
        tmp_path / "refcocog",
        [
            {"image_id": 1, "ann_id": 10, "split": "val"},
            {"image_id": 2, "ann_id": 21, "split": "train"},
            {"image_id": 2, "ann_id": 20, "split": "train"},
            {"image_id": 3, "ann_id": 30, "split": "test"},
        ],
        by="umd",
    )
    images = write_coco_images(tmp_path / "coco")
    description = build_tuning_data(refcoco([unc, umd], images), tmp_path / "out")
    assert description["records"] == {"train": 1, "val": 1, "test": 1}
    (record,) = records(tmp_path / "out")
    assert record["meta"]["images"] == ["coco:2"]
    names = names_by_key(record)
    assert {box["name"]: box["box"] for box in record["boxes"]} == {
        names["20"]: [10, 10, 70, 110],
        names["21"]: [80, 10, 140, 110],
    }
    assert sorted(map(text, record["messages"][::2])) == sorted(f"Where is {name}?" for name in names.values())
    assert all(message["content"][0]["type"] == "box" for message in record["messages"][1::2])
    (test,) = records(tmp_path / "out", "test")
    assert (test["type"], test["target"]) == ("location", test["identities"][0]["name"])
    check_readable(tmp_path / "out")


def test_refcoco_categories_and_distractors(tmp_path):
    refs = [{"image_id": image, "ann_id": 10 * image + n, "split": "train"} for image in (1, 2, 3) for n in (0, 2)]
    folder, images = write_refcoco(tmp_path / "refcoco", refs), write_coco_images(tmp_path / "coco")
    description = build_tuning_data(refcoco(folder, images, distractors=1.0), tmp_path / "out")
    assert description["dropped"] == {"another category": 3}
    for record in records(tmp_path / "out"):
        (absent,) = distractors(record)
        turns = dict(zip(map(text, record["messages"][::2]), map(text, record["messages"][1::2]), strict=True))
        assert turns[f"Where is {absent}?"] == f"{absent} is not in the image."
        assert len(turns) == 2
    build_tuning_data(refcoco(folder, images, categories=None), tmp_path / "all")
    assert all(len(record["identities"]) == 2 for record in records(tmp_path / "all"))
    with pytest.raises(ValueError, match=r"categories: 'cat' is in none of the files \(dog, person\)"):
        refcoco(folder, images, categories=["cat"])


def test_refcoco_reads_parquet_files(tmp_path):
    images = write_coco_images(tmp_path / "coco")
    first = write_jxu124(tmp_path / "jxu124" / "train-0.parquet", [(1, 10, "train"), (2, 20, "train")])
    second = write_lmms(tmp_path / "lmms" / "val-00000-of-00001.parquet", image_ids=(2, 8))
    build_tuning_data(refcoco([first.parent, second], images, categories=None), tmp_path / "out")
    assert [record["meta"]["images"] for record in records(tmp_path / "out")] == [["coco:1"]]
    held_out = records(tmp_path / "out", "val")
    assert [record["meta"]["images"] for record in held_out] == [["coco:2"], ["coco:8"]]
    assert (tmp_path / "out" / "images" / held_out[1]["meta"]["scenes"][0]["image"]).is_file()
    assert all(box["box"] == [10, 10, 70, 110] for record in held_out for box in record["boxes"])
    check_readable(tmp_path / "out")
    build_tuning_data(refcoco(first.parent, images), tmp_path / "persons")
    assert len(records(tmp_path / "persons")) == 2


def test_refcoco_reports_faults(tmp_path):
    refs = [
        {"image_id": 1, "ann_id": 10, "split": "train"},
        {"image_id": 1, "ann_id": 99, "split": "train"},
        {"image_id": 2, "ann_id": 20, "split": "somewhere"},
        {"image_id": 3, "ann_id": 30, "split": "train"},
    ]
    folder, images = write_refcoco(tmp_path / "refcoco", refs), write_coco_images(tmp_path / "coco")
    (images / "train2014" / "COCO_train2014_000000000003.jpg").write_bytes(b"no image")
    description = build_tuning_data(refcoco(folder, images), tmp_path / "out")
    assert description["records"]["train"] == 1
    numbers = [problem.partition("refs(unc).p[")[2].partition("]")[0] for problem in problems(tmp_path / "out")]
    assert numbers == ["1", "2", "3"]


def test_a_pickle_that_names_code_is_refused(tmp_path):
    folder = write_refcoco(tmp_path, [])
    (folder / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: names os\.system"):
        RefCOCO(folder, tmp_path)
    assert not (tmp_path / "ran").exists()
    (folder / "refs(unc).p").write_bytes(python2_pickle([{"ref_id": 1}])[:-4])
    with pytest.raises(DataError, match="is no pickle"):
        RefCOCO(folder, tmp_path)


def test_published_refcoco_trains_on_validation_and_all_categories(tmp_path):
    rows = [(1, 12, "train"), (2, 20, "val"), (3, 30, "testA"), (1, 12, "train")]
    refs = [{"image_id": image, "ann_id": annotation, "split": split} for image, annotation, split in rows]
    folder, images = write_refcoco(tmp_path / "refcoco", refs), write_coco_images(tmp_path / "coco")
    description = build_tuning_data(refcoco(folder, images, as_published=True), tmp_path / "out")
    assert description["records"] == {"train": 2, "val": 0, "test": 0}
    (prompt, answer), (_, person) = (
        [turn["value"] for turn in record["conversations"]] for record in records(tmp_path / "out")
    )
    assert prompt == (
        "Picture 1: <img>crops/COCO_train2014_000000000001_12_crop.jpg</img>\n"
        "Picture 2:<img>scenes/train2014/COCO_train2014_000000000001.jpg</img>\n"
        "Identify the Picture 1 instance in the Picture 2 with grounding:"
    )
    assert answer == "<ref>Picture 1</ref><box>(187,500),(625,916)</box>"  # 0..1000, rounded down
    assert person == "<ref>Picture 1</ref><box>(62,83),(437,916)</box>"
    assert not any(sample.identities for sample in RecordDataset(tmp_path / "out" / "train.jsonl", reader="qwen_vl"))


# MovieNet


def movienet(folder: Path, **options) -> MovieNet:
    return MovieNet(folder / "files", folder / "240P", **{"splits": TRAIN_ONLY, "distractors": 0.0} | options)


class Describe:
    """Describes frames by the names in the request; ``reply`` may replace texts."""

    def __init__(self, reply=None):
        self.reply = reply
        self.requests = []

    def __call__(self, requests):
        self.requests += requests
        return [self._text(request) for request in requests]

    def _text(self, request):
        if self.reply is not None:
            return self.reply(request)
        names = " and ".join(request.names.values())
        return f"What do {names} do?\nNodding." if request.task.startswith("qa") else f"{names} talk."


def test_movienet_references_are_of_other_scenes(tmp_path):
    write_film(tmp_path, "tt1", film_cast(), scenes=FILM_SCENES)
    build_tuning_data(movienet(tmp_path), tmp_path / "out")
    found = records(tmp_path / "out")
    assert [record["meta"]["scenes"][0]["shot"] for record in found] == ["tt1:20", "tt1:24", "tt1:28"]
    for record in found:
        (scene,) = record["meta"]["scenes"]
        assert scene["scene"] == "tt1:3"
        assert all(reference["scene"] in ("tt1:1", "tt1:2", "tt1:4") for reference in record["meta"]["references"])
        by_image = {reference["image"]: reference["scene"] for reference in record["meta"]["references"]}
        for identity in record["identities"]:
            assert identity["name"] in NEUTRAL  # not the name of the character
            scenes = [by_image[image] for image in identity["images"]]
            assert len(scenes) == len(set(scenes)) in (1, 2)
    boxes = {box["name"]: box["box"] for box in found[0]["boxes"]}
    assert boxes[names_by_key(found[0])["movienet:nm1"]] == [5, 10, 70, 110]  # of the file, not of the resolution
    assert {len(record["identities"]) for record in found} == {1, 2}
    check_readable(tmp_path / "out")


def test_movienet_without_scenes_takes_references_fifty_shots_away(tmp_path):
    cast = [movienet_body(shot, "nm1", SOLO) for shot in (0, 90, 120, 300)]
    cast += [movienet_body(100, "nm1", LEFT), movienet_body(100, "others", RIGHT)]
    write_film(tmp_path, "tt1", cast)
    build_tuning_data(movienet(tmp_path), tmp_path / "out")
    (record,) = records(tmp_path / "out")
    assert {reference["shot"] for reference in record["meta"]["references"]} <= {"tt1:0", "tt1:300"}


def test_movienet_distractors_are_cast_who_are_not_there(tmp_path):
    cast = [*film_cast(), movienet_body(26, "others", [700, 300, 900, 600], possible_pids=["nm3"])]
    write_film(tmp_path, "tt1", cast, scenes=FILM_SCENES)
    build_tuning_data(movienet(tmp_path, distractors=1.0), tmp_path / "out")
    absent = [[record["meta"]["people"][name] for name in distractors(record)] for record in records(tmp_path / "out")]
    assert absent[:2] == [["movienet:nm3"], ["movienet:nm3"]]
    assert absent[2][0] in ("movienet:nm1", "movienet:nm2")
    for record in records(tmp_path / "out"):
        (name,) = distractors(record)
        turns = dict(zip(map(text, record["messages"][::2]), map(text, record["messages"][1::2]), strict=True))
        assert turns[f"Where is {name}?"] == f"{name} is not in the image."
    # One of the bodies of shot 26 may be nm3.
    source = movienet(tmp_path, distractors=1.0, describe=Describe(), tasks=["caption_single"])
    build_tuning_data(source, tmp_path / "captions")
    last = records(tmp_path / "captions")[-1]
    assert last["meta"]["scenes"][0]["shot"] == "tt1:26"
    assert not distractors(last)


def test_movienet_writes_no_image_of_a_record_that_is_left_out(tmp_path):
    """Shot 20 shows two people, of whom only one has a photo of another scene."""
    cast = [movienet_body(0, "nm1", SOLO), movienet_body(25, "nm2", SOLO)]
    cast += [movienet_body(20, "nm1", LEFT), movienet_body(20, "nm2", RIGHT)]
    write_film(tmp_path, "tt1", cast, scenes=FILM_SCENES)
    source = movienet(tmp_path, describe=Describe(), tasks=["caption_single"])
    assert build_tuning_data(source, tmp_path / "out")["dropped"]
    assert not list((tmp_path / "out").rglob("*.jpg"))


def test_movienet_does_not_introduce_actors_of_held_out_films(tmp_path):
    splits = Splits(0.0, 0.4)
    titles = [f"Title {number}" for number in range(30)]
    train, test = (next(t for t in titles if splits.of(film_key(t)) == split) for split in ("train", "test"))
    write_film(tmp_path, "tt1", film_cast(), scenes=FILM_SCENES, title=train)
    write_film(tmp_path, "tt2", film_cast(), scenes=FILM_SCENES, title=test, people={"nm2": "Kane", "nm3": "Lambert"})
    description = build_tuning_data(movienet(tmp_path, splits=splits, distractors=1.0), tmp_path / "out")
    assert _people(tmp_path / "out", "train") == ["movienet:nm1"]
    tested = records(tmp_path / "out", "test")
    assert {key for record in tested for key in record["meta"]["people"].values()} == {"movienet:nm2", "movienet:nm3"}
    assert all(len(record["messages"]) == 1 and record["target"] for record in tested)
    assert description["counts"]["actors of held-out films"] == 2
    assert check_splits([tmp_path / "out"])["test"]["records"] == len(tested)


def test_movienet_descriptions(tmp_path):
    write_film(tmp_path, "tt1", film_cast(), scenes=FILM_SCENES)
    describe = Describe()
    description = build_tuning_data(movienet(tmp_path, describe=describe), tmp_path / "out")
    by_task = Counter(record["type"] for record in records(tmp_path / "out"))
    # Shot 28 has one person with references; the four shots before it are one chain.
    assert by_task == {"location": 3, "caption_single": 4, "qa_single": 4, "caption_multi": 1, "qa_multi": 1}
    assert description["records"]["train"] == 13
    for record in records(tmp_path / "out"):
        if record["type"] == "location":
            continue
        names = [identity["name"] for identity in record["identities"]]
        assert sorted(names) == sorted(name for name in names if name in " ".join(map(text, record["messages"])))
        scenes = [scene["shot"] for scene in record["meta"]["scenes"]]
        assert scenes == (["tt1:20", "tt1:22", "tt1:24", "tt1:26"] if record["type"].endswith("multi") else scenes[:1])
        assert all(reference["scene"] != "tt1:3" for reference in record["meta"]["references"])
        if record["type"].startswith("qa"):
            assert text(record["messages"][1]) == "Nodding."
    request = next(request for request in describe.requests if request.task == "caption_single")
    content = request.messages()[1]["content"]
    assert request.size == (160, 120)  # of the file that is sent
    assert content[1]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert [box for boxes in request.boxes for box in boxes.values()] == [[5, 10, 70, 110], [80, 10, 150, 110]] or len(
        request.boxes[0]
    ) == 2
    check_readable(tmp_path / "out")


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        ("What do {a} and {b} do?\nNodding.", True),
        ("What do {a} and {b} do?\nNo, they talk.", True),
        ("Question: Where is {a}?\nAnswer: Outside.", True),
        ("<think>{a} is left.</think>Where is {a}?\nOutside.", True),
        ("NO", False),
        ("No.", False),
        ("I'm sorry, I can't help with identifying {a}?\nNo.", False),
        ("Where is she?\nOutside.", False),
        ("Where is {a}? Outside.", False),
        ("Where is {a}?\n" + "far " * 30, False),
        ("", False),
    ],
)
def test_movienet_filters_questions(tmp_path, reply, kept):
    write_film(tmp_path, "tt1", film_cast()[:12], scenes=FILM_SCENES)

    def fill(request):
        a, b = request.names.values()
        return reply.format(a=a, b=b)

    source = movienet(tmp_path, describe=Describe(fill), tasks=["qa_single"])
    description = build_tuning_data(source, tmp_path / "out")
    assert description["records"]["train"] == (1 if kept else 0)
    assert bool(description["dropped"]) != kept


def test_movienet_texts_of_a_file(tmp_path):
    write_film(tmp_path, "tt1", film_cast(), scenes=FILM_SCENES)
    entry = {"film": "tt1", "task": "caption_single", "frames": ["shot_0020_img_1.jpg"], "text": "[nm1] sees [nm2]."}
    describe = DescriptionFile(write_lines(tmp_path / "texts.jsonl", [entry]))
    source = movienet(tmp_path, describe=describe, tasks=["caption_single"])
    description = build_tuning_data(source, tmp_path / "out")
    (record,) = records(tmp_path / "out")
    names = names_by_key(record)
    assert text(record["messages"][1]) == f"{names['movienet:nm1']} sees {names['movienet:nm2']}."
    assert description["dropped"] == {"there is no description": 3}
    write_lines(tmp_path / "texts.jsonl", [entry, entry | {"task": "poem"}])
    with pytest.raises(DataError, match=r"texts\.jsonl:2: task='poem'"):
        DescriptionFile(tmp_path / "texts.jsonl")
    with pytest.raises(ValueError, match="'caption_single' needs descriptions"):
        movienet(tmp_path, tasks=["caption_single"])


def test_movienet_reports_faults_of_entries(tmp_path):
    cast = film_cast()
    cast[0] = movienet_body(0, "nm1", [2000, 100, 2100, 200])
    cast[4] = movienet_body(11, "nm2", SOLO, resolution=[0, 1])
    write_film(tmp_path, "tt1", cast, scenes=FILM_SCENES)
    write_film(tmp_path, "tt2", film_cast(), scenes=FILM_SCENES, people={"nm9": "X"})
    (tmp_path / "files" / "meta" / "tt2.json").write_text("{}")
    (tmp_path / "240P" / "tt1" / "shot_0030_img_1.jpg").unlink()
    build_tuning_data(movienet(tmp_path), tmp_path / "out")
    assert len(records(tmp_path / "out")) == 3
    found = problems(tmp_path / "out")
    for part in ("tt1.json cast[0]", "tt1.json cast[4]", "shot 30", "meta/tt2.json"):
        assert any(part in problem for problem in found)
    assert len(found) == 4
    used = {reference["shot"] for record in records(tmp_path / "out") for reference in record["meta"]["references"]}
    assert used.isdisjoint({"tt1:0", "tt1:11", "tt1:30"})


def published_movienet(folder: Path, **options) -> PublishedMovieNet:
    return PublishedMovieNet(folder / "files", folder / "240P", **options)


def test_published_movienet_location(tmp_path):
    """The reference is the latest solo frame, of the same scene; it is used again after three shots only."""
    cast = [movienet_body(shot, "nm1", SOLO) for shot in (1, 5)]
    for shot in (6, 8, 10, 11):
        cast += [movienet_body(shot, "nm1", LEFT), movienet_body(shot, "nm2", RIGHT)]
    cast += [movienet_body(12, "nm1", [50, 100, 300, 400]), movienet_body(12, "nm2", RIGHT)]
    write_film(tmp_path, "tt1", cast, people={"nm1": "Ripley (voice)", "nm2": None}, scenes=FILM_SCENES)
    build_tuning_data(published_movienet(tmp_path), tmp_path / "out")
    turns = [[turn["value"] for turn in record["conversations"]] for record in records(tmp_path / "out")]
    assert [prompt for prompt, _ in turns] == [
        f"Ripley (voice) is <img>scenes/tt1/shot_0005_img_1.jpg</img>\n"
        f"In the image: <img>scenes/tt1/shot_{shot:04d}_img_1.jpg</img>\nIdentify Ripley (voice) with grounding."
        for shot in (6, 10)
    ]
    assert turns[0][1] == "<ref>Ripley (voice)</ref><box>(31,83),(437,916)</box>"
    sample = RecordDataset(tmp_path / "out" / "train.jsonl", reader="qwen_vl")[0]
    assert [identity.name for identity in sample.identities] == ["Ripley (voice)"]


@pytest.mark.parametrize(
    ("task", "reply", "kept"),
    [
        ("qa_single", "What?\nThey talk.", True),
        ("qa_single", "What?\nNodding.", False),
        ("qa_single", "None?\nYes.", False),
        ("qa_single", "What?\n\nThey talk.", False),
        ("qa_multi", "no\nNodding.", True),
        ("qa_multi", "no", False),
        ("caption_single", "no", True),
        ("caption_multi", "no", True),
    ],
)
def test_published_movienet_filters(tmp_path, task, reply, kept):
    cast = film_cast()
    write_film(tmp_path, "tt1", cast, scenes=FILM_SCENES)
    describe = Describe(lambda request: reply)
    description = build_tuning_data(published_movienet(tmp_path, describe=describe, tasks=[task]), tmp_path / "out")
    assert bool(description["records"]["train"]) == kept
    assert all(request.size == (1600, 1200) for request in describe.requests)  # not of the file that is sent
    for record in records(tmp_path / "out"):
        prompt = record["conversations"][0]["value"]
        assert prompt.startswith("Ripley is <img>scenes/tt1/")
        assert ("In the image: " in prompt) == (task == "qa_single")
        assert ("In the following images: " in prompt) == (task == "qa_multi")
        assert record["conversations"][1]["value"] == reply.rpartition("\n")[2]


def test_chains_of_frames_end_as_published_or_go_on(tmp_path):
    """The frame that breaks a chain is lost as published, and begins the next chain otherwise."""
    cast = [movienet_body(shot, pid, SOLO) for shot, pid in ((0, "nm1"), (2, "nm2"), (4, "nm3"))]
    for shot, pid in zip(range(20, 34, 2), ["nm1"] * 3 + ["nm2"] * 3 + ["nm3"], strict=True):
        cast += [movienet_body(shot, pid, LEFT), movienet_body(shot, "others", RIGHT)]
    scenes = [{"shot": [0, 10]}, {"shot": [10, 40]}]
    write_film(tmp_path, "tt1", cast, scenes=scenes)
    for source, chains in ((movienet, [[20, 22, 24], [26, 28, 30]]), (published_movienet, [[20, 22, 24]])):
        describe = Describe()
        build_tuning_data(source(tmp_path, describe=describe, tasks=["qa_multi"]), tmp_path / source.__name__)
        assert [[int(frame[5:9]) for frame in request.frames] for request in describe.requests] == chains


# Own photos and scenes


def album(folder: Path, **options) -> PhotoFolder:
    return PhotoFolder(folder / "scenes.jsonl", folder, **{"records": 240, "test_records": 4} | options)


def test_a_folder_becomes_records_of_the_six_tasks(tmp_path):
    write_album(tmp_path, [f"Person {number}" for number in range(12)], scenes=24)
    description = build_tuning_data(album(tmp_path, splits=Splits(0.0, 0.4)), tmp_path / "out")
    assert description["records"]["train"] == 240
    tasks = {"matching", "location", "qa_single", "caption_single", "qa_multi", "caption_multi"}
    assert {record["type"] for record in records(tmp_path / "out")} == tasks
    assert {record["type"] for record in records(tmp_path / "out", "test")} == tasks
    about_scenes = [record for record in records(tmp_path / "out") if record["type"] in ("location", "qa_single")]
    with_distractor = sum(bool(distractors(record)) for record in about_scenes)
    assert 0.1 < with_distractor / len(about_scenes) < 0.4
    for record in records(tmp_path / "out"):
        owners = {image.split("/")[2] for identity in record["identities"] for image in identity["images"]}
        assert len(owners) == len(record["identities"])
        assert not {image["of"] for image in record["meta"]["references"]} & {
            image["of"] for image in record["meta"]["scenes"]
        }
    check_splits([tmp_path / "out"])
    check_readable(tmp_path / "out")


def test_a_folder_takes_shares_and_names(tmp_path):
    write_album(tmp_path)
    options = {"shares": {"matching": 1.0, "location": 3.0}, "names": "own", "distractors": 0.0}
    build_tuning_data(album(tmp_path, **options), tmp_path / "out")
    found = Counter(record["type"] for record in records(tmp_path / "out"))
    assert 150 < found["location"] < 210
    assert set(found) == {"matching", "location"}
    names = {identity["name"] for record in records(tmp_path / "out") for identity in record["identities"]}
    assert names == {"Kate", "Tom", "Ida", "Omar", "Zoe"}
    write_lines(
        tmp_path / "all.jsonl",
        [{"image": "scenes/0.jpg", "people": [{"name": n, "box": [1, 1, 50, 50]} for n in names]}],
    )
    with pytest.raises(ValueError, match=r"distractors=0\.25: everyone is in scenes/0\.jpg"):
        PhotoFolder(tmp_path / "all.jsonl", tmp_path, shares=options["shares"])
    with pytest.raises(ValueError, match="'poem' is not known"):
        build_tuning_data(album(tmp_path, shares={"poem": 1.0}), tmp_path / "bad")


def test_a_folder_reports_faults(tmp_path):
    write_album(tmp_path)
    lines = (tmp_path / "scenes.jsonl").read_text().splitlines()
    scene = json.loads(lines[0])
    faults = [
        "{",
        scene,
        {"image": "scenes/gone.jpg", "people": scene["people"]},
        {"image": "scenes/1.jpg", "people": [{"name": "Nemo", "box": [1, 1, 50, 50]}]},
        {"image": "scenes/1.jpg", "people": [{"name": "Kate", "box": [500, 1, 550, 50]}]},
    ]
    write_lines(tmp_path / "scenes.jsonl", [*lines[:1], *faults, *lines[1:]])
    (tmp_path / "people" / "Tom" / "0.jpg").write_bytes(b"no image")
    (tmp_path / "people" / "Lone").mkdir()
    description = build_tuning_data(album(tmp_path), tmp_path / "out")
    assert description["records"]["train"] == 240
    found = problems(tmp_path / "out")
    lines = [number for number in range(1, 12) if any(f"scenes.jsonl:{number}:" in problem for problem in found)]
    assert lines == [2, 3, 4, 5, 6]
    assert any("Tom/0.jpg" in problem for problem in found)
    assert any("Lone: 0 photos" in problem for problem in found)
    no_activity = [{"image": "scenes/0.jpg", "people": [{"name": n, "box": [1, 1, 50, 50]} for n in ("Kate", "Tom")]}]
    write_lines(tmp_path / "scenes.jsonl", no_activity)
    with pytest.raises(ValueError, match=r"qa_single, .* need an activity"):
        album(tmp_path)
    album(tmp_path, shares={"matching": 1.0, "location": 1.0})


# The engine


def sources(folder: Path) -> dict[str, object]:
    write_vcr(folder / "vcr", 24)
    write_album(folder / "album")
    return {"vcr": vcr(folder / "vcr", distractors=0.5), "album": album(folder / "album", records=500)}


@pytest.mark.parametrize("kind", ["vcr", "album"])
def test_the_number_of_workers_changes_no_byte(tmp_path, kind):
    source = sources(tmp_path)[kind]
    source.units_per_part = 3 if kind == "vcr" else 1
    build_tuning_data(source, tmp_path / "one")
    build_tuning_data(source, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not (tmp_path / "one" / "parts").exists()
    build_tuning_data(source, tmp_path / "copied", scenes="copy")
    assert contents(tmp_path / "one") == contents(tmp_path / "copied")
    scene = next((tmp_path / "one" / "images" / "scenes").rglob("*.jpg"))
    assert scene.stat().st_nlink > 1
    assert (tmp_path / "copied" / scene.relative_to(tmp_path / "one")).stat().st_nlink == 1


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return False


def is_free(folder: Path) -> bool:
    try:
        with lock_folder(folder):
            return True
    except ValueError:
        return False


def test_a_build_that_is_killed_five_times_has_the_same_bytes(tmp_path):
    """The parent process is killed each time, with two workers; they end by themselves."""
    source = vcr(write_vcr(tmp_path / "vcr", 60), distractors=0.5)
    source.units_per_part = 2
    build_tuning_data(source, tmp_path / "whole")
    out, kills = tmp_path / "killed", 0
    for _ in range(5):
        before = len(list(out.glob("parts/0*.jsonl")))
        process = os.fork()
        if process == 0:
            try:
                build_tuning_data(source, out, workers=2)
            finally:
                os._exit(0)
        assert wait_until(lambda done=before: len(list(out.glob("parts/0*.jsonl"))) > done)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert wait_until(lambda: is_free(out)), "a worker outlives its parent"
        kills += (out / "parts").is_dir() and not (out / "dataset.json").exists()
    assert kills == 5
    build_tuning_data(source, out, workers=2)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_complete_folder_is_left_alone_and_other_options_are_an_error(tmp_path):
    source = vcr(write_vcr(tmp_path / "vcr", 4))
    first = build_tuning_data(source, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert build_tuning_data(source, tmp_path / "out") == first
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(ValueError, match=r"was built with other options \(seed differ"):
        build_tuning_data(vcr(tmp_path / "vcr", seed=1), tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"holds 'thesis.txt'"):
        build_tuning_data(source, tmp_path / "other")
    assert build_tuning_data(source, tmp_path / "limited", limit=2)["records"]["train"] == 2


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    data_build.add_arguments(parser)
    return data_build.run(parser.parse_args([*map(str, arguments), "--quiet"]))


def test_the_command_builds_every_source(tmp_path, capsys):
    write_vcr(tmp_path / "vcr", 6)
    write_flickr(tmp_path / "flickr")
    refs = [{"image_id": 1, "ann_id": 10, "split": "train"}]
    write_refcoco(tmp_path / "refcoco", refs)
    write_coco_images(tmp_path / "coco")
    write_film(tmp_path / "movienet", "tt1", film_cast(), scenes=FILM_SCENES)
    write_album(tmp_path / "album")
    write_lines(tmp_path / "shikra.jsonl", [shikra_line("100")])
    calls = {
        "vcr": ("vcr", "vcr/vcr1images"),
        "flickr30k": ("flickr", "flickr/flickr30k-images"),
        "refcoco": ("refcoco", "coco"),
        "movienet": ("movienet/files", "movienet/240P"),
        "folder": ("album/scenes.jsonl", "album"),
    }
    for source, (annotations, images) in calls.items():
        paths = ["--annotations", tmp_path / annotations, "--images", tmp_path / images]
        options = ["--records", "20", "--shares", "matching=1", "location=1"] if source == "folder" else []
        shares = ["--val", "0", "--test", "0"]
        assert run(source, *paths, "--out", tmp_path / "out" / source, *options, *shares) == 0
        assert " train records, reader 'idavlm'" in capsys.readouterr().out
        if source != "folder":
            paths[1] = tmp_path / "shikra.jsonl" if source == "flickr30k" else paths[1]
            assert run(source, *paths, "--out", tmp_path / "published" / source, "--as-published") == 0
            assert " train records, reader 'qwen_vl'" in capsys.readouterr().out
    check_splits(sorted((tmp_path / "out").iterdir()))


def test_the_command_asks_an_endpoint_once(tmp_path, monkeypatch, capsys):
    write_film(tmp_path, "tt1", film_cast(), scenes=FILM_SCENES)

    def reply(content):
        people = [part["text"] for part in content if part["type"] == "text" and part["text"].startswith("People: ")]
        names = [entry.partition(":")[0] for entry in people[0].removeprefix("People: ").split("; ")]
        return "NO" if reply.refuses else f"{' and '.join(names)} talk."

    reply.refuses = False
    paths = ["--annotations", tmp_path / "files", "--images", tmp_path / "240P", "--val", "0", "--test", "0"]
    options = ["--tasks", "caption_single", "caption_multi", "--describe", "vlm"]
    options += ["--describe-cache", tmp_path / "replies.jsonl"]
    with JudgeServer(reply) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert run("movienet", *paths, "--out", tmp_path / "out", *options) == 0
        assert len(set(map(json.dumps, server.answered))) == len(server.answered) == 5
        assert run("movienet", *paths, "--out", tmp_path / "again", *options, "--workers", "2") == 0
        assert len(server.answered) == 5
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert len(records(tmp_path / "out")) == 5
    reply.refuses = True
    options[-1] = tmp_path / "refusals.jsonl"
    with JudgeServer(reply) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        run("movienet", *paths, "--out", tmp_path / "refused", *options)
    assert not records(tmp_path / "refused")
    assert "5 x the model refused to describe the image" in capsys.readouterr().out
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(ValueError, match="OPENAI_BASE_URL"):
        run("movienet", *paths, "--out", tmp_path / "none", *options)


def test_the_command_refuses_options_without_effect(tmp_path):
    folder = write_vcr(tmp_path, 2)
    paths = ["--annotations", folder, "--images", folder / "vcr1images", "--out", tmp_path / "out"]
    assert run("vcr", *paths) == 0
    with pytest.raises(ValueError, match="--held-out has no effect with --as-published"):
        run("vcr", *paths[:-1], tmp_path / "published", "--as-published", "--held-out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"held_out\.json does not exist"):
        run("vcr", *paths[:-1], tmp_path / "second", "--held-out", tmp_path)
    write_album(tmp_path / "album")
    paths = ["--annotations", tmp_path / "album/scenes.jsonl", "--images", tmp_path / "album"]
    with pytest.raises(ValueError, match="'matching:1' is not TASK=SHARE"):
        run("folder", *paths, "--out", tmp_path / "x", "--shares", "matching:1")
    with pytest.raises(ValueError, match="--shares names 'matching' twice"):
        run("folder", *paths, "--out", tmp_path / "x", "--shares", "matching=1", "matching=2")


def test_ray_builds_the_same_bytes(tmp_path):
    pytest.importorskip("ray", reason="needs idavlm[ray]")
    source = vcr(write_vcr(tmp_path / "vcr", 12), distractors=0.5)
    source.units_per_part = 3
    build_tuning_data(source, tmp_path / "local")
    build_tuning_data(source, tmp_path / "ray", workers=2, engine="ray")
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")
