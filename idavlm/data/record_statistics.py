"""Statistics of records: identities, photos, images, boxes, texts, tokens and names."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from idavlm.data.errors import DataError
from idavlm.data.images import ImageStore
from idavlm.data.record_meta import meta_of, people_of
from idavlm.data.schema import Sample
from idavlm.data.validation.image_facts import ImageKey, image_key

PER_MILLE = 1000
MOST_NAMES = 30


@dataclass
class Distribution:
    """Counts of whole numbers. Memory grows with the number of different values only."""

    counts: Counter = field(default_factory=Counter)

    def add(self, value: int) -> None:
        """Count a value."""
        self.counts[value] += 1

    def quantile(self, share: float) -> int:
        """The smallest value that at least ``share`` of the values do not exceed."""
        needed, seen = share * self.counts.total(), 0
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= needed:
                return value
        raise ValueError("there are no values.")

    def summary(self) -> dict[str, float]:
        """Number, mean, minimum, quantiles and maximum of the values; only the number if it is 0."""
        number = self.counts.total()
        if not number:
            return {"n": 0}
        mean = sum(value * count for value, count in self.counts.items()) / number
        return {
            "n": number,
            "mean": round(mean, 3),
            "min": min(self.counts),
            "p5": self.quantile(0.05),
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "max": max(self.counts),
        }


@dataclass
class RecordStatistics:
    """Statistics of records; :func:`record_statistics` fills them.

    Attributes:
        records: number of records by source, by task, and of evaluation records.
        distributions: name -> counts of a number for each record, identity, answer or box.
        names: number of records that introduce each name.
        persons: number of different persons, from ``meta.people``; 0 if no record names them.
        unreadable: number of records that cannot be read, and of images whose size cannot be read.
    """

    records: Counter = field(default_factory=Counter)
    distributions: dict[str, Distribution] = field(default_factory=dict)
    names: Counter = field(default_factory=Counter)
    persons: set[str] = field(default_factory=set)
    unreadable: Counter = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """The statistics as JSON values; box areas are in per mille of the image."""
        return {
            "records": dict(self.records),
            "unreadable": dict(self.unreadable),
            "summaries": {name: values.summary() for name, values in self.distributions.items()},
            "distributions": {name: dict(sorted(values.counts.items())) for name, values in self.distributions.items()},
            "names": {"different": len(self.names), "most_frequent": dict(self.names.most_common(MOST_NAMES))},
            "persons": len(self.persons),
        }


def record_statistics(
    samples: Iterable[Sample | DataError],
    *,
    num_tokens: Callable[[Sample], int] | None = None,
    box_sizes: bool = True,
) -> RecordStatistics:
    """Count what records hold.

    Args:
        samples: the samples; an error counts as a record that cannot be read.
        num_tokens: ``num_tokens`` of a processor, for the lengths in tokens.
        box_sizes: whether the sizes of boxes are counted, for which the headers of images with boxes are read.
    """
    found = RecordStatistics()
    names = (
        "identities per record",
        "photos per identity",
        "distractors per record",
        "images per record",
        "turns per record",
        "words per answer",
        "boxes per record",
        "box area, per mille of the image",
    )
    found.distributions = {name: Distribution() for name in (*names, *(("tokens per record",) if num_tokens else ()))}
    count = found.distributions
    sizes: dict[ImageKey, tuple[int, int] | None] = {}
    for sample in samples:
        if isinstance(sample, DataError):
            found.unreadable["records"] += 1
            continue
        found.records["all"] += 1
        found.records[f"source {sample.source}"] += 1
        found.records[f"type {sample.task or 'none'}"] += 1
        found.records["evaluation"] += sample.is_evaluation
        if sample.identities:
            count["identities per record"].add(len(sample.identities))
            count["distractors per record"].add(len(meta_of(sample, "distractors")))
        for identity in sample.identities:
            count["photos per identity"].add(len(identity.images))
            found.names[identity.name] += 1
        found.persons.update(map(str, people_of(sample).values()))
        count["images per record"].add(len(sample.message_images))
        count["turns per record"].add(sum(message.role != "system" for message in sample.messages))
        for message in sample.messages:
            if message.role == "assistant":
                count["words per answer"].add(len(" ".join(part.text for part in message.content).split()))
        boxes = sample.all_boxes
        count["boxes per record"].add(len(boxes))
        for box in boxes if box_sizes else ():
            x1, y1, x2, y2 = box.box
            area = (x2 - x1) * (y2 - y1)
            if not box.relative:
                size = _size(sample, box.image, sizes)
                if size is None:
                    found.unreadable["images"] += 1
                    continue
                area /= size[0] * size[1]
            count["box area, per mille of the image"].add(min(PER_MILLE, round(PER_MILLE * area)))
        if num_tokens is not None:
            try:
                count["tokens per record"].add(num_tokens(sample))
            except DataError:
                found.unreadable["records that the processor cannot encode"] += 1
    return found


def _size(sample: Sample, image: str, sizes: dict[ImageKey, tuple[int, int] | None]) -> tuple[int, int] | None:
    """(height, width) of an image, None if it cannot be read."""
    key = image_key(sample, image)
    if key not in sizes:
        try:
            sizes[key] = ImageStore(sample.image_root).size(image)
        except DataError:
            sizes[key] = None
    return sizes[key]
