from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

PROGRAM = """
from pals.api.gate import GateSettings
from pals.api.openai import build_openai_app
from pals.api.server import HttpServer, listen
from tests.fakes import FakeDriver

listener = listen("127.0.0.1", 0, api_key=None)
gate = GateSettings.for_bind(listener.host, listener.port)
app = build_openai_app(FakeDriver(), gate=gate)
HttpServer(app, listener, on_ready=lambda url: print(url, flush=True)).run()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_which_itself_prints_nothing(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        answer = httpx.get(f"{url}/health")
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)

    assert answer.status_code == 200
    assert "server" not in answer.headers
    assert process.returncode == -number
    assert output == ""
