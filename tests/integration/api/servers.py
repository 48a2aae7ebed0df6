"""A real server on 127.0.0.1 for the length of a test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pals.api.admission import Admission
from pals.api.gate import GateSettings
from pals.api.keys import FixedKeys, KeyRing, key_of_environment
from pals.api.openai import build_openai_app
from pals.api.protocol import ConnectionLimits
from pals.api.server import HttpServer, listen
from pals.driver.interface import Driver


def only_key(text: str) -> KeyRing:
    return FixedKeys([key_of_environment(text)])


@contextmanager
def running(
    *drivers: Driver,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    limits: ConnectionLimits | None = None,
    admission: Admission | None = None,
    **gate_changes: Any,
) -> Iterator[str]:
    """Serve ``drivers`` on a free port and give its address."""
    keys = None if api_key is None else only_key(api_key)
    listener = listen(host, 0, has_keys=keys is not None)
    gate = GateSettings.for_bind(listener.host, listener.port, keys=keys)
    ready = threading.Event()
    server = HttpServer(
        build_openai_app(
            {driver.model_id: driver for driver in drivers},
            gate=replace(gate, **gate_changes),
            admission=admission,
        ),
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
