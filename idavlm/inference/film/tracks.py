"""From detections in single frames to who appears when: shots, presence smoothed over each shot, and tracks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from idavlm.inference.film.detection import Box, Detection


@dataclass(frozen=True)
class FrameDetections:
    """What was seen in one frame.

    Attributes:
        number, time: see :class:`Frame`.
        change: mean absolute difference of the image to that of the frame before, 0..1; 1 for the first frame.
        people: a detection per person of the cast.
    """

    number: int
    time: float
    change: float
    people: dict[str, Detection]


@dataclass(frozen=True)
class Track:
    """One appearance of one person within one shot.

    Attributes:
        name: the person.
        start, end: seconds. ``end`` is the time of the frame after the last one.
        boxes: ``(time, box)`` of each frame in which the person was located.
        score: mean score of the frames.
    """

    name: str
    start: float
    end: float
    score: float
    boxes: list[tuple[float, Box]] = field(default_factory=list)


def find_shots(frames: Sequence[FrameDetections], cut_threshold: float) -> list[range]:
    """Split frames into shots: a new one starts where the image changes by more than ``cut_threshold``."""
    starts = [index for index, frame in enumerate(frames) if index == 0 or frame.change > cut_threshold]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(frames)], strict=True)]


def find_tracks(
    frames: Sequence[FrameDetections],
    *,
    frame_duration: float,
    threshold: float,
    cut_threshold: float,
    smoothing: float,
) -> tuple[list[Track], list[tuple[float, float]]]:
    """Find the appearances of each person, and the shots.

    Args:
        frames: detections in the order of the film.
        frame_duration: seconds between two sampled frames.
        threshold: score from which a single frame speaks for the presence of a person.
        cut_threshold: see :func:`find_shots`.
        smoothing: how much evidence, in units of log odds, a change between present and absent within a shot needs. 0
            decides about each frame alone.

    Returns:
        Tracks sorted by their start and by name; start and end of each shot in seconds.
    """
    tracks, shots = [], []
    for shot in find_shots(frames, cut_threshold):
        of_shot = [frames[index] for index in shot]
        ends = [*(frame.time for frame in of_shot[1:]), of_shot[-1].time + frame_duration]
        shots.append((of_shot[0].time, ends[-1]))
        for name in of_shot[0].people:
            scores = [frame.people[name].score for frame in of_shot]
            for first, last in _runs(smooth_presence(scores, threshold, smoothing)):
                of_track = of_shot[first : last + 1]
                tracks.append(
                    Track(
                        name,
                        of_track[0].time,
                        ends[last],
                        sum(scores[first : last + 1]) / len(of_track),
                        smooth_boxes([(frame.time, frame.people[name].box) for frame in of_track]),
                    )
                )
    return sorted(tracks, key=lambda track: (track.start, track.name)), shots


def smooth_presence(scores: Sequence[float], threshold: float, smoothing: float) -> list[bool]:
    """Decide in which frames of a shot a person is present.

    The most likely sequence of present and absent (Viterbi): a frame contributes the difference of the log odds of its
    score and of ``threshold`` to "present", and each change costs ``smoothing``.
    """
    if not scores:
        return []
    evidence = [_log_odds(score) - _log_odds(threshold) for score in scores]
    best = {False: 0.0, True: evidence[0]}
    previous: list[dict[bool, bool]] = []
    for value in evidence[1:]:
        came_from, total = {}, {}
        for state in (False, True):
            stays, changes = best[state], best[not state] - smoothing
            came_from[state] = state if stays >= changes else not state
            total[state] = max(stays, changes) + (value if state else 0.0)
        previous.append(came_from)
        best = total
    states = [best[True] > best[False]]
    for came_from in reversed(previous):
        states.append(came_from[states[-1]])
    return states[::-1]


def smooth_boxes(boxes: Sequence[tuple[float, Box | None]]) -> list[tuple[float, Box]]:
    """Median of each edge over three neighbouring boxes. Frames without a box are left out."""
    located = [(time, box) for time, box in boxes if box is not None]
    smoothed = []
    for index, (time, _) in enumerate(located):
        near = [box for _, box in located[max(index - 1, 0) : index + 2]]
        smoothed.append((time, tuple(median(edge) for edge in zip(*near, strict=True))))
    return smoothed


def _log_odds(probability: float) -> float:
    probability = min(max(probability, 0.01), 0.99)  # one frame alone cannot decide a whole shot
    return math.log(probability / (1 - probability))


def _runs(states: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last index of each run of True."""
    runs, start = [], None
    for index, state in enumerate([*states, False]):
        if state and start is None:
            start = index
        elif not state and start is not None:
            runs.append((start, index - 1))
            start = None
    return runs
