"""Pictures of people, as records choose from them: who does what in which picture, and who may meet whom."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Person:
    """Somebody in a picture.

    Attributes:
        identity: a key; the name is given by the record.
        activity: what follows "is" in "Kate is ..." ("waving", "on the left"); empty where there is nothing to say.
        box: ``(x1, y1, x2, y2)`` in pixels of the picture; None until it is drawn.
        shot: which raw photo or frame of the person it is; a record never refers with the shot it asks about.
    """

    identity: str
    activity: str = ""
    box: Box | None = None
    shot: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture (``path`` lies under the image root) of people from left to right."""

    path: str
    people: tuple[Person, ...] = ()

    def shows(self, identity: str) -> Person | None:
        """The person of that identity in the picture."""
        return next((person for person in self.people if person.identity == identity), None)


class Cast:
    """Who may meet whom in a record or a scene.

    Args:
        identities: everybody.
        families: by identity; two of one family never meet. Without an entry an identity is its own family.
        circles: groups of identities. Those who meet come from one circle, drawn with equal chances; the default is
            one circle of everybody.
    """

    def __init__(
        self,
        identities: Sequence[str],
        families: Mapping[str, str] | None = None,
        circles: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.identities = list(identities)
        self._families = dict(families or {})
        self._circles = [list(circle) for circle in circles] if circles else [self.identities]

    def draw(self, count: int, rng: Random) -> list[str]:
        """``count`` identities of different families, in random order.

        Raises:
            ValueError: the circle drawn has not so many families.
        """
        circle = rng.choice(self._circles)
        for _ in range(50):
            drawn = rng.sample(circle, min(count, len(circle)))
            if len({self._families.get(one, one) for one in drawn}) == count:
                return drawn
        by_family: dict[str, list[str]] = defaultdict(list)
        for one in circle:
            by_family[self._families.get(one, one)].append(one)
        if len(by_family) < count:
            raise ValueError(f"count={count} people cannot meet in a circle of {len(by_family)} families; add some.")
        return [rng.choice(family) for family in rng.sample(list(by_family.values()), count)]


class Album:
    """The pictures of one split, for records to choose from.

    Args:
        pictures: of one person (photos) or several (scenes), boxes known.
        cast: who may meet in a record that brings photos together; default everybody who has a photo.

    Attributes:
        photos: pictures of one person alone, by identity.
        scenes: pictures of several people.
    """

    def __init__(self, pictures: Sequence[Picture], cast: Cast | None = None) -> None:
        self.scenes = [picture for picture in pictures if len(picture.people) > 1]
        self.photos: dict[str, list[Picture]] = defaultdict(list)
        for picture in pictures:
            if len(picture.people) == 1:
                self.photos[picture.people[0].identity].append(picture)
        self.cast = cast or Cast(list(self.photos))
        self.activities = sorted({person.activity for picture in pictures for person in picture.people} - {""})

    @cached_property
    def telling(self) -> Mapping[str, list[Picture]]:
        """Pictures in which there is something to say of an identity: scenes or, of who is in none, photos."""
        found: dict[str, list[Picture]] = defaultdict(list)
        for picture in self.scenes:
            for person in picture.people:
                if person.activity:
                    found[person.identity].append(picture)
        for identity, photos in self.photos.items():
            if identity not in found:
                found[identity] = [photo for photo in photos if photo.people[0].activity]
        return found
