from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.fakes import FakeDriver

PROGRAM = """
from pals.api.gate import GateSettings
from pals.api.openai import build_openai_app
from pals.api.server import HttpServer, listen
from tests.fakes import FakeDriver

listener = listen("127.0.0.1", 0, has_keys=False)
gate = GateSettings.for_bind(listener.host, listener.port)
driver = FakeDriver()
app = build_openai_app({driver.model_id: driver}, gate=gate)
HttpServer(app, listener, on_ready=lambda url: print(url, flush=True)).run()
"""
ENDLESS = PROGRAM.replace("FakeDriver()", 'FakeDriver(["a"], end=None)')
QUESTION = {
    "model": FakeDriver.model_id,
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
}


@contextmanager
def started(program: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_which_itself_prints_nothing(number: signal.Signals) -> None:
    with started(PROGRAM) as (process, url):
        answer = httpx.get(f"{url}/health")
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)

    assert answer.status_code == 200
    assert "server" not in answer.headers
    assert process.returncode == -number
    assert output == ""


def test_an_open_stream_does_not_hold_up_the_end() -> None:
    with (
        started(ENDLESS) as (process, url),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=QUESTION) as answer,
    ):
        assert next(answer.iter_lines()).startswith("data:")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)

    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_a_second_one_does_not(number: signal.Signals) -> None:
    options = "drain_s=600, on_leave=lambda: print('leaving', flush=True), on_ready="
    patient = ENDLESS.replace("on_ready=", options)
    with (
        started(patient) as (process, url),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=QUESTION) as answer,
    ):
        lines = answer.iter_lines()  # whose end would close the connection
        assert next(lines).startswith("data:")
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.readline() == "leaving\n"
        wait_until_refused(url)
        assert process.poll() is None, "it waits for the answer that runs"
        process.send_signal(number)
        process.communicate(timeout=20)

    assert process.returncode == -number


def wait_until_refused(url: str) -> None:
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        try:
            httpx.get(f"{url}/health")
        except httpx.TransportError:
            return
    raise AssertionError("it still takes requests")


def test_what_nobody_handles_is_logged_without_its_text() -> None:
    program = PROGRAM.replace(
        "HttpServer(",
        """
import asyncio

class Failing(FakeDriver):
    async def chat(self, messages, params):
        asyncio.get_running_loop().call_soon(int, "canary")
        return await super().chat(messages, params)

driver = Failing()
app = build_openai_app({driver.model_id: driver}, gate=gate)
HttpServer(""",
    )
    with started(program) as (process, url):
        answer = httpx.post(f"{url}/v1/chat/completions", json=QUESTION)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)

    assert answer.status_code == 200
    assert "internal error: ValueError" in said
    assert "canary" not in said
