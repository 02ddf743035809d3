"""What a format cannot hold, counted."""

from collections import Counter


class Losses:
    """Counts what was changed or left out when samples were written in a format.

    Attributes:
        counts: what -> number of records in which it happened.
    """

    def __init__(self) -> None:
        self.counts: Counter = Counter()

    def add(self, what: str) -> None:
        """Count one record."""
        self.counts[what] += 1

    def __str__(self) -> str:
        return "\n".join(f"{count} records: {what}" for what, count in self.counts.most_common())
