"""A real server on 127.0.0.1 for the length of a test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pals.api.gate import GateSettings
from pals.api.openai import build_openai_app
from pals.api.protocol import ConnectionLimits
from pals.api.server import HttpServer, listen
from pals.driver.interface import Driver


@contextmanager
def running(
    *drivers: Driver, api_key: str | None = None, limits: ConnectionLimits | None = None
) -> Iterator[str]:
    """Serve ``drivers`` on a free port and give its address."""
    listener = listen("127.0.0.1", 0, api_key=api_key)
    gate = GateSettings.for_bind(listener.host, listener.port, api_key=api_key)
    ready = threading.Event()
    server = HttpServer(
        build_openai_app({driver.model_id: driver for driver in drivers}, gate=gate),
        listener,
        on_ready=lambda _: ready.set(),
        limits=limits,
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield listener.url
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
