"""Validation: every planted fault is found by file and line, good files pass, copies of pixels are told from photos."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from idavlm.cli.main import main
from idavlm.data import DataError
from idavlm.data.validation import CHECKS, RecordSource, validate_records
from idavlm.data.validation.image_facts import facts_of, small_grey
from idavlm.data.validation.same_pixels import find_crop, is_cut_from, is_same_image
from tests.data_images import RecordMaker, save, textured

BOX = (20, 25, 70, 100)
"""Kate's box in every scene of :class:`RecordMaker`."""


def scene_of(record):
    return record["boxes"][0]["image"]


def set_text(record, turn, text):
    record["messages"][turn]["content"] = text


def set_texts(record, question, answer):
    """Replace the second question and its answer."""
    set_text(record, 2, question)
    set_text(record, 3, answer)


def replace_photo(maker, record, image, **options):
    """Replace the photo of Kate by an image."""
    path = f"{record['id']}/kate_leak.{'jpg' if options else 'png'}"
    save(image, maker.root / path, **options)
    record["identities"][0]["images"] = [path]


def open_scene(maker, record):
    return Image.open(maker.root / scene_of(record)).convert("RGB")


def plant_text(old, new):
    return lambda maker, record: json.dumps(record).replace(old, new, 1)


def plant(change):
    """A fault that changes the record in place."""

    def planted(maker, record):
        change(maker, record)
        return json.dumps(record)

    return planted


def unmentioned(maker, record):
    for turn, text in ((2, "What is he doing?"), (3, "He is reading.")):
        set_text(record, turn, text)
    record["messages"][0]["content"] = [
        {"type": "image", "image": scene_of(record)},
        {"type": "text", "text": "Where?"},
    ]
    record["messages"][1]["content"] = "On the left."


def blank(maker, record):
    save(Image.new("RGB", (160, 120), "black"), maker.root / scene_of(record))


def truncated(maker, record):
    path = maker.root / scene_of(record)
    path.write_bytes(path.read_bytes()[:-4000])


def without_boxes(maker, record):
    record["boxes"] = []
    set_text(record, 1, "On the left.")


def crop_without_box(maker, record):
    replace_photo(maker, record, open_scene(maker, record).crop((14, 18, 76, 104)), quality=80)
    without_boxes(maker, record)


def mirrored_crop(maker, record):
    crop = ImageOps.mirror(open_scene(maker, record).crop(BOX))
    replace_photo(maker, record, crop.resize((224, 336), Image.Resampling.BICUBIC), quality=85)


def square_crop(maker, record):
    replace_photo(maker, record, open_scene(maker, record).crop(BOX).resize((96, 96)), quality=85)


def padded_crop(maker, record):
    replace_photo(maker, record, open_scene(maker, record).crop((8, 10, 82, 114)), quality=85)


def smaller_copy(maker, record):
    replace_photo(maker, record, open_scene(maker, record).resize((96, 72), Image.Resampling.LANCZOS), quality=70)


def equal_photo(maker, record):
    photo = Image.open(maker.root / record["identities"][0]["images"][0])
    save(photo, maker.root / record["id"] / "again.bmp")
    record["identities"][0]["images"].append(f"{record['id']}/again.bmp")


def shared_photo(maker, record):
    record["identities"][1]["images"] = list(record["identities"][0]["images"])


def shots(maker, record):
    photo = record["identities"][0]["images"][0]
    record["meta"] = {
        "references": [{"image": photo, "shot": "film/7"}],
        "scenes": [{"image": scene_of(record), "shot": "film/7"}],
    }


def equal_boxes(maker, record):
    record["boxes"][1]["box"] = list(record["boxes"][0]["box"])


def second_name(name):
    def change(maker, record):
        record["identities"][1]["name"] = name
        record["boxes"].pop()
        set_text(record, 2, f"What is {name} doing?")
        set_text(record, 3, f"{name} is reading.")

    return change


