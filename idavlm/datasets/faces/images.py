"""Builds the images of one split of the faces data set, and the general records."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from idavlm.datasets.album import AlbumImage, Appearance, IdentitySampler
from idavlm.datasets.dataset_folder import save_jpeg
from idavlm.datasets.faces.painting import PLACES, WALLS, hang
from idavlm.datasets.faces.subjects import Subject

_COUNTS = ("none", "one", "two", "three", "four")


class ImageBuilder:
    """Creates images of the photographs of ``subjects`` and writes them below ``image_root / split``."""

    def __init__(self, split: str, subjects: Sequence[Subject], image_root: Path, size: int, rng: Random) -> None:
        self.split, self.image_root, self.size, self.rng = split, image_root, size, rng
        self.subjects = {subject.key: subject for subject in subjects}
        self.sampler = IdentitySampler(list(self.subjects))
        for kind in ("photos", "scenes", "general"):
            (image_root / split / kind).mkdir(parents=True, exist_ok=True)

    def photos(self, count: int) -> list[AlbumImage]:
        """Create up to ``count`` images of each subject alone, each from a different photograph."""
        return [
            self._create(f"photos/{key}-{number}", [(key, shot)], self._random_wall())
            for key, subject in self.subjects.items()
            for number, shot in enumerate(self.rng.sample(list(subject.photos), min(count, len(subject.photos))))
        ]

    def scenes(self, count: int, sizes: Sequence[int]) -> list[AlbumImage]:
        """Create ``count`` images of several subjects; their numbers are the entries of ``sizes`` in turn."""
        return [
            self._create(f"scenes/{number}", self._random_photos(sizes[number % len(sizes)]), self._random_wall())
            for number in range(count)
        ]

    def general(self, count: int) -> Iterator[dict[str, Any]]:
        """Create ``count`` general images and yield their records: number of photographs, colour of the wall."""
        for number in range(count):
            shown, wall = self.rng.randint(1, 4), self._random_wall()
            general = self._create(f"general/{number}", self._random_photos(shown), wall)
            (first, answer), (second, other_answer) = self.rng.sample(
                [("What colour is the wall?", wall), ("How many photographs are there?", _COUNTS[shown])], 2
            )
            image = {"type": "image", "image": general.path}
            messages = [
                {"role": "user", "content": [image, {"type": "text", "text": "\n" + first}]},
                {"role": "assistant", "content": answer.capitalize() + "."},
                {"role": "user", "content": second},
                {"role": "assistant", "content": other_answer.capitalize() + "."},
            ]
            yield {"id": f"general-{number}", "source": "general", "messages": messages}

    def _random_photos(self, count: int) -> list[tuple[str, str]]:
        """Draw ``count`` subjects and a photograph of each."""
        return [(key, self.rng.choice(list(self.subjects[key].photos))) for key in self.sampler.draw(count, self.rng)]

    def _random_wall(self) -> str:
        return self.rng.choice(list(WALLS))

    def _create(self, name: str, shots: Sequence[tuple[str, str]], wall: str) -> AlbumImage:
        path = f"{self.split}/{name}.jpg"
        image, boxes = hang([self.subjects[key].photos[shot] for key, shot in shots], wall, self.size, self.rng)
        save_jpeg(image, self.image_root / path)
        appearances = [
            Appearance(key, place, box, shot)
            for (key, shot), place, box in zip(shots, PLACES[len(shots)], boxes, strict=True)
        ]
        return AlbumImage(path, tuple(appearances))
