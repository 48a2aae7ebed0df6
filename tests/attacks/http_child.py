"""An endpoint in a process of its own, which tells of every way out that it takes.

Run as ``python -m tests.attacks.http_child PROFILE``; it logs like a server of ours, at its
most talkative, and answers each question with what it made of it.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pals import config
from pals.api.gate import GateSettings
from pals.api.key_file import open_keys
from pals.api.openai import build_openai_app
from pals.api.server import HttpServer, listen
from pals.cli.logs import configure_logs
from pals.driver.interface import Completion, GenerateParams, Message
from tests.attacks.raw_http import Endpoint
from tests.fakes import FakeDriver

ROOT = Path(__file__).parents[2]
END_S = 20
OUTWARD = "OUTWARD"
WAY_OUT_VARIABLE = "PALS_TEST_WAY_OUT"
WAYS_OUT = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostby",
    "socket.sendto",
    "socket.sendmsg",
    "subprocess.Popen",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "urllib.Request",
    "http.client.connect",
)
OWN_FOLDERS = (sys.prefix, sys.base_prefix, str(ROOT))


class ShowingDriver(FakeDriver):
    """Answers with a digest of what it was asked; asked to, it takes a way out."""

    async def chat(self, messages: Sequence[Message], params: GenerateParams) -> Completion:
        if os.environ.get(WAY_OUT_VARIABLE):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
                raw.connect(("127.0.0.1", 9))
        self.script = (hashlib.sha256(repr((messages, params)).encode()).hexdigest(),)
        return await super().chat(messages, params)


class Child:
    """The process, as a test sees it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.endpoint = Endpoint(url)
        self._process = process
        self._log = log

    def log(self) -> str:
        """Return all that it has said on standard error."""
        return self._log.read_text()

    def ways_out(self) -> list[str]:
        return [line for line in self.log().splitlines() if line.startswith(OUTWARD)]

    def peak_bytes(self) -> int:
        """Return the most memory that it has had."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10


@contextmanager
def started(profile: Path, **variables: str) -> Iterator[Child]:
    """Run the process for the length of a test."""
    log = profile / "stderr"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.http_child", str(profile)],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=stderr,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            url = process.stdout.readline().decode().strip()
            assert url, log.read_text()
            yield Child(process, log, url)
        finally:
            process.terminate()
            process.wait(END_S)


def main(profile: Path) -> None:
    """Serve until terminated."""
    configure_logs("json")
    keys = open_keys(config.take_environment(config.API_KEY_VARIABLE), None, profile)
    listener = listen("127.0.0.1", 0, has_keys=keys is not None)
    gate = GateSettings.for_bind(listener.host, listener.port, keys=keys)
    driver = ShowingDriver()

    def announce(url: str) -> None:
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()
        sys.addaudithook(tell_ways_out)

    HttpServer(
        build_openai_app({driver.model_id: driver}, gate=gate), listener, on_ready=announce
    ).run()


def tell_ways_out(event: str, arguments: tuple[object, ...]) -> None:
    """Write down what leads out of the process, or into files that are not the program's."""
    is_foreign_file = event == "open" and not str(arguments[0]).startswith(OWN_FOLDERS)
    if is_foreign_file or event.startswith(WAYS_OUT):
        os.write(2, f"{OUTWARD} {event} {arguments[:2]!r}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
