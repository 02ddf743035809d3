"""Films: sampled frames, detections, tracks, subtitles, the page, and the command."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.film import write_video
from idavlm.datasets.characters.film import draw_film, draw_photos
from idavlm.inference.film import Detection, Film, FrameDetections, Track, analyse_film, find_tracks, read_cast
from idavlm.inference.film import analysis as film_analysis
from idavlm.inference.film.detection import _detection, detect
from idavlm.inference.film.subtitles import subtitles
from idavlm.inference.film.tracks import find_shots, smooth_boxes, smooth_presence
from idavlm.models import IdentityBank
from tests.small_models import small_model, small_processor

av = pytest.importorskip("av", reason="films need PyAV")


def grey(value, size=(64, 48)):
    return Image.new("RGB", size, (value, value, value))


@pytest.fixture
def video(tmp_path):
    """8 seconds of 4 images each; the brightness of an image is 7.5 times its number."""
    images = [grey(round(7.5 * number)) for number in range(32)]
    return write_video(tmp_path / "film.mp4", images, images_per_second=4, bit_rate=8_000_000, gop_size=5)


def brightness(frame):
    return round(float(np.asarray(frame.image).mean()) / 7.5)


@pytest.mark.parametrize(("rate", "expected"), [(1.0, [0, 4, 8, 12, 16, 20, 24, 28]), (4.0, list(range(32)))])
def test_a_video_is_sampled_at_regular_times(video, rate, expected):
    film = Film(video, rate)
    frames = list(film.frames())
    assert film.num_frames == len(expected)
    assert [brightness(frame) for frame in frames] == expected
    assert [frame.time for frame in frames] == [number / 4 for number in expected]


def test_a_rate_that_does_not_divide_that_of_the_video(video):
    frames = list(Film(video, 3.0).frames())
    assert [frame.number for frame in frames] == list(range(24))
    times = [frame.time for frame in frames]
    assert all(number / 3 - 1e-3 <= time < (number + 1) / 3 for number, time in enumerate(times))


def test_a_video_of_fewer_images_than_frames_gives_each_image_once(video):
    frames = list(Film(video, 10.0).frames())
    assert [brightness(frame) for frame in frames] == list(range(32))
    assert [frame.number for frame in frames] == [int(number * 2.5) for number in range(32)]


@pytest.mark.parametrize("start", [1, 5, 7])
def test_frames_from_the_middle_are_those_of_a_whole_run(video, start):
    film = Film(video, 1.0)
    whole = [(frame.number, frame.time, brightness(frame)) for frame in film.frames()]
    assert [(frame.number, frame.time, brightness(frame)) for frame in film.frames(start)] == whole[start:]
    assert brightness(film.frame(start)) == whole[start][2]


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (10, 2, 1):
        grey(number * 10).save(tmp_path / f"shot{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    frames = list(Film(tmp_path, 2.0).frames())
    assert [int(np.asarray(frame.image).mean()) for frame in frames] == [10, 20, 100]
    assert [frame.time for frame in frames] == [0, 0.5, 1]


def test_what_is_no_film_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Film(tmp_path / "missing.mp4", 1.0)
    with pytest.raises(ValueError, match="holds no image"):
        Film(tmp_path, 1.0)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text\.mp4 is no video"):
        Film(tmp_path / "text.mp4", 1.0)


def test_a_damaged_video_says_where(video, tmp_path):
    content = bytearray(video.read_bytes())
    with av.open(str(video)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.pos is not None]
    damaged = tmp_path / "cut.mp4"
    # The index of an MP4 file lies at its end, so that packets can be emptied without losing it.
    content[positions[8] : positions[-1]] = bytes(positions[-1] - positions[8])
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"cut\.mp4 is damaged after .* s"):
        list(Film(damaged, 4.0).frames())


def test_a_cast_is_folders_or_single_photos(tmp_path):
    (tmp_path / "Kate").mkdir()
    for file in ("Kate/b.png", "Kate/a.png", "Tom.png"):
        grey(9).save(tmp_path / file)
    (tmp_path / ".hidden").mkdir()
    assert read_cast(tmp_path) == {
        "Kate": [tmp_path / "Kate/a.png", tmp_path / "Kate/b.png"],
        "Tom": [tmp_path / "Tom.png"],
    }
    grey(9).save(tmp_path / "Kate.png")
    with pytest.raises(ValueError, match="has Kate twice"):
        read_cast(tmp_path)
    (tmp_path / "Kate.png").unlink()
    (tmp_path / "Empty").mkdir()
    with pytest.raises(ValueError, match="Empty holds no image"):
        read_cast(tmp_path)


def test_the_box_follows_the_region_of_the_best_patch():
    share = torch.zeros(8, 8)
    share[2:5, 3:5] = 1.0
    share[7, 0] = 0.9  # another region
    found = _detection(share, (0.0, 0.0, 1.0, 1.0), (160, 80))
    assert found.box == pytest.approx((60, 20, 100, 50))
    assert found.score == pytest.approx(1.0)
    share[2:5, 2] = 0.5  # half a patch
    assert _detection(share, (0.0, 0.0, 1.0, 1.0), (160, 80)).box == pytest.approx((50, 20, 100, 50))
    # A centre crop of the left and right quarters: the patches cover the middle half of the image.
    assert _detection(share, (0.25, 0.0, 0.75, 1.0), (160, 80)).box == pytest.approx((65, 20, 90, 50))
    assert _detection(share * 0.3, (0.0, 0.0, 1.0, 1.0), (160, 80)).box is None


def frames_of(scores, *, cuts=(0,), name="Kate"):
    return [
        FrameDetections(
            number, number / 2, 1.0 if number in cuts else 0.01, {name: Detection(score, (number, 0, number + 9, 9))}
        )
        for number, score in enumerate(scores)
    ]


def test_shots_start_where_the_image_changes():
    frames = frames_of([0] * 6, cuts=(0, 2, 5))
    assert find_shots(frames, 0.15) == [range(2), range(2, 5), range(5, 6)]


def test_smoothing_bridges_single_frames():
    scores = [0.1, 0.1, 0.95, 0.1, 0.1, 0.9, 0.9, 0.4, 0.9, 0.9]
    assert [index for index, state in enumerate(smooth_presence(scores, 0.5, 0)) if state] == [2, 5, 6, 8, 9]
    assert [index for index, state in enumerate(smooth_presence(scores, 0.5, 3)) if state] == [5, 6, 7, 8, 9]
    assert smooth_presence([0.9] * 4, 0.95, 3) == [False] * 4
    assert smooth_presence([], 0.5, 3) == []


def test_smoothing_finds_the_most_likely_sequence():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.uniform(0.02, 0.98, 7)
        odds = np.log(scores / (1 - scores))

        def value(states, odds=odds):
            changes = sum(first != second for first, second in itertools.pairwise(states))
            return sum(odd for odd, state in zip(odds, states, strict=True) if state) - 2.0 * changes

        every = [[bool(code >> bit & 1) for bit in range(7)] for code in range(2**7)]
        assert value(smooth_presence(scores.tolist(), 0.5, 2.0)) == pytest.approx(max(map(value, every)))


def test_tracks_end_at_cuts():
    frames = frames_of([0.9] * 4 + [0.05] * 3 + [0.9] * 3, cuts=(0, 2))
    tracks, shots = find_tracks(frames, frame_duration=0.5, threshold=0.5, cut_threshold=0.15, smoothing=1)
    assert [(track.start, track.end) for track in tracks] == [(0, 1), (1, 2), (3.5, 5)]
    assert shots == [(0, 1), (1, 5)]
    assert [time for time, _ in tracks[2].boxes] == [3.5, 4, 4.5]


def test_boxes_are_smoothed_over_three_frames():
    boxes = [(0.0, (0, 0, 10, 10)), (0.5, (50, 0, 60, 10)), (1.0, None), (1.5, (2, 0, 12, 10))]
    assert smooth_boxes(boxes)[1] == (0.5, (2, 0, 12, 10))
    assert [time for time, _ in smooth_boxes(boxes)] == [0.0, 0.5, 1.5]


def test_subtitles():
    tracks = [Track("Tom", 0, 2.5, 1), Track("Kate", 1, 2.5, 1), Track("Kate", 2.5, 3, 1), Track("A<b>", 3661, 3662, 1)]
    assert subtitles(tracks) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nTom\n\n00:00:01.000 --> 00:00:02.500\nKate, Tom\n\n"
        "00:00:02.500 --> 00:00:03.000\nKate\n\n01:01:01.000 --> 01:01:02.000\nA&lt;b&gt;\n"
    )


@pytest.fixture(scope="module")
def model_and_processor():
    processor = small_processor()
    return small_model(processor, num_identity_heads=1), processor


@pytest.fixture
def cast(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("Kate", "Tom"):
        (tmp_path / "cast" / name).mkdir(parents=True)
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "cast" / name / "1.png")
    return read_cast(tmp_path / "cast")


def test_a_frame_is_encoded_once_for_the_whole_cast(model_and_processor, cast, video, tmp_path):
    model, processor = model_and_processor
    counts = []
    hook = model.vision_tower.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    analyse_film(model, processor, video, cast, tmp_path / "out", frames_per_second=1, progress=False)
    hook.remove()
    assert sum(counts) == 8 + 2


def test_an_interrupted_run_continues(model_and_processor, cast, video, tmp_path, monkeypatch):
    model, processor = model_and_processor
    analyse_film(model, processor, video, cast, tmp_path / "whole", frames_per_second=4, progress=False)

    looked_at = []

    def stops(bank, image):
        looked_at.append(1)
        if len(looked_at) == 27:
            raise KeyboardInterrupt
        return detect(bank, image)

    monkeypatch.setattr(film_analysis, "detect", stops)
    arguments = (model, processor, video, cast, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        analyse_film(*arguments, frames_per_second=4, progress=False)
    with (tmp_path / "out/detections.jsonl").open("a") as file:
        file.write('{"frame": 20, "tim')  # a line that was cut off
    looked_at[:] = [0] * 100
    analyse_film(*arguments, frames_per_second=4, progress=False)
    assert len(looked_at) - 100 == 32 - 20
    for file in ("detections.jsonl", "film.json", "film.vtt", "film.html"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    # Other thresholds look at no frame again.
    analyse_film(*arguments, frames_per_second=4, threshold=0.2, progress=False)
    assert len(looked_at) - 100 == 32 - 20


def test_results_of_another_run_are_not_mixed(model_and_processor, cast, video, tmp_path):
    model, processor = model_and_processor
    analyse_film(model, processor, video, cast, tmp_path / "out", frames_per_second=1, progress=False)
    with pytest.raises(ValueError, match="detections of another frame rate"):
        analyse_film(model, processor, video, cast, tmp_path / "out", frames_per_second=2, progress=False)
    with pytest.raises(ValueError, match="detections of another cast, model or photos"):
        analyse_film(
            model, processor, video, {"Kate": cast["Kate"]}, tmp_path / "out", frames_per_second=1, progress=False
        )


def test_options_out_of_range_are_errors(model_and_processor, cast, video, tmp_path):
    for options in ({"threshold": 1.0}, {"cut_threshold": 0}, {"frames_per_second": 0}, {"smoothing": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            analyse_film(*model_and_processor, video, cast, tmp_path / "out", progress=False, **options)


def test_the_page_names_everybody_and_escapes(model_and_processor, cast, video, tmp_path):
    cast = {"Kate & <b>": cast["Kate"], "Tom": cast["Tom"]}
    tracks = analyse_film(
        *model_and_processor, video, cast, tmp_path, frames_per_second=1, threshold=0.02, progress=False
    )
    page = (tmp_path / "film.html").read_text()
    assert "Kate &amp; &lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<figure>") == len(tracks)
    result = json.loads((tmp_path / "film.json").read_text())
    assert result["names"] == list(cast)
    assert len(result["tracks"]) == len(tracks)


def test_drawn_films_are_reproducible_and_hold_the_truth():
    first, second = (list(draw_film(["test-0", "test-1"], seconds=6, images_per_second=2, seed=3)) for _ in range(2))
    assert len(first) == 12
    for one, other in zip(first, second, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one.boxes == other.boxes
    boxes = [box for frame in first for box, _ in frame.boxes.values()]
    assert boxes
    assert all(0 <= box[0] < box[2] <= 256 and 0 <= box[1] < box[3] <= 256 for box in boxes)


def test_the_command(tmp_path, video):
    processor = small_processor()
    model = small_model(processor)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    draw_photos("test-0", tmp_path / "cast" / "Kate", count=2, size=64)
    command = [sys.executable, "-m", "idavlm.cli.main", "film", str(video), "--cast", str(tmp_path / "cast")]
    command += ["--out", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--fps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Kate: " in done.stdout
    assert (tmp_path / "out/film.html").is_file()
    wrong = subprocess.run([*command[:-1], "0"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "frames_per_second=0" in wrong.stderr


def test_detections_cover_the_whole_bank(model_and_processor, cast):
    model, processor = model_and_processor
    bank = IdentityBank(model, processor)
    for name, photos in cast.items():
        bank.add(name, photos)
    found = detect(bank, grey(120))
    assert set(found) == {"Kate", "Tom"}
    assert all(0 <= person.score <= 1 for person in found.values())
