"""Prometheus metrics of the server. No label holds anything of a request."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from idavlm.inference.batching import BatchReport

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = {"registry": self.registry}
        ProcessCollector(**of)
        self.requests = Counter("idavlm_requests", "Requests by route and status.", ["route", "status"], **of)
        self.seconds = Histogram(
            "idavlm_request_seconds",
            "Seconds from request to the end of its response.",
            ["route"],
            buckets=_SECONDS,
            **of,
        )
        self.first_token_seconds = Histogram(
            "idavlm_first_token_seconds", "Seconds from request to first token.", buckets=_SECONDS, **of
        )
        self.tokens = Counter("idavlm_tokens", "Tokens of prompts and answers.", ["kind"], **of)
        self.batch_rows = Histogram("idavlm_batch_rows", "Rows of a batch.", buckets=_ROWS, **of)
        self.batch_seconds = Histogram("idavlm_batch_seconds", "Seconds of a batch.", buckets=_SECONDS, **of)

    def watch(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read when the metrics are."""
        Gauge(name, description, registry=self.registry).set_function(value)

    def add_batch(self, report: BatchReport) -> None:
        """Count a batch."""
        self.batch_rows.observe(report.rows)
        self.batch_seconds.observe(report.seconds)

    def text(self) -> bytes:
        """The metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
