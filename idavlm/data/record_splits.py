"""Splits of records in which no person and no image is on two sides."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from random import Random

TOLERANCE = 0.05
"""Largest difference between the share of a split that is asked for and the one that is reached."""


def connected_components(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """Number of the component of each record: records with a common key are in one component, directly or by others.

    Args:
        keys: the keys of each record, for example its persons and images.

    Returns:
        A number for each record: that of the first record of its component.
    """
    parent = list(range(len(keys)))

    def root(record: int) -> int:
        while parent[record] != record:
            parent[record] = parent[parent[record]]
            record = parent[record]
        return record

    first: dict[Hashable, int] = {}
    for record, of_record in enumerate(keys):
        for key in of_record:
            other = root(first.setdefault(key, record))
            mine = root(record)
            parent[max(mine, other)] = min(mine, other)
    return [root(record) for record in range(len(keys))]


def split_records(
    keys: Sequence[Iterable[Hashable]], shares: Mapping[str, float], *, seed: int = 0, tolerance: float = TOLERANCE
) -> list[str]:
    """Divide records among splits so that no key is in two of them.

    Components (:func:`connected_components`) are taken whole. The largest come first, equal ones in random order, and
    each goes to the split that lacks most of its share.

    Args:
        keys: the keys of each record. A record without keys is a component of its own.
        shares: split -> share of the records; they sum to 1.
        seed: seed of the random order.
        tolerance: largest difference between a share and the one that is reached.

    Returns:
        The split of each record.

    Raises:
        ValueError: shares that do not sum to 1, no records, or components that are too large for the shares.
    """
    if len(shares) < 2 or any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares={dict(shares)} must be two or more positive numbers that sum to 1.")
    if not keys:
        raise ValueError("there are no records to split.")
    members: dict[int, list[int]] = defaultdict(list)
    for record, component in enumerate(connected_components(keys)):
        members[component].append(record)
    components = list(members.values())
    Random(f"{seed} split").shuffle(components)
    components.sort(key=len, reverse=True)
    missing = {name: share * len(keys) for name, share in shares.items()}
    split = [""] * len(keys)
    for component in components:
        name = max(missing, key=missing.__getitem__)
        missing[name] -= len(component)
        for record in component:
            split[record] = name
    for name, share in shares.items():
        reached = split.count(name) / len(keys)
        if abs(reached - share) > tolerance:
            raise ValueError(
                f"{name} would have {reached:.1%} of the records in place of {share:.1%}: the {len(keys)} records have "
                f"{len(components)} parts that share neither person nor image, and the largest has "
                f"{len(components[0])} records; change shares, raise tolerance, or leave out records that connect "
                "many persons."
            )
    return split
