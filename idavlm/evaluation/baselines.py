"""Baselines that show how much a model uses its references: no references, or references of other identities."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from idavlm.data.record_splits import connected_components
from idavlm.data.schema import Identity, Sample

IdentityKey = Callable[[str, str], str]
"""``identity_key(name, image) -> key``: references with equal keys show the same identity."""


def without_references(sample: Sample) -> Sample:
    """``sample`` without its identities. Names stay in the question; its images become general images."""
    return replace(sample, identities=[], source="general")


def check_wrong_references(samples: Sequence[Sample], *, identity_key: IdentityKey | None = None) -> None:
    """Check that ``samples`` have enough identities for :func:`with_wrong_references`.

    Call it before a long training run whose evaluation includes ``evaluate(..., references="wrong")``.

    Args:
        samples: the evaluation samples.
        identity_key: as in :func:`with_wrong_references`.

    Raises:
        ValueError: no other identity is left for one of the references.
    """
    with_wrong_references(list(samples), identity_key=identity_key)


def with_wrong_references(samples: Sequence[Sample], *, identity_key: IdentityKey | None = None) -> list[Sample]:
    """Replace the references of every identity by references of another identity, taken from another sample.

    Two entries are the same identity if they share a reference image, directly or through other entries of
    ``samples``. The new references show no identity whose reference images appear anywhere in the sample, and no
    identity is used twice in a sample. The result is deterministic.

    Args:
        samples: samples whose references are replaced.
        identity_key: for data sets where entries of one identity share no image: maps the name and the path of a
            reference to a key that is equal for references of the same identity.

    Raises:
        ValueError: no other identity is left for one of the references.
    """
    entries = [(number, identity) for number, sample in enumerate(samples) for identity in sample.identities]
    groups = [list(identity.images) for _, identity in entries]
    if identity_key is not None:
        for _, identity in entries:
            groups += [[f"\0{identity_key(identity.name, image)}", image] for image in identity.images]
    components = connected_components(groups)
    identity_of = {image: number for number, group in zip(components, groups, strict=True) for image in group}
    wrong = [replace(sample, identities=[]) for sample in samples]
    used: list[set[int | str]] = [{identity_of.get(image, image) for image in sample.images} for sample in samples]
    for index, (number, identity) in enumerate(entries):
        for step in range(len(entries)):
            _, other = entries[(index + len(entries) // 2 + step) % len(entries)]
            shown = identity_of[other.images[0]]
            if shown not in used[number]:
                used[number].add(shown)
                wrong[number].identities.append(Identity(identity.name, other.images[: len(identity.images)]))
                break
        else:
            sample = samples[number]
            raise ValueError(
                f"samples: wrong references for {identity.name!r} of {sample.where or sample.id} need another identity "
                f"that the sample does not show, but all samples together introduce {len(set(identity_of.values()))}; "
                "pass samples with more identities, or do not evaluate with references='wrong'."
            )
    return wrong
