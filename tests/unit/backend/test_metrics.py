from __future__ import annotations

from pals.backend.metrics import BackendMetrics


def test_requests_are_counted_and_timed_by_route_and_status() -> None:
    metrics = BackendMetrics()
    for seconds in (0.0015, 0.03):
        metrics.observe(transport="http", route="GET /a/{id}", status=200, seconds=seconds)
    metrics.observe(transport="libp2p", route="GET /a/{id}", status=403, seconds=3)
    lines = metrics.render().decode().splitlines()
    name, ok = "pals_backend_request_seconds", 'route="GET /a/{id}",status="200",transport="http"'
    assert f"{name}_count{{{ok}}} 2.0" in lines
    assert any(line.startswith(f'{name}_bucket{{le="0.002",{ok}}} 1.0') for line in lines)
    refused = 'route="GET /a/{id}",status="403",transport="libp2p"'
    assert f"{name}_sum{{{refused}}} 3.0" in lines


def test_two_backends_of_one_process_count_apart() -> None:
    first, second = BackendMetrics(), BackendMetrics()
    first.observe(transport="http", route="GET /", status=200, seconds=0)
    assert b"_count{" in first.render()
    assert b"_count{" not in second.render()
