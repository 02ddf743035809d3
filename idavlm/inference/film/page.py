"""One HTML page per film: a timeline with a row per person, and a thumbnail per track. It needs no other file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from idavlm.data.page_images import small_jpeg
from idavlm.inference.film.frames import Film
from idavlm.inference.film.tracks import FrameDetections, Track
from idavlm.utils import write_text
from idavlm.utils.figures import COLOURS

_LABEL, _WIDTH, _ROW = 140, 1100, 26  # pixels of the timeline
_THUMBNAIL = 200  # longest side in pixels

_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; color: #2b2d33; margin: 24px auto; max-width: 1260px; padding: 0 12px; }
h1 { font-size: 22px; } h2 { font-size: 17px; margin-top: 28px; }
table { border-collapse: collapse; } td, th { padding: 3px 14px 3px 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.tracks { display: flex; flex-wrap: wrap; gap: 12px; } figure { margin: 0; } figcaption { font-size: 13px; }
.timeline { width: 100%; }
"""


def write_page(
    path: Path,
    film: Film,
    frames: Sequence[FrameDetections],
    tracks: Sequence[Track],
    shots: Sequence[tuple[float, float]],
    names: Sequence[str],
) -> None:
    """Write the page of a film.

    Args:
        path: the HTML file.
        film: the film, from which the thumbnails are read.
        frames: detections of all frames.
        tracks, shots: from :func:`find_tracks`.
        names: the cast, in the order of the rows.
    """
    duration = shots[-1][1]
    title = f"Who appears in {film.source.name}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{clock(duration)} long, {len(shots)} shots, {len(frames)} frames looked at "
        f"({film.frames_per_second:g} per second), {len(tracks)} tracks.</p>",
        _timeline(tracks, shots, names, duration),
        _summary(tracks, names, duration),
    ]
    for number, name in enumerate(names):
        of_person = [track for track in tracks if track.name == name]
        body.append(f"<h2>{escape(name)}</h2>")
        if not of_person:
            body.append("<p>Not found in the film.</p>")
            continue
        figures = "\n".join(_thumbnail(film, frames, track, COLOURS[number % len(COLOURS)]) for track in of_person)
        body.append(f'<div class="tracks">\n{figures}\n</div>')
    content = "\n".join(body)
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>\n{_STYLE}</style>\n</head>\n<body>\n{content}\n</body>\n</html>\n",
    )


def clock(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _timeline(
    tracks: Sequence[Track], shots: Sequence[tuple[float, float]], names: Sequence[str], duration: float
) -> str:
    height = _ROW * len(names) + 24
    scale = _WIDTH / duration
    parts = [f'<svg class="timeline" viewBox="0 0 {_LABEL + _WIDTH} {height}" role="img" aria-label="Timeline">']
    for number, (start, end) in enumerate(shots):
        colour = ("#f4f5f7", "#e7e9ee")[number % 2]
        parts.append(
            _rectangle(_LABEL + start * scale, 0, (end - start) * scale, height - 24, colour, f"shot {number + 1}")
        )
    for row, name in enumerate(names):
        parts.append(f'<text x="0" y="{row * _ROW + 18}" font-size="14">{escape(name)}</text>')
        for track in tracks:
            if track.name == name:
                label = f"{name}, {clock(track.start)} to {clock(track.end)}"
                x, width = _LABEL + track.start * scale, (track.end - track.start) * scale
                parts.append(_rectangle(x, row * _ROW + 5, width, _ROW - 10, COLOURS[row % len(COLOURS)], label))
    for mark in range(11):
        time = duration * mark / 10
        anchor = "start" if mark == 0 else "end" if mark == 10 else "middle"
        parts.append(
            f'<text x="{_LABEL + time * scale:.1f}" y="{height - 6}" font-size="12" text-anchor="{anchor}">'
            f"{clock(time)}</text>"
        )
    return "\n".join([*parts, "</svg>"])


def _rectangle(x: float, y: float, width: float, height: float, colour: str, label: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}">'
        f"<title>{escape(label)}</title></rect>"
    )


def _summary(tracks: Sequence[Track], names: Sequence[str], duration: float) -> str:
    rows = []
    for name in names:
        of_person = [track for track in tracks if track.name == name]
        seconds = sum(track.end - track.start for track in of_person)
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="number">{clock(seconds)}</td>'
            f'<td class="number">{seconds / duration:.0%}</td><td class="number">{len(of_person)}</td></tr>'
        )
    head = "<tr><th>Person</th><th>On screen</th><th>Share of the film</th><th>Tracks</th></tr>"
    return "\n".join(["<table>", head, *rows, "</table>"])


def _thumbnail(film: Film, frames: Sequence[FrameDetections], track: Track, colour: str) -> str:
    """The frame of a track in which the person was located best, with the box."""
    of_track = [frame for frame in frames if track.start <= frame.time < track.end]
    best = max(of_track, key=lambda frame: (frame.people[track.name].box is not None, frame.people[track.name].score))
    box = dict(track.boxes).get(best.time)
    image = small_jpeg(film.frame(best.number).image, _THUMBNAIL, [] if box is None else [(box, colour)])
    label = f"{clock(track.start)} to {clock(track.end)}"
    return (
        f'<figure><img alt="{escape(track.name)}, {label}" src="data:image/jpeg;base64,{image}">'
        f"<figcaption>{label}, score {track.score:.2f}</figcaption></figure>"
    )
