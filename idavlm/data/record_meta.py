"""What ``meta`` of a record tells about its persons and where its images come from.

``meta`` is free. The tools for data use these entries, if they are there; builders of data sets write them:

- ``people``: name -> key of the person, the same in all records. Names may differ between records.
- ``images``: keys of the original images or films, the same in all records; held-out records must not share them.
- ``references``, ``scenes``: lists of ``{"image", "of", "box", "shot", "scene"}``: the path of an image in the record,
  the original image that it is or is cut out of, what was cut out, and keys of its shot and of its scene in a film. All
  but ``image`` may be absent.
- ``distractors``: names that are introduced although the identity is in none of the images.
"""

from collections.abc import Mapping
from typing import Any

from idavlm.data.schema import Sample

META_FIELDS = {"people": dict, "images": list, "references": list, "scenes": list, "distractors": list}
"""Entries of ``meta`` that the tools use, and their types."""


def meta_of(sample: Sample, field: str) -> Any:
    """An entry of ``meta``; an empty one if it is absent or of another type."""
    value = sample.meta.get(field) if isinstance(sample.meta, dict) else None
    return value if isinstance(value, META_FIELDS[field]) else META_FIELDS[field]()


def people_of(sample: Sample) -> Mapping[str, str]:
    """Key of the person of each name."""
    return meta_of(sample, "people")


def origins_of(sample: Sample, field: str) -> Mapping[str, Mapping[str, Any]]:
    """Entry of each image in ``meta.references`` or ``meta.scenes``."""
    entries = meta_of(sample, field)
    return {entry["image"]: entry for entry in entries if isinstance(entry, dict) and "image" in entry}


def shots_of(sample: Sample) -> Mapping[str, str]:
    """Key of the shot of each image."""
    origins = {**origins_of(sample, "references"), **origins_of(sample, "scenes")}
    return {image: entry["shot"] for image, entry in origins.items() if entry.get("shot")}