FAULTS = {
    "json syntax": ("json", lambda maker, record: json.dumps(record)[:-1]),
    "a key twice": ("json", plant_text('"id":', '"id": "x", "id":')),
    "unknown field": ("record", plant_text('"identities"', '"identites"')),
    "unknown role": ("record", plant_text('"role": "user"', '"role": "human"')),
    "turns that do not alternate": ("record", plant(lambda _, r: r["messages"].pop(1))),
    "no answer": ("record", plant(lambda _, r: r["messages"].pop())),
    "identity source without identities": (
        "record",
        plant(lambda _, r: r.update(source="identity", identities=[])),
    ),
    "box of an image that is not shown": ("record", plant(lambda _, r: r["boxes"][0].update(image="else.png"))),
    "box of width and height": ("record", plant(lambda _, r: r["boxes"][0].update(box=[60, 60, 30, 50]))),
    "absolute path": ("record", plant(lambda _, r: r["identities"][0].update(images=["/kate.png"]))),
    "name that no text mentions": ("name_unmentioned", plant(unmentioned)),
    "name in another case": ("name_spelling", plant(lambda _, r: set_texts(r, "tom?", "tom reads."))),
    "names that are nearly the same": ("names_alike", plant(second_name("KATE"))),
    "description in place of a name": ("name_generic", plant(second_name("the man"))),
    "one person with two names": (
        "person_twice",
        plant(lambda _, r: r.update(meta={"people": {"Kate": "nm1", "Tom": "nm1"}})),
    ),
    "meta of an unknown name": ("meta", plant(lambda _, r: r.update(meta={"people": {"Ann": "nm1"}}))),
    "placeholder in a text": ("markup_in_text", plant(lambda _, r: set_text(r, 2, "What is Tom doing? <bbox>"))),
    "image without a question": (
        "question_missing",
        plant(lambda _, r: (r["messages"][0]["content"].pop(), set_text(r, 3, "Tom reads to Kate."))),
    ),
    "answer in the question": (
        "answer_in_question",
        plant(lambda _, r: set_texts(r, "Say: Tom is reading a long book.", "Tom is reading a long book.")),
    ),
    "box outside": ("box_outside", plant(lambda _, r: r["boxes"][0].update(box=[20, 25, 170, 100]))),
    "relative box": ("box_units", plant(lambda _, r: r["boxes"][0].update(box=[0.1, 0.2, 0.4, 0.8]))),
    "tiny box": ("box_small", plant(lambda _, r: r["boxes"][0].update(box=[20, 25, 23, 100]))),
    "box of the whole image": ("box_whole_image", plant(lambda _, r: r["boxes"][0].update(box=[0, 0, 160, 120]))),
    "two names with one box": ("boxes_equal", plant(equal_boxes)),
    "absent in words, there in boxes": ("absent_but_boxed", plant(lambda _, r: set_text(r, 1, "Not here."))),
    "missing image": ("image_missing", plant(lambda m, r: (m.root / scene_of(r)).unlink())),
    "truncated image": ("image_damaged", plant(truncated)),
    "image of one colour": ("image_blank", plant(blank)),
    "scene twice": (
        "image_repeated",
        plant(lambda _, r: r["messages"][0]["content"].append({"type": "image", "image": scene_of(r)})),
    ),
    "photo twice, in two files": ("reference_repeated", plant(equal_photo)),
    "photo of two identities": ("reference_shared", plant(shared_photo)),
    "reference is the scene": (
        "reference_is_scene",
        plant(lambda _, r: r["identities"][0].update(images=[scene_of(r)])),
    ),
    "reference has the pixels of the scene": (
        "reference_is_scene",
        plant(lambda m, r: replace_photo(m, r, open_scene(m, r))),
    ),
    "reference is a smaller copy of the scene": ("reference_like_scene", plant(smaller_copy)),
    "reference is cut out, mirrored, enlarged": ("reference_from_scene", plant(mirrored_crop)),
    "reference is cut out and made square": ("reference_from_scene", plant(square_crop)),
    "reference is cut out with a margin": ("reference_from_scene", plant(padded_crop)),
    "reference is cut out, and no box tells where": ("reference_from_scene", plant(crop_without_box)),
    "reference of the same shot": ("same_shot", plant(shots)),
    "meta of an image that is not there": (
        "meta",
        plant(lambda _, r: r.update(meta={"scenes": [{"image": "else.png", "shot": "film/7"}]})),
    ),
}
"""Fault -> check that finds it, and a function that returns the line of a record with the fault."""

