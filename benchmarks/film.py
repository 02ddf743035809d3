"""``idavlm film`` on a drawn film whose truth is known: who is in the image, where, and how long it takes.

    python -m benchmarks.film --model idavlm-tiny --seconds 480

Characters walk through drawn scenes, up to four at a time, with cuts. Eight characters play; six of them are introduced
by three photos each. The video is written as MP4, analysed, and compared with the truth.

A second of the film counts as one decision per introduced character. The character is present if at least half of the
figure is in the image at some sampled time of that second. Seconds in which only smaller parts are visible do not
count. A track is right if the character is there in most of its frames. IoU compares the boxes with the true boxes.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from idavlm.datasets.characters.film import FilmFrame, draw_film, draw_photos
from idavlm.evaluation import load_checkpoint
from idavlm.inference.film import Track, analyse_film, read_cast
from idavlm.models.boxes import box_iou
from idavlm.utils import describe_machine, markdown_table

CAST = {f"test-{number}": name for number, name in enumerate(("Kate", "Tom", "Alice", "Bob", "Mary", "Jack"))}
"""Name of each character that is introduced."""

STRANGERS = ("test-6", "test-7")
"""Characters that appear and are never introduced."""

Truth = list[tuple[float, dict[str, tuple[tuple[float, ...], float]]]]
"""Time of each image, and box and visible share of each named character in it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="idavlm-tiny", help="checkpoint with an ID-Former")
    parser.add_argument("--out", type=Path, default=Path("runs/film"), help="folder of the film and the results")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--fps", type=float, default=2.0, help="frames that are looked at per second")
    parser.add_argument("--images-per-second", type=float, default=8.0, help="images per second of the video")
    parser.add_argument("--photos", type=int, default=3, help="reference photos of each character")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--smoothing", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(arguments.out / "results", ignore_errors=True)
    video = arguments.out / "film.mp4"
    truth = write_drawn_film(
        video, seconds=arguments.seconds, images_per_second=arguments.images_per_second, seed=arguments.seed
    )
    for identity, name in CAST.items():
        draw_photos(identity, arguments.out / "cast" / name, count=arguments.photos, seed=arguments.seed)

    model, processor = load_checkpoint(arguments.model)
    encoded = count_encoded_images(model)
    start = time.perf_counter()
    tracks = analyse_film(
        model.eval(),
        processor,
        video,
        read_cast(arguments.out / "cast"),
        arguments.out / "results",
        frames_per_second=arguments.fps,
        threshold=arguments.threshold,
        smoothing=arguments.smoothing,
    )
    seconds = time.perf_counter() - start
    result = json.loads((arguments.out / "results" / "film.json").read_text())
    scores = {
        **presence_scores(tracks, truth, arguments.seconds, arguments.fps),
        **track_scores(tracks, truth),
        "shots found": len(result["shots"]),
        "frames": result["num_frames"],
        "images encoded per frame": (sum(encoded) - len(CAST) * arguments.photos) / result["num_frames"],
        "frames per second": result["num_frames"] / seconds,
    }
    print(describe_machine(model.device))
    print(markdown_table(["measure", "value"], [[name, f"{value:.3g}"] for name, value in scores.items()]))
    print(arguments.out / "results" / "film.html")


def write_drawn_film(path: Path, *, seconds: float, images_per_second: float, seed: int = 0, size: int = 256) -> Truth:
    """Write a drawn film of the cast and of strangers as MP4, and return the truth about the cast."""
    frames = draw_film([*CAST, *STRANGERS], seconds=seconds, images_per_second=images_per_second, size=size, seed=seed)
    truth: Truth = []
    write_video(path, _remembered(frames, truth), images_per_second=images_per_second)
    return truth


def _remembered(frames: Iterable[FilmFrame], truth: Truth) -> Iterator[Image.Image]:
    for frame in frames:
        truth.append((frame.time, {CAST[key]: shown for key, shown in frame.boxes.items() if key in CAST}))
        yield frame.image


def write_video(
    path: Path,
    images: Iterable[Image.Image],
    *,
    images_per_second: float,
    bit_rate: int = 4_000_000,
    gop_size: int = 12,
) -> Path:
    """Encode images of one size as MPEG-4 video with a key frame every ``gop_size`` images."""
    import av

    images = iter(images)
    first = next(images)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=round(images_per_second))
        stream.width, stream.height = first.size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate, stream.gop_size = bit_rate, gop_size
        for image in chain([first], images):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def count_encoded_images(model) -> list[int]:
    """Return a list to which the vision tower adds the number of images of each call."""
    counts: list[int] = []
    model.vision_tower.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    return counts


def presence_scores(tracks: Sequence[Track], truth: Truth, seconds: float, fps: float) -> dict[str, float]:
    """Precision and recall of presence per second and person."""
    # Only the images that were sampled can be known.
    sampled = [
        shown for number, (_, shown) in enumerate(truth) if number % max(1, round(len(truth) / seconds / fps)) == 0
    ]
    of_second = np.array_split(np.arange(len(sampled)), round(seconds))
    right = wrong = missed = 0
    for second, numbers in enumerate(of_second):
        for name in CAST.values():
            visible = max((sampled[number].get(name, ((), 0.0))[1] for number in numbers), default=0.0)
            found = any(track.name == name and track.start < second + 1 and track.end > second for track in tracks)
            right += found and visible >= 0.5
            wrong += found and visible == 0
            missed += not found and visible >= 0.5
    return {"presence precision": right / max(right + wrong, 1), "presence recall": right / max(right + missed, 1)}


def track_scores(tracks: Sequence[Track], truth: Truth) -> dict[str, float]:
    """Share of tracks of the right character, and of their boxes with enough overlap."""
    times = np.array([time for time, _ in truth])
    right, ious = [], []
    for track in tracks:
        inside = [shown for time, shown in truth if track.start <= time < track.end]
        right.append(np.mean([track.name in shown for shown in inside]) > 0.5)
        for moment, box in track.boxes:
            shown = truth[int(np.abs(times - moment).argmin())][1]
            if track.name in shown:
                ious.append(box_iou(box, shown[track.name][0]))
    values = np.array(ious)
    return {
        "tracks": len(tracks),
        "tracks of the right character": float(np.mean(right)),
        "boxes with IoU >= 0.3": float((values >= 0.3).mean()),
        "boxes with IoU >= 0.5": float((values >= 0.5).mean()),
        "mean IoU": float(values.mean()),
    }


if __name__ == "__main__":
    main()
