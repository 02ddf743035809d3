"""WebVTT subtitles: the names of the people who are in the image."""

import itertools
from collections.abc import Sequence

from idavlm.inference.film.tracks import Track


def subtitles(tracks: Sequence[Track]) -> str:
    """Return a WebVTT file with one cue per span of time in which the same people are present."""
    times = sorted({round(time, 3) for track in tracks for time in (track.start, track.end)})
    cues: list[tuple[float, float, list[str]]] = []
    for start, end in itertools.pairwise(times):
        present = {track.name for track in tracks if round(track.start, 3) <= start and end <= round(track.end, 3)}
        names = sorted(present)
        if cues and names and cues[-1][1] == start and cues[-1][2] == names:  # the next shot shows the same people
            cues[-1] = (cues[-1][0], end, names)
        elif names:
            cues.append((start, end, names))
    blocks = [f"{_clock(start)} --> {_clock(end)}\n{_escaped(', '.join(names))}" for start, end, names in cues]
    return "\n\n".join(["WEBVTT", *blocks]) + "\n"


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}.{milliseconds % 1000:03}"


def _escaped(text: str) -> str:
    """Text of a cue. ``-->`` and blank lines would end it."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
