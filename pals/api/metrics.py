"""What an endpoint counts: tokens, times and how many answers run, never who asked what."""

from __future__ import annotations

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from pals.api.observed import Seen
from pals.driver.interface import Completion

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)


class EndpointMetrics:
    """Counts of one endpoint, in a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Histogram(
            "pals_request_seconds",
            "Requests and how long each took, by route and status.",
            ("route", "status"),
            registry=registry,
            buckets=SECONDS,
        )
        self._running = Gauge(
            "pals_completions_running", "Completions that run now.", registry=registry
        )
        self._tokens = Counter(
            "pals_tokens", "Tokens, by what they are of.", ("kind",), registry=registry
        )
        self._open = Histogram(
            "pals_open_seconds",
            "From a request until a chain accepted it.",
            registry=registry,
            buckets=SECONDS,
        )
        self._first = Histogram(
            "pals_first_token_seconds",
            "From then until the first token.",
            registry=registry,
            buckets=SECONDS,
        )

    def observe(self, seen: Seen) -> None:
        """Count one request."""
        self._requests.labels(seen.route, str(seen.status)).observe(seen.seconds)

    def begin(self) -> None:
        """Count a completion that has begun."""
        self._running.inc()

    def end(self, completion: Completion) -> None:
        """Count a completion that is over, and what it took."""
        self._running.dec()
        cached = completion.cached_tokens
        self._tokens.labels("prompt").inc(completion.prompt_tokens - cached)
        self._tokens.labels("cached").inc(cached)
        self._tokens.labels("completion").inc(completion.completion_tokens)
        timings = completion.timings()
        self._open.observe(timings.open_ms / 1000)
        if timings.first_token_ms is not None:
            self._first.observe(timings.first_token_ms / 1000)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)


def metrics_route(metrics: EndpointMetrics) -> HTTPRouteHandler:
    """Return the handler of ``GET /metrics``."""

    @get("/metrics", sync_to_thread=False)
    def read_metrics() -> Response[bytes]:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return read_metrics
