"""A real membership backend on 127.0.0.1 for the length of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from litestar.types import ASGIApp

from pals.api.gate import GateSettings
from pals.api.membership import build_membership_app
from pals.api.server import HttpServer, listen_anywhere
from pals.backend.limiter import BackendLimiter, RateLimits
from pals.backend.service import BackendService

UNLIMITED = RateLimits(
    redeems=10_000, redeems_of_swarm=10_000, swarms=10_000, writes=100_000, reads=100_000
)


@contextmanager
def running_backend(
    service: BackendService,
    *,
    limits: RateLimits = UNLIMITED,
    proxies: frozenset[str] = frozenset(),
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
) -> Iterator[str]:
    """Serve ``service`` on a free port and give its address; ``wrap`` may change the app."""
    listener = listen_anywhere("127.0.0.1", 0)
    gate = GateSettings.for_bind(listener.host, listener.port)
    app = build_membership_app(service, gate=gate, limiter=BackendLimiter(limits), proxies=proxies)
    ready = threading.Event()
    server = HttpServer(wrap(app), listener, on_ready=lambda _: ready.set())
    with _in_thread(server, ready):
        yield listener.url


@contextmanager
def running_app(app: ASGIApp) -> Iterator[str]:
    """Serve any application, such as one that lies, on a free port."""
    listener = listen_anywhere("127.0.0.1", 0)
    ready = threading.Event()
    server = HttpServer(app, listener, on_ready=lambda _: ready.set())
    with _in_thread(server, ready):
        yield listener.url


@contextmanager
def _in_thread(server: HttpServer, ready: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
