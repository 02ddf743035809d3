"""What a score is worth: the same records without references, and with photos of somebody else."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from idavlm.data.schema import Identity, Sample


def without_references(sample: Sample) -> Sample:
    """``sample`` without its identities; the names stay in the question, and its pictures become general images."""
    return replace(sample, identities=[], source="general")


Person = Callable[[str, str], str]
"""From a name and a photo to who that is, where the data tell it."""


def with_wrong_references(samples: Sequence[Sample], *, person: Person | None = None) -> list[Sample]:
    """Give every identity the photos of another person, of another sample.

    Two identities count as one person when a photo is common to them, directly or through others of ``samples``. The
    new photos show nobody whose photo the sample uses (as a reference or as a picture of the question), nor one person
    twice. The same samples always get the same photos.

    Args:
        samples: whose references are replaced.
        person: identities of whom it says the same are one person too.

    Raises:
        ValueError: no other person is left for an identity.
    """
    entries = [(number, identity) for number, sample in enumerate(samples) for identity in sample.identities]
    groups = [list(identity.images) for _, identity in entries]
    if person is not None:
        for _, identity in entries:
            groups += [[f"\0{person(identity.name, image)}", image] for image in identity.images]
    person_of = _persons(groups)
    wrong = [replace(sample, identities=[]) for sample in samples]
    taken: list[set[str]] = [{person_of.get(image, image) for image in sample.images} for sample in samples]
    for index, (number, identity) in enumerate(entries):
        for step in range(len(entries)):
            _, other = entries[(index + len(entries) // 2 + step) % len(entries)]
            shown = person_of[other.images[0]]
            if shown not in taken[number]:
                taken[number].add(shown)
                wrong[number].identities.append(Identity(identity.name, other.images[: len(identity.images)]))
                break
        else:
            sample = samples[number]
            raise ValueError(
                f"samples have no other person for {identity.name!r} of {sample.where or sample.id}; give samples of "
                "more identities."
            )
    return wrong


def _persons(groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """For every image one image that stands for its person: union-find, images of a group belong together."""
    parent: dict[str, str] = {}

    def root(image: str) -> str:
        parent.setdefault(image, image)
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    for group in groups:
        for image in group:
            parent[root(image)] = root(group[0])
    return {image: root(image) for image in list(parent)}
