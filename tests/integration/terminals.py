"""Runs what a page shows, on machines that are folders: each user has a home of their own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx

from pals import config
from tests.checkpoints import make_llama_checkpoint
from tests.integration.pages import ROOT, Step, matches
from tests.unit.models.gguf_files import hf_weights, to_gguf, write_gguf

DEADLINE_S = 60.0
END_S = 10.0
DEMO_MODEL_FOLDER = "HuggingFaceTB--SmolLM2-135M-Instruct"
DEFAULT_PORTS = {"backend": "8470", "serve": "8080"}
FEW_POSITIONS = 128  # halves the programs to compile
SERVERS = frozenset({"backend", "serve", "shard"})
MEMBERS = frozenset({"serve", "shard"})
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
LOOPBACK_PORTS = f"--listen {LOOPBACK} --redeem-listen {LOOPBACK}"
ACTIVATION = ". .venv/bin/activate"
# The model in place of the one that the pages name has 2 layers where that has 30.
STAND_INS = {
    "192.168.1.10": "127.0.0.1",
    "0.0.0.0": "127.0.0.1",
    "15:30": "1:2",
    "0:15": "0:1",
}

_INVITE = re.compile(r"pp_inv_[\w.-]+")


class Terminals:
    """Runs the steps of one page; every process ends with the block.

    Args:
        folder: For the homes of the users, and one cache of all of them.
        programs: Where that cache keeps compiled programs.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder = folder
        (folder / "cache").mkdir(mode=0o700)
        (folder / "cache" / "xla").symlink_to(programs)
        self._invite = ""
        self._ports = dict(zip(DEFAULT_PORTS.values(), free_ports(2), strict=True))
        self._running: list[subprocess.Popen[str]] = []
        make_llama_checkpoint(
            folder / "cache" / "models" / DEMO_MODEL_FOLDER,
            num_layers=2,
            config={"max_position_embeddings": FEW_POSITIONS},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._running:
            process.send_signal(signal.SIGTERM)
        late = [process.args for process in self._running if not ended_in_time(process)]
        assert late == []

    def run(self, step: Step) -> None:
        """Run a step to its end, or a server until it printed what the page shows."""
        if step.command.startswith("make "):
            assert_make_target(step.command.split()[1])
            return
        if step.command == ACTIVATION:
            return  # the commands on the path are those of the tests' own environment
        if server_in(step.command) == "serve":  # which the page then means by the default port
            (self._ports[DEFAULT_PORTS["serve"]],) = free_ports(1)
        command = self._complete(self._translate(step.command))
        shown = [self._translate(line) for line in step.output]
        if server_in(command):
            self._start(command, step.user, shown)
        else:
            self._finish(command, step.user, shown)

    def run_python(self, source: str) -> None:
        """Run an example program to its end."""
        done = self._completed([sys.executable, "-c", self._translate(source)], "anna")
        assert done.returncode == 0, done.stderr
        assert done.stdout, "the example printed nothing"

    # --- one command -----------------------------------------------------------------

    def _finish(self, command: str, user: str, shown: list[str]) -> None:
        if command.startswith("curl ") and shutil.which("curl") is None:
            output = send_like_curl(command)
        else:
            done = self._completed(["bash", "-c", command], user)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            output = done.stdout
        if found := _INVITE.search(output):
            self._invite = found[0]
        assert_shown(shown, iter(output.splitlines()), command)

    def _completed(self, arguments: list[str], user: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments,
            cwd=self._home(user),
            env=self._environment(user),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    def _start(self, command: str, user: str, shown: list[str]) -> None:
        assert shown, f"the page shows nothing that `{command}` prints"
        log = self._home(user) / f"{len(self._running)}.log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                ["bash", "-c", f"exec env {command}"],
                cwd=self._home(user),
                env=self._environment(user),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._running.append(process)
        assert process.stdout is not None
        with ended_after(DEADLINE_S, process):
            assert_shown(shown, lines_of(process.stdout), f"{command}\n{log.read_text()}")

    # --- the machines ----------------------------------------------------------------

    def _home(self, user: str) -> Path:
        home = self._folder / user
        if not home.is_dir():
            home.mkdir()
            write_gguf(home / "model.gguf", to_gguf(hf_weights()))
        return home

    def _environment(self, user: str) -> dict[str, str]:
        pals = {"HOME": str(self._home(user)), config.CACHE_DIR_VARIABLE: f"{self._folder}/cache"}
        dropped = ("PALS_", "XDG_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return kept | pals | {"PATH": path, "HF_HUB_OFFLINE": "1"}

    def _translate(self, text: str) -> str:
        """Put this machine's address, free ports and the small model's layers in place."""
        for theirs, ours in (STAND_INS | self._ports).items():
            text = text.replace(theirs, ours)
        return text

    def _complete(self, command: str) -> str:
        """Put the last invite and, where the page trusts in the default, the port in place."""
        command = command.replace("pp_inv_…", self._invite or "pp_inv_…")
        server = server_in(command)
        if server in MEMBERS:
            command = f"{command} {LOOPBACK_PORTS}"
        default = DEFAULT_PORTS.get(server or "")
        return command if default is None else f"{command} --port {self._ports[default]}"


# --- pieces --------------------------------------------------------------------------


def server_in(command: str) -> str | None:
    """Return which server a command starts, if any."""
    words = [word for word in shlex.split(command) if "=" not in word]
    return words[1] if words[0] == "pals" and words[1] in SERVERS else None


def assert_make_target(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def assert_shown(shown: list[str], lines: Iterator[str], what: str) -> None:
    """Check that the lines shown come in their order, whatever else is between them."""
    for wanted in shown:
        assert wanted == "…" or any(matches(wanted, line) for line in lines), (
            f"no {wanted!r} came from {what}"
        )


def lines_of(stream: IO[str]) -> Iterator[str]:
    for line in stream:
        yield line.rstrip("\n")


@contextmanager
def ended_after(seconds: float, process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill a process that keeps its reader waiting for too long."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def ended_in_time(process: subprocess.Popen[str]) -> bool:
    """Wait for a process that was asked to end; kill it when it does not."""
    assert process.stdout is not None
    process.stdout.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [str(listener.getsockname()[1]) for listener in sockets]


def send_like_curl(command: str) -> str:
    """Send the request that a curl line with `-H` and `-d` means."""
    words = iter(shlex.split(command)[1:])
    url, body, headers = "", None, {}
    for word in words:
        if word == "-H":
            name, _, value = next(words).partition(":")
            headers[name] = value.strip()
        elif word == "-d":
            body = next(words)
        else:
            url = word
    method = "GET" if body is None else "POST"
    with httpx.Client(trust_env=False, timeout=DEADLINE_S) as client:
        return client.request(method, url, headers=headers, content=body).text