TEST_FAULTS = {
    "question without false answers": ("choices", "qa_single", lambda _, r: r.pop("false_answers")),
    "number of an image that is not there": ("choices", "matching", lambda _, r: r.update(answer="Picture 3")),
    "target without references": ("target", "location", lambda _, r: r.update(target="Tom")),
    "target that is not asked for": (
        "target",
        "location",
        lambda _, r: r["messages"][0]["content"][1].update(text="\nWhere is she?"),
    ),
}


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return RecordSource(str(path))


def found_in(report, file):
    """(line, check) of all problems of a file."""
    return {(problem.line, problem.check) for problem in report.problems if problem.file == str(file)}


def test_all_planted_faults_are_found_by_file_and_line(tmp_path):
    maker = RecordMaker(tmp_path / "images")
    lines, expected = [], set()
    for number, (check, fault) in enumerate(FAULTS.values()):
        lines.append(json.dumps(maker.record(f"good{number}")))
        lines.append(fault(maker, maker.record(f"fault{number}")))
        expected.add((len(lines), check))
    first = maker.record("first")
    lines += [json.dumps(first), "", json.dumps(first)]
    expected |= {(len(lines), "id_repeated"), (len(lines), "record_repeated")}
    source = write_lines(tmp_path / "train.jsonl", lines)
    report = validate_records([source], num_workers=1)
    assert found_in(report, source.path) == expected
    assert len(FAULTS) >= 40
    assert report.files == {source.path: len(lines) - 1}
    assert report.num_errors == sum(problem.level == "error" for problem in report.problems)


def test_faults_of_evaluation_records(tmp_path):
    maker = RecordMaker(tmp_path / "images")
    lines, expected = [], set()
    for number, (check, task, change) in enumerate(TEST_FAULTS.values()):
        lines.append(json.dumps(maker.question(f"good{number}", task)))
        record = maker.question(f"fault{number}", task)
        change(maker, record)
        lines.append(json.dumps(record))
        expected.add((len(lines), check))
    lines += [json.dumps(maker.question("twice")), json.dumps(maker.question("twice") | {"answer": "Kate sleeps."})]
    expected.add((len(lines), "id_repeated"))
    source = write_lines(tmp_path / "test.jsonl", lines)
    report = validate_records([source], num_workers=1)
    # The scene of the second record with this id is written over the first one, so its pixels are the same.
    assert found_in(report, source.path) == expected
    assert report.num_warnings == 0


def test_good_files_pass_with_several_workers(tmp_path):
    maker = RecordMaker(tmp_path / "images")
    train = write_lines(tmp_path / "train.jsonl", [json.dumps(maker.record(f"{n}")) for n in range(12)])
    tasks = ("qa_single", "location", "matching")
    test = write_lines(tmp_path / "test.jsonl", [json.dumps(maker.question(f"t{n}", tasks[n % 3])) for n in range(9)])
    report = validate_records([train], [test], num_workers=2)
    assert report.problems == []
    assert report.num_images == 12 * 3 + 9 * 2
    assert report.people_known == (0, 21)


def test_what_training_and_held_out_records_share(tmp_path):
    maker = RecordMaker(tmp_path / "images")
    train = [maker.record(f"train{n}") for n in range(6)]
    train[4]["meta"] = {"people": {"Kate": "nm7", "Tom": "nm8"}}
    train[5]["meta"] = {"scenes": [{"image": scene_of(train[5]), "shot": "film/12"}], "images": ["coco:7"]}
    test = [maker.question(f"test{n}") for n in range(8)]
    test[1]["identities"][0]["images"] = list(train[0]["identities"][0]["images"])
    again = save(Image.open(maker.root / scene_of(train[1])), maker.root / "again.bmp")
    test[2]["messages"][0]["content"][0]["image"] = test[2]["boxes"][0]["image"] = again.name
    test[2]["boxes"].pop()
    small = open_scene(maker, train[2]).resize((120, 90), Image.Resampling.LANCZOS)
    save(ImageOps.mirror(small), maker.root / "small.jpg", quality=80)
    test[3]["messages"][0]["content"][0]["image"] = "small.jpg"
    test[3]["boxes"] = []
    test[4]["meta"] = {"people": {"Kate": "nm7"}}
    test[5]["meta"] = {"references": [{"image": test[5]["identities"][0]["images"][0], "shot": "film/12"}]}
    test[7]["meta"] = {"images": ["coco:6", "coco:7"]}
    scene = scene_of(train[3])
    test[6]["messages"][0]["content"] = [{"type": "image", "image": scene}, {"type": "text", "text": "Where is  Kate?"}]
    test[6]["boxes"] = []
    sources = [
        write_lines(tmp_path / f"{name}.jsonl", map(json.dumps, records))
        for name, records in (("train", train), ("test", test))
    ]
    report = validate_records(sources[:1], sources[1:], num_workers=1)
    assert found_in(report, sources[1].path) == {
        (2, "image_in_both"),
        (2, "person_in_both"),
        (3, "image_in_both"),
        (4, "similar_image_in_both"),
        (5, "person_in_both"),
        (6, "shot_in_both"),
        (7, "image_in_both"),
        (7, "record_in_both"),
        (8, "image_in_both"),
    }
    assert found_in(report, sources[0].path) == set()
    names = validate_records(sources[:1], sources[1:], names_are_people=True, num_workers=1)
    assert names.counts["person_in_both"] == len(test) + 1, "Kate is in all records; one of them has her photo as well"


