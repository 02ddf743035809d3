"""What was left out of a data set and why."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class ErrorLog:
    """Counted skips.

    Attributes:
        counts: number of samples left out, by kind of error (``idavlm.data.errors.KINDS``).
        messages: the first few messages, with file and line.
    """

    counts: Counter = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)

    MAX_MESSAGES = 20

    def add(self, kind: str, message: str) -> None:
        """Count one more; the message is kept while there are few."""
        self.counts[kind] += 1
        if len(self.messages) < self.MAX_MESSAGES:
            self.messages.append(message)

    @property
    def total(self) -> int:
        """Number of samples left out."""
        return self.counts.total()

    def __str__(self) -> str:
        if not self.total:
            return "nothing skipped"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        more = self.total - len(self.messages)
        return "\n  ".join(
            [f"{self.total} skipped ({kinds})", *self.messages, *([f"... and {more} more"] if more else [])]
        )
