"""Albums: the images of a data set, the identities in them, and which identities may appear together."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

PixelBox = tuple[int, int, int, int]
"""``(x1, y1, x2, y2)`` in pixels of an image."""


@dataclass(frozen=True)
class Appearance:
    """An identity as it appears in one image.

    Attributes:
        identity: key of the identity. Its name is chosen per record.
        activity: text that follows "is" in "Kate is ...", such as "waving" or "on the left"; empty if there is none.
        box: bounding box; None until the image is drawn.
        shot: the original photo or sprite that is shown. A record never uses the same shot of an identity both as a
            reference and in a question.
    """

    identity: str
    activity: str = ""
    box: PixelBox | None = None
    shot: str = ""


@dataclass(frozen=True)
class AlbumImage:
    """An image file and the identities in it.

    Attributes:
        path: path relative to the image root.
        appearances: identities in the image, from left to right.
    """

    path: str
    appearances: tuple[Appearance, ...] = ()

    def appearance_of(self, identity: str) -> Appearance | None:
        """Return the appearance of ``identity`` in the image, or None."""
        return next((appearance for appearance in self.appearances if appearance.identity == identity), None)


class IdentitySampler:
    """Draws identities that may appear together in a record or scene.

    Args:
        identities: all identities.
        families: family of an identity. Two identities of one family, such as two colour variants of one character,
            are never drawn together. An identity without an entry is its own family.
        pools: groups of identities. All identities of one draw come from one pool, and all pools are equally likely.
            The default is one pool of all identities.
    """

    def __init__(
        self,
        identities: Sequence[str],
        families: Mapping[str, str] | None = None,
        pools: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.identities = list(identities)
        self._families = dict(families or {})
        self._pools = [list(pool) for pool in pools] if pools else [self.identities]

    def draw(self, count: int, rng: Random) -> list[str]:
        """Draw ``count`` identities of different families, in random order.

        Raises:
            ValueError: the pool has fewer than ``count`` families.
        """
        pool = rng.choice(self._pools)
        # Rejection is fast, as most identities are of different families.
        for _ in range(50):
            drawn = rng.sample(pool, min(count, len(pool)))
            if len({self._family(identity) for identity in drawn}) == count:
                return drawn
        by_family: dict[str, list[str]] = defaultdict(list)
        for identity in pool:
            by_family[self._family(identity)].append(identity)
        if len(by_family) < count:
            raise ValueError(
                f"count={count} identities cannot be drawn from a pool of {len(by_family)} families; add identities."
            )
        return [rng.choice(family) for family in rng.sample(list(by_family.values()), count)]

    def draw_absent(self, shown: Sequence[str], count: int, rng: Random) -> list[str]:
        """Draw ``count`` identities of one pool whose families differ from each other and from those of ``shown``.

        Raises:
            ValueError: no pool has so many.
        """
        families = {self._family(identity) for identity in shown}
        for _ in range(1000):
            drawn = self.draw(count, rng)
            if families.isdisjoint(map(self._family, drawn)):
                return drawn
        raise ValueError(
            f"count={count} identities that are not among {len(shown)} others cannot be drawn; add identities."
        )

    def _family(self, identity: str) -> str:
        return self._families.get(identity, identity)


class Album:
    """The images of one split, from which records are composed.

    Args:
        images: photos (images of one identity) and scenes (images of several), with boxes.
        sampler: decides which identities may appear together in a record that combines photos. By default, all
            identities with photos may.

    Attributes:
        photos: photos of each identity.
        scenes: all scenes.
        activities: all activities in the images, sorted.
    """

    def __init__(self, images: Sequence[AlbumImage], sampler: IdentitySampler | None = None) -> None:
        self.scenes = [image for image in images if len(image.appearances) > 1]
        self.photos: dict[str, list[AlbumImage]] = defaultdict(list)
        for image in images:
            if len(image.appearances) == 1:
                self.photos[image.appearances[0].identity].append(image)
        self.sampler = sampler or IdentitySampler(list(self.photos))
        self.activities = sorted({appearance.activity for image in images for appearance in image.appearances} - {""})

    @cached_property
    def images_with_activity(self) -> Mapping[str, list[AlbumImage]]:
        """Images in which an identity has an activity: its scenes, or its photos if it is in no scene."""
        found: dict[str, list[AlbumImage]] = defaultdict(list)
        for image in self.scenes:
            for appearance in image.appearances:
                if appearance.activity:
                    found[appearance.identity].append(image)
        for identity, photos in self.photos.items():
            if identity not in found:
                found[identity] = [photo for photo in photos if photo.appearances[0].activity]
        return found
