"""Frames of a film: of a video file, or of a folder of images."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from idavlm.data.photos import PhotoLoader

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_ROUNDING = 1e-4  # seconds; times of images are rounded in the file


@dataclass(frozen=True, eq=False)
class Frame:
    """One sampled frame.

    Attributes:
        number: number of the sampled frame, from 0.
        time: seconds since the start of the film.
        image: the image, RGB and upright.
    """

    number: int
    time: float
    image: Image.Image


class Film:
    """A video file or a folder of images, sampled at regular times.

    Args:
        source: a video file that FFmpeg reads, or a folder of images, which are shown in the order of their names
            (``2.jpg`` before ``10.jpg``).
        frames_per_second: how many frames of a video are sampled per second. All images of a folder are used; this is
            the rate at which they were taken.

    Raises:
        ValueError: the file holds no video, or the folder no image.
        ImportError: PyAV is missing; the extra ``film`` installs it.
    """

    def __init__(self, source: str | Path, frames_per_second: float) -> None:
        self.source = Path(source)
        self.frames_per_second = frames_per_second
        self.files: list[Path] = []
        if self.source.is_dir():
            self.files = image_files(self.source)
            if not self.files:
                raise ValueError(f"{self.source} holds no image; pass a video file or a folder of images.")
            self.duration = len(self.files) / frames_per_second
        elif self.source.is_file():
            with _open(self.source) as container:
                self.duration = _duration(container)
        else:
            raise ValueError(f"{self.source} does not exist; pass a video file or a folder of images.")

    @property
    def num_frames(self) -> int:
        """Number of frames that are sampled; of a video whose length its file misstates, an estimate."""
        return len(self.files) or max(1, round(self.duration * self.frames_per_second))

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """Sampled frames from number ``start`` on. A video is decoded from the key frame before it.

        Frame k of a video is the first image at or after k / frames_per_second seconds. If the video has fewer
        images per second, each image is a frame, and some numbers are left out.

        Raises:
            ValueError: the video is damaged; the message says at what time.
        """
        rate = self.frames_per_second
        if self.files:
            for number in range(start, len(self.files)):
                yield Frame(number, number / rate, _load(self.files[number]))
            return
        with _open(self.source) as container:
            if start:
                _seek(container, start / rate)
            for time, decoded in _decoded_frames(container, self.source):
                if time >= start / rate - _ROUNDING:
                    number = math.floor((time + _ROUNDING) * rate)
                    yield Frame(number, time, _upright(decoded))
                    start = number + 1

    def frame(self, number: int) -> Frame:
        """One sampled frame."""
        try:
            return next(self.frames(number))
        except StopIteration:
            raise ValueError(f"{self.source} has no frame {number}; it was changed after it was read.") from None


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder in the order of their names; numbers count by their value."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    return sorted(files, key=lambda file: [_number_or_text(part) for part in re.split(r"(\d+)", file.name)])


def _number_or_text(part: str) -> tuple[int, int | str]:
    return (0, int(part)) if part.isdecimal() else (1, part)


def _load(file: Path) -> Image.Image:
    return PhotoLoader().load(file.resolve(), field="the frame")


def _open(source: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("films need PyAV; install it with: pip install 'idavlm[film]'") from error
    try:
        container = av.open(str(source))
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{source} is no video that FFmpeg reads ({error}); convert it, for example to MP4."
        ) from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{source} holds no video stream; pass a video file or a folder of images.")
    container.streams.video[0].thread_type = "AUTO"
    return container


def _duration(container: Any) -> float:
    stream = container.streams.video[0]
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / 1_000_000 if container.duration else 0.0


def _start(container: Any) -> float:
    stream = container.streams.video[0]
    return float((stream.start_time or 0) * stream.time_base)


def _seek(container: Any, time: float) -> None:
    """Continue with the key frame before ``time``."""
    stream = container.streams.video[0]
    container.seek(int((time + _start(container)) / stream.time_base), stream=stream, backward=True)


def _decoded_frames(container: Any, source: Path) -> Iterator[tuple[float, Any]]:
    """Decoded frames and their times in seconds since the start of the film."""
    import av

    start, time = _start(container), 0.0
    try:
        for decoded in container.decode(video=0):
            if decoded.time is not None:
                time = decoded.time - start
            yield time, decoded
    except av.error.FFmpegError as error:
        raise ValueError(f"{source} is damaged after {time:.1f} s ({error}); repair it or cut it there.") from error


def _upright(decoded: Any) -> Image.Image:
    """The image as RGB, rotated as its metadata says."""
    image = decoded.to_image()
    rotation = getattr(decoded, "rotation", 0)  # counter-clockwise degrees
    return image.rotate(rotation, expand=True) if rotation else image
