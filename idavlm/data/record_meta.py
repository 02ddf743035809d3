"""What ``meta`` of a record tells about its persons, shots and distractors.

``meta`` is free. The tools for data use these entries, if they are there; builders of data sets write them:

- ``people``: name -> key of the person, the same in all records. Names may differ between records.
- ``shots``: path of an image -> key of the shot, photo session or scene that it comes from.
- ``distractors``: names that are introduced although the identity is in none of the images.
"""

from collections.abc import Mapping

from idavlm.data.schema import Sample

META_FIELDS = ("people", "shots", "distractors")
"""Entries of ``meta`` that the checks use."""


def people_of(sample: Sample) -> Mapping[str, str]:
    """Key of the person of each name, from ``meta.people``; empty if it is not there."""
    people = sample.meta.get("people") if isinstance(sample.meta, dict) else None
    return people if isinstance(people, dict) else {}


def shots_of(sample: Sample) -> Mapping[str, str]:
    """Key of the shot of each image, from ``meta.shots``; empty if it is not there."""
    shots = sample.meta.get("shots") if isinstance(sample.meta, dict) else None
    return shots if isinstance(shots, dict) else {}


def distractors_of(sample: Sample) -> list[str]:
    """Names that are introduced although they are not there, from ``meta.distractors``."""
    names = sample.meta.get("distractors") if isinstance(sample.meta, dict) else None
    return names if isinstance(names, list) else []