def test_other_formats_and_files_without_records(tmp_path):
    save(textured(1), tmp_path / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
    records = [
        {"image": "a.png", "conversations": turns},
        {"conversations": turns},
        {"image": "b.png", "conversations": turns},
    ]
    text = json.dumps(records, indent=1)
    (tmp_path / "llava.json").write_text(text)
    (tmp_path / "empty.jsonl").write_text("\n")
    sources = [RecordSource(str(tmp_path / "llava.json"), reader="llava"), RecordSource(str(tmp_path / "empty.jsonl"))]
    report = validate_records(sources, num_workers=1)
    lines = text.splitlines()
    second, third = (number for number, line in enumerate(lines, 1) if line == " {" and number > 2)
    assert found_in(report, sources[0].path) == {(second, "placeholders"), (third, "image_missing")}
    assert [problem.where for problem in report.problems][:1] == [f"{sources[0].path}[1]"]
    assert found_in(report, sources[1].path) == {(None, "no_records")}


def test_records_that_the_processor_cannot_encode(tmp_path):
    def num_tokens(sample):
        if sample.id == "1":
            raise DataError("3000 tokens are more than max_length=2048.", kind="length")
        return 100

    maker = RecordMaker(tmp_path / "images")
    source = write_lines(tmp_path / "train.jsonl", [json.dumps(maker.record(f"{n}")) for n in range(3)])
    report = validate_records([source], num_tokens=num_tokens, num_workers=1)
    assert found_in(report, source.path) == {(2, "encoding")}


def test_one_more_word_in_the_file_or_a_distractor_is_no_fault(tmp_path):
    """A name may be introduced on purpose, if ``meta.distractors`` says so; otherwise it is a warning."""
    maker = RecordMaker(tmp_path / "images")
    record, listed = maker.record("0"), maker.record("1")
    for each in (record, listed):
        each["identities"].append({"name": "Ann", "images": [maker.image(f"{each['id']}/ann.png")]})
    listed["meta"] = {"distractors": ["Ann"]}
    source = write_lines(tmp_path / "train.jsonl", map(json.dumps, (record, listed)))
    report = validate_records([source], num_workers=1)
    assert [(problem.line, problem.check, problem.level) for problem in report.problems] == [
        (1, "name_unmentioned", "warning")
    ]


@pytest.mark.parametrize("quality", [50, 90])
@pytest.mark.parametrize("area", [(20, 25, 70, 100), (60, 10, 150, 110), (0, 0, 80, 120), (100, 70, 140, 115)])
def test_crops_are_found_and_other_photos_are_not(tmp_path, area, quality):
    """At any scale and quality, mirrored or not, with a box near the crop or without."""
    scene = textured(5, (320, 240))
    edges = tuple(2 * edge for edge in area)
    for number, (scale, mirror) in enumerate(((1.0, False), (1.7, True), (0.5, False))):
        crop = scene.crop(edges)
        crop = ImageOps.mirror(crop) if mirror else crop
        crop = crop.resize([round(side * scale) for side in crop.size], Image.Resampling.BICUBIC)
        crop = Image.open(save(crop, tmp_path / f"{number}.jpg", quality=quality))
        box = tuple(edge + shift for edge, shift in zip(edges, (6, -4, 10, 5), strict=True))
        for near in (box, None):
            place = find_crop(small_grey(crop), small_grey(scene), near, small_grey(scene).shape[0] / scene.height)
            assert is_cut_from(crop, scene, place), (scale, mirror, near)
            other = textured(6, (320, 240))
            place = find_crop(small_grey(crop), small_grey(other), near, small_grey(other).shape[0] / other.height)
            assert place is None or not is_cut_from(crop, other, place)


def test_copies_of_images(tmp_path):
    image = textured(3, (200, 150))
    copy = Image.open(save(image.resize((90, 68)), tmp_path / "copy.jpg", quality=60))
    changed = image.copy()
    changed.paste(textured(4, (60, 60)), (70, 40))
    assert is_same_image(small_grey(image), small_grey(copy))
    assert is_same_image(small_grey(image), small_grey(ImageOps.mirror(copy)))
    assert not is_same_image(small_grey(image), small_grey(changed)), "another person at the same place"
    assert not is_same_image(small_grey(image), small_grey(textured(4, (200, 150))))


def test_pixels_not_files_make_images_equal(tmp_path):
    image = textured(2)
    for name in ("a.png", "b.bmp"):
        save(image, tmp_path / name)
    first, second = (facts_of(tmp_path, name) for name in ("a.png", "b.bmp"))
    assert first.digest == second.digest
    turned = facts_of(save(image.transpose(Image.Transpose.ROTATE_90), tmp_path / "c.png").parent, "c.png")
    assert turned.digest != first.digest
    assert (first.size, turned.size) == ((120, 160), (160, 120))
    assert np.array_equal(first.grey, second.grey)


def test_command_writes_a_report_and_returns_whether_there_are_errors(tmp_path, capsys):
    maker = RecordMaker(tmp_path / "images")
    good = write_lines(tmp_path / "good.jsonl", [json.dumps(maker.record(f"{n}")) for n in range(3)])
    bad = maker.record("bad")
    bad["boxes"][0]["box"][2] = 999
    faulty = write_lines(tmp_path / "faulty.jsonl", [json.dumps(bad)])
    tiny = maker.record("tiny")
    tiny["boxes"][0]["box"] = [20, 25, 23, 100]
    warned = write_lines(tmp_path / "warned.jsonl", [json.dumps(tiny)])
    assert main(["data", "validate", good.path, "--workers", "1"]) == 0
    assert main(["data", "validate", warned.path, "--workers", "1"]) == 0
    assert main(["data", "validate", warned.path, "--workers", "1", "--strict"]) == 1
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert main(["data", "validate", good.path, faulty.path, "--workers", "1", "--json", str(report)]) == 1
    assert f"{faulty.path}:1: error: box_outside: box [20, 25, 999, 100] of 'Kate'" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert (content["errors"], content["counts"], content["files"][good.path]) == (1, {"box_outside": 1}, 3)
    assert content["problems"][0] | {"message": ""} == {
        "check": "box_outside",
        "level": "error",
        "file": faulty.path,
        "line": 1,
        "where": f"{faulty.path}:1",
        "id": "bad",
        "message": "",
    }
    assert main(["data", "validate", str(tmp_path / "none.jsonl")]) == 2
    assert main(["data", "validate", faulty.path, "--no-images"]) == 0


def test_help_lists_all_checks(capsys):
    with pytest.raises(SystemExit):
        main(["data", "validate", "--help"])
    text = capsys.readouterr().out
    assert all(check in text for check in CHECKS)


def test_two_photos_of_one_moment_are_not_the_same_pixels():
    """They agree nearly everywhere, but not in all parts."""
    scene = textured(7, (200, 200))
    crop = scene.crop((40, 40, 160, 160))
    for place, seed in (((10, 10), 21), ((75, 70), 22), ((15, 75), 23)):
        crop.paste(Image.blend(crop.crop((*place, place[0] + 35, place[1] + 35)), textured(seed, (35, 35)), 0.5), place)
    place = find_crop(small_grey(crop), small_grey(scene), (40, 40, 160, 160), small_grey(scene).shape[0] / 200)
    assert place.correlation > 0.9
    assert not is_cut_from(crop, scene, place)
    assert is_cut_from(scene.crop((40, 40, 160, 160)), scene, place)
