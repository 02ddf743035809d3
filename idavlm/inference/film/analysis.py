"""Who appears when and where in a film: frames to detections, tracks, JSON, subtitles and a page. Resumable."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from idavlm.inference.film.detection import Detection, detect
from idavlm.inference.film.frames import Film
from idavlm.inference.film.page import write_page
from idavlm.inference.film.subtitles import subtitles
from idavlm.inference.film.tracks import FrameDetections, Track, find_tracks
from idavlm.models import IdentityBank
from idavlm.utils import write_text
from idavlm.utils.files import append_lines, drop_torn_line

DETECTIONS, RESULT, SUBTITLES, PAGE = "detections.jsonl", "film.json", "film.vtt", "film.html"
"""Files that :func:`analyse_film` writes."""

_WRITE_EVERY = 20  # frames; what a killed run loses at most


def analyse_film(
    model,
    processor,
    source: str | Path,
    cast: Mapping[str, Sequence[Any]],
    out: str | Path,
    *,
    frames_per_second: float = 2.0,
    threshold: float = 0.9,
    cut_threshold: float = 0.15,
    smoothing: float = 3.0,
    progress: bool = True,
) -> list[Track]:
    """Find out who appears when and where in a film.

    The photos of the cast are encoded once, into an :class:`idavlm.IdentityBank` that is never written. Each sampled
    frame is encoded once, however many people are looked for. The detections are appended to ``detections.jsonl``; a
    run that was interrupted continues after the last one. Other thresholds reuse them.

    Args:
        model: an :class:`idavlm.IDAVLMForConditionalGeneration` with an ID-Former, or a model with an attached one.
        processor: its processor.
        source: a video file, or a folder of images.
        cast: reference photos of each person by name; see :func:`read_cast`.
        out: folder of the results.
        frames_per_second: number of frames that are looked at per second of a video.
        threshold, cut_threshold, smoothing: see :func:`find_tracks`.
        progress: show a progress bar.

    Returns:
        The tracks. ``out`` then holds ``film.json``, ``film.vtt`` (WebVTT subtitles), and ``film.html``.

    Raises:
        ValueError: an option is out of range; ``source`` is no film; ``out`` holds the results of another film, cast,
            model or frame rate.
    """
    for name, value in {"frames_per_second": frames_per_second, "smoothing": smoothing}.items():
        if not 0 <= value < float("inf") or (name == "frames_per_second" and value == 0):
            raise ValueError(f"{name}={value} must be a positive number.")
    for name, value in {"threshold": threshold, "cut_threshold": cut_threshold}.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} must lie between 0 and 1.")
    film, out = Film(source, frames_per_second), Path(out)
    bank = IdentityBank(model, processor)
    for name, photos in cast.items():
        bank.add(name, photos)

    frames = _detections(bank, film, out / DETECTIONS, progress=progress)
    if not frames:
        raise ValueError(f"{film.source} has no frame; pass a video file or a folder of images.")
    tracks, shots = find_tracks(
        frames,
        frame_duration=1 / frames_per_second,
        threshold=threshold,
        cut_threshold=cut_threshold,
        smoothing=smoothing,
    )
    result = {
        "source": str(film.source),
        "frames_per_second": frames_per_second,
        "num_frames": len(frames),
        "settings": {"threshold": threshold, "cut_threshold": cut_threshold, "smoothing": smoothing},
        "names": list(cast),
        "shots": shots,
        "tracks": [asdict(track) for track in tracks],
    }
    write_text(out / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_text(out / SUBTITLES, subtitles(tracks))
    write_page(out / PAGE, film, frames, tracks, shots, list(cast))
    return tracks


def _detections(bank: IdentityBank, film: Film, file: Path, *, progress: bool) -> list[FrameDetections]:
    """Detections of all frames: those in the file, and those of the frames after them, which are appended."""
    drop_torn_line(file)
    header, done = _header(bank, film), []
    if file.exists() and file.stat().st_size:
        first, *lines = file.read_text(encoding="utf-8").splitlines()
        found = json.loads(first)
        different = [key for key in header if found.get(key) != header[key]]
        if different:
            raise ValueError(
                f"{file} holds detections of another {', '.join(different)}; choose another output folder, or delete "
                "the file to start again."
            )
        done = [_from_json(json.loads(line)) for line in lines]
    else:
        append_lines(file, [json.dumps(header, ensure_ascii=False)])

    start = done[-1].number + 1 if done else 0
    before = _small(film.frame(done[-1].number).image) if done else None
    waiting: list[FrameDetections] = []
    with tqdm(total=film.num_frames, initial=start, desc="frames", disable=not progress) as bar:
        for frame in film.frames(start):
            small = _small(frame.image)
            change = 1.0 if before is None else float(np.abs(small - before).mean())
            waiting.append(FrameDetections(frame.number, frame.time, change, detect(bank, frame.image)))
            before = small
            if len(waiting) == _WRITE_EVERY:
                append_lines(file, [_to_json(detections) for detections in waiting])
                done += waiting
                waiting = []
            bar.update(frame.number + 1 - bar.n)
    append_lines(file, [_to_json(detections) for detections in waiting])
    return done + waiting


def _header(bank: IdentityBank, film: Film) -> dict[str, Any]:
    """What the detections depend on."""
    features = hashlib.sha256()
    for photos in bank.select().photos:
        for photo in photos:
            features.update(photo.features.float().cpu().numpy().tobytes())
    return {
        "film": [str(film.source.resolve()), len(film.files) or film.source.stat().st_size],
        "frame rate": film.frames_per_second,
        "cast": list(bank.names),
        "model or photos": features.hexdigest(),
    }


def _small(image: Image.Image) -> np.ndarray:
    """The image as 32 x 32 values in 0..1, for its difference to the next one."""
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX), np.float32) / 255


def _to_json(frame: FrameDetections) -> str:
    people = {
        name: [round(person.score, 4), person.box and [round(edge, 1) for edge in person.box]]
        for name, person in frame.people.items()
    }
    content = {"frame": frame.number, "time": round(frame.time, 4), "change": round(frame.change, 4), "people": people}
    return json.dumps(content, ensure_ascii=False)


def _from_json(content: dict[str, Any]) -> FrameDetections:
    people = {name: Detection(score, box and tuple(box)) for name, (score, box) in content["people"].items()}
    return FrameDetections(content["frame"], content["time"], content["change"], people)
