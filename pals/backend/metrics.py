"""What the backend counts: requests by route and status, never who or which swarm."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class BackendMetrics:
    """Counts and times of one backend, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "pals_backend_request_seconds",
            "Requests and how long each took, by transport, route and status.",
            ("transport", "route", "status"),
            registry=self._registry,
            buckets=BUCKETS_S,
        )

    def observe(self, *, transport: str, route: str, status: int, seconds: float) -> None:
        """Count one request.

        Args:
            transport: ``http`` or ``libp2p``.
            route: The route's template, with names where a request has values.
            status: HTTP status of the answer, or the one its error stands for.
            seconds: Time from the request's head to the end of the answer.
        """
        self._requests.labels(transport, route, str(status)).observe(seconds)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format, `CONTENT_TYPE`."""
        return generate_latest(self._registry)
