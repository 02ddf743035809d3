"""Makes the pictures of one split of the faces, and the records of pictures of nobody in particular."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from idavlm.datasets.album import Cast, Person, Picture
from idavlm.datasets.faces.painting import PLACES, WALLS, hang
from idavlm.datasets.faces.people import Sitter
from idavlm.datasets.jpeg import save_jpeg

_COUNTS = ("none", "one", "two", "three", "four")


class Studio:
    """Hangs the photographs of ``sitters`` and writes the pictures below ``image_root / split``."""

    def __init__(self, split: str, sitters: Sequence[Sitter], image_root: Path, size: int, rng: Random) -> None:
        self.split, self.image_root, self.size, self.rng = split, image_root, size, rng
        self.sitters = {sitter.key: sitter for sitter in sitters}
        self.cast = Cast(list(self.sitters))
        for kind in ("photos", "scenes", "general"):
            (image_root / split / kind).mkdir(parents=True, exist_ok=True)

    def photos(self, count: int) -> list[Picture]:
        """``count`` pictures of each sitter alone, of different photographs, as far as there are so many."""
        return [
            self._hang(f"photos/{key}-{number}", [(key, shot)], self._any_wall())
            for key, sitter in self.sitters.items()
            for number, shot in enumerate(self.rng.sample(list(sitter.photos), min(count, len(sitter.photos))))
        ]

    def scenes(self, count: int, sizes: Sequence[int]) -> list[Picture]:
        """``count`` pictures, of as many sitters as ``sizes`` says in turn."""
        return [
            self._hang(f"scenes/{number}", self._anybody(sizes[number % len(sizes)]), self._any_wall())
            for number in range(count)
        ]

    def general(self, count: int) -> Iterator[dict[str, Any]]:
        """Records of two questions about a picture each: how many photographs, and what colour the wall is."""
        for number in range(count):
            shown, wall = self.rng.randint(1, 4), self._any_wall()
            picture = self._hang(f"general/{number}", self._anybody(shown), wall)
            (first, answer), (second, other_answer) = self.rng.sample(
                [("What colour is the wall?", wall), ("How many photographs are there?", _COUNTS[shown])], 2
            )
            image = {"type": "image", "image": picture.path}
            messages = [
                {"role": "user", "content": [image, {"type": "text", "text": "\n" + first}]},
                {"role": "assistant", "content": answer.capitalize() + "."},
                {"role": "user", "content": second},
                {"role": "assistant", "content": other_answer.capitalize() + "."},
            ]
            yield {"id": f"general-{number}", "source": "general", "messages": messages}

    def _anybody(self, count: int) -> list[tuple[str, str]]:
        """Identities and a photograph of each."""
        return [(key, self.rng.choice(list(self.sitters[key].photos))) for key in self.cast.draw(count, self.rng)]

    def _any_wall(self) -> str:
        return self.rng.choice(list(WALLS))

    def _hang(self, name: str, shots: Sequence[tuple[str, str]], wall: str) -> Picture:
        path = f"{self.split}/{name}.jpg"
        image, boxes = hang([self.sitters[key].photos[shot] for key, shot in shots], wall, self.size, self.rng)
        save_jpeg(image, self.image_root / path)
        people = [
            Person(key, place, box, shot)
            for (key, shot), place, box in zip(shots, PLACES[len(shots)], boxes, strict=True)
        ]
        return Picture(path, tuple(people))
