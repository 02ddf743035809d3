"""General images, of objects at a place without characters, and records about them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from idavlm.datasets.characters.objects import COLOURS, THINGS
from idavlm.datasets.characters.places import PLACES
from idavlm.datasets.record_composer import describe_question

COUNTS = ("none", "one", "two", "three", "four", "five")
MAX_QUESTIONS = 3


@dataclass(frozen=True)
class GeneralImage:
    """An image of ``count`` objects of one kind and colour at a place; ``path`` is relative to the image root."""

    path: str
    thing: str
    colour: str
    count: int
    place: str

    def questions(self) -> list[tuple[str, str]]:
        """All questions about the image, with their answers."""
        plural, _ = THINGS[self.thing]
        noun, verb = (self.thing, "is") if self.count == 1 else (plural, "are")
        where = PLACES[self.place]
        article = "an" if self.colour[0] in "aeiou" else "a"
        things = f"{article if self.count == 1 else COUNTS[self.count]} {self.colour} {noun}"
        return [
            (f"What colour {verb} the {noun}?", _sentence(self.colour)),
            (f"How many {plural} are there?", _sentence(COUNTS[self.count])),
            ("What kind of place is this?", _sentence(where.split(" ", 1)[1])),
            (describe_question(1), _sentence(f"{things} {verb} {where}")),
        ]


def plan_general(num_images: int, rng: Random) -> list[GeneralImage]:
    """Plan images of one to five objects each."""
    things, colours, places = list(THINGS), list(COLOURS), list(PLACES)
    return [
        GeneralImage(
            f"general/{number:04d}.jpg",
            rng.choice(things),
            rng.choice(colours),
            rng.randint(1, len(COUNTS) - 1),
            rng.choice(places),
        )
        for number in range(num_images)
    ]


def general_records(images: Sequence[GeneralImage], count: int, rng: Random) -> Iterator[dict[str, Any]]:
    """Yield ``count`` records of one to three questions each."""
    for number in range(count):
        image = images[number % len(images)]
        messages: list[dict[str, Any]] = []
        for question, answer in rng.sample(image.questions(), rng.randint(1, MAX_QUESTIONS)):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        part = {"type": "image", "image": image.path}
        messages[0]["content"] = [part, {"type": "text", "text": "\n" + messages[0]["content"]}]
        yield {"id": f"general-{number}", "source": "general", "messages": messages}


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
