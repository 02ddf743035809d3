"""Films: who appears when and where."""

from idavlm.inference.film.analysis import analyse_film
from idavlm.inference.film.cast import read_cast
from idavlm.inference.film.detection import Detection, detect
from idavlm.inference.film.frames import Film, Frame
from idavlm.inference.film.tracks import FrameDetections, Track, find_tracks

__all__ = [
    "Detection",
    "Film",
    "Frame",
    "FrameDetections",
    "Track",
    "analyse_film",
    "detect",
    "find_tracks",
    "read_cast",
]
