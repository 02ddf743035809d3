"""Finds copies of training images among held-out images: scaled, mirrored or compressed again."""

from array import array
from collections import defaultdict

from idavlm.data.validation.image_facts import GreyCopies, ImageFacts
from idavlm.data.validation.same_pixels import is_same_image

NUM_BANDS, BAND_BITS = 8, 8
MAX_BITS = 7
"""Bits in which the hashes of two copies may differ. At least one of the bands of bits is then equal."""


class SimilarImages:
    """An index of the hashes of training images.

    Args:
        copies: the small copies of all images, by which images with similar hashes are compared.

    Attributes:
        found: number of a training image for each held-out image that is a copy of it.
    """

    def __init__(self, copies: GreyCopies) -> None:
        self._copies = copies
        self._bands: dict[int, array] = defaultdict(lambda: array("L"))
        self._hashes: dict[int, int] = {}
        self.found: dict[int, int] = {}

    def add(self, number: int, facts: ImageFacts) -> None:
        """Add a training image."""
        if facts.is_blank:
            return
        self._hashes[number] = facts.average_hash
        for band in _bands(facts.average_hash):
            self._bands[band].append(number)

    def look_up(self, number: int, facts: ImageFacts) -> None:
        """Look for the training image that a held-out image is a copy of, and enter it in :attr:`found`."""
        if facts.is_blank:
            return
        for value in (facts.average_hash, facts.mirrored_hash):
            candidates = {other for band in _bands(value) for other in self._bands.get(band, ())}
            for other in sorted(candidates):
                is_near = (self._hashes[other] ^ value).bit_count() <= MAX_BITS
                if is_near and is_same_image(facts.grey, self._copies[other]):
                    self.found[number] = other
                    return


def _bands(value: int) -> list[int]:
    """The bands of bits of a hash; the number of the band makes them different."""
    mask = (1 << BAND_BITS) - 1
    return [(number << BAND_BITS) | ((value >> (number * BAND_BITS)) & mask) for number in range(NUM_BANDS)]
