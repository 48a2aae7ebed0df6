from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from pals.api.metrics import EndpointMetrics
from pals.api.observed import Seen
from tests.fakes import FakeCompletion


def samples(metrics: EndpointMetrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}


def test_a_request_is_counted_by_route_and_status() -> None:
    metrics = EndpointMetrics()

    metrics.observe(Seen(route="POST /v1/completions", status=200, seconds=0.25))

    labels = ("POST /v1/completions", "200")
    assert samples(metrics)["pals_request_seconds_count", *labels] == 1
    assert samples(metrics)["pals_request_seconds_sum", *labels] == 0.25


def test_a_completion_is_counted_while_it_runs_and_its_tokens_at_the_end() -> None:
    metrics = EndpointMetrics()
    completion = FakeCompletion([], n=1, end="stop", on_close=lambda: None)
    completion.completion_tokens = 5

    metrics.begin()
    running = samples(metrics)
    metrics.end(completion)
    ended = samples(metrics)

    assert running["pals_completions_running",] == 1
    assert ended["pals_completions_running",] == 0
    assert ended["pals_tokens_total", "prompt"] == 3
    assert ended["pals_tokens_total", "cached"] == 4
    assert ended["pals_tokens_total", "completion"] == 5
    assert ended["pals_first_token_seconds_sum",] == 0.02
    assert ended["pals_open_seconds_count",] == 1


def test_two_endpoints_count_apart() -> None:
    first, second = EndpointMetrics(), EndpointMetrics()

    first.begin()

    assert samples(second)["pals_completions_running",] == 0
