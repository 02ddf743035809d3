"""Pictures without characters, of things at a place, and records about them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from idavlm.datasets import wording
from idavlm.datasets.characters.objects import COLOURS, THINGS
from idavlm.datasets.characters.places import PLACES

COUNTS = ("none", "one", "two", "three", "four", "five")
MAX_QUESTIONS = 3


@dataclass(frozen=True)
class Still:
    """A picture of ``count`` things of one kind and colour at a place; ``path`` lies under the image root."""

    path: str
    thing: str
    colour: str
    count: int
    place: str

    def questions(self) -> list[tuple[str, str]]:
        """Everything asked about it, with the answers."""
        plural, _ = THINGS[self.thing]
        noun, verb = (self.thing, "is") if self.count == 1 else (plural, "are")
        where = PLACES[self.place]
        article = "an" if self.colour[0] in "aeiou" else "a"
        things = f"{article if self.count == 1 else COUNTS[self.count]} {self.colour} {noun}"
        return [
            (f"What colour {verb} the {noun}?", _sentence(self.colour)),
            (f"How many {plural} are there?", _sentence(COUNTS[self.count])),
            ("What kind of place is this?", _sentence(where.split(" ", 1)[1])),
            (wording.describe(1), _sentence(f"{things} {verb} {where}")),
        ]


def plan_stills(num_pictures: int, rng: Random) -> list[Still]:
    """Pictures of one to five things each."""
    things, colours, places = list(THINGS), list(COLOURS), list(PLACES)
    return [
        Still(
            f"general/{number:04d}.jpg",
            rng.choice(things),
            rng.choice(colours),
            rng.randint(1, len(COUNTS) - 1),
            rng.choice(places),
        )
        for number in range(num_pictures)
    ]


def general_records(stills: Sequence[Still], count: int, rng: Random) -> Iterator[dict[str, Any]]:
    """``count`` records of one to three questions each."""
    for number in range(count):
        still = stills[number % len(stills)]
        messages: list[dict[str, Any]] = []
        for question, answer in rng.sample(still.questions(), rng.randint(1, MAX_QUESTIONS)):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        image = {"type": "image", "image": still.path}
        messages[0]["content"] = [image, {"type": "text", "text": "\n" + messages[0]["content"]}]
        yield {"id": f"general-{number}", "source": "general", "messages": messages}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
