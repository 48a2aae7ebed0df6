"""llama.cpp's own benchmarks: built from the sources that llama-cpp-python brings, and run.

``python -m benchmarks.llama_cpp`` builds them (`make rivals`), for this machine's processor
and in a folder that git ignores. Nothing of it is a part of Pals.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

FOLDER = Path(__file__).parents[1] / "build" / "llama.cpp"
PROGRAMS = ("llama-bench", "llama-batched-bench", "ggml-rpc-server", "llama-server")
PACKAGE = "llama-cpp-python"
SOURCES = "vendor/llama.cpp"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "GGML_RPC": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_APP": "OFF",
}
WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""Flags for x86-64: where the processor has AMX, Q8_0 dies of an illegal instruction."""

RUN_DEADLINE_S = 600.0
SERVER_DEADLINE_S = 10.0
LOAD_DEADLINE_S = 120.0
POLL_S = 0.05
ALL_LAYERS = 99
LOST = 1
"""One more test, of one sequence: llama-batched-bench may end before it has printed its last."""

CONTEXT_STEP = 256
"""Of the context of a sequence; it leaves out what does not fit."""


Line = TypeVar("Line")


class BenchLine(msgspec.Struct, frozen=True):
    """A line of ``llama-bench -o jsonl``: tokens per second of one test."""

    n_prompt: int
    n_gen: int
    avg_ts: float


class BatchedLine(msgspec.Struct, frozen=True):
    """A line of ``llama-batched-bench --output-format jsonl``.

    Attributes:
        pl: Sequences at a time.
        speed_tg: Tokens per second of all of them.
    """

    pl: int
    speed_tg: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """The built programs.

    Attributes:
        folder: Where they are.
        threads: That each computes with.
    """

    folder: Path
    threads: int

    def prefill_rate(self, model: Path, tokens: int) -> float:
        """Return the tokens per second of a prompt, by ``llama-bench``."""
        output = self._run(
            "llama-bench", "-m", model, "-p", tokens, "-n", 0, "-r", 1, "-o", "jsonl"
        )
        return read_lines(output, BenchLine)[0].avg_ts

    def decode_rates(
        self,
        model: Path,
        *,
        rows: Sequence[int],
        prompt_tokens: int,
        steps: int,
        servers: Sequence[str] = (),
    ) -> dict[int, float]:
        """Return the tokens per second of some sequences together, by ``llama-batched-bench``.

        Args:
            model: GGUF file.
            rows: Sequences at a time.
            prompt_tokens: That each holds before.
            steps: That are timed.
            servers: ``host:port`` of RPC servers, which then hold all layers in equal parts.
        """
        each = -(-(prompt_tokens + steps) // CONTEXT_STEP) * CONTEXT_STEP
        remote: list[object] = []
        if servers:
            split = ",".join("1" for _ in servers)
            remote = ["--rpc", ",".join(servers), "-ngl", ALL_LAYERS, "-ts", split]
        output = self._run(
            *("llama-batched-bench", "-m", model, "-c", max(rows) * each, "-pps"),
            *("-npp", prompt_tokens, "-ntg", steps, "-npl", ",".join(map(str, [*rows, LOST]))),
            *("--output-format", "jsonl", *remote),
        )
        lines = read_lines(output, BatchedLine)[: len(rows)]
        return {line.pl: line.speed_tg for line in lines}

    @contextmanager
    def open_servers(self, count: int) -> Generator[list[str]]:
        """Run RPC servers on loopback until the block ends; give where they listen.

        Raises:
            OSError: One does not listen in time.
        """
        with ExitStack() as stack:
            servers: list[str] = []
            for _ in range(count):
                port = _free_port()
                command = [self.folder / PROGRAMS[2], "-t", self.threads, "-p", port]
                process = stack.enter_context(
                    subprocess.Popen(
                        [str(part) for part in command],
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )
                stack.callback(process.kill)
                _wait_until_listening(port)
                servers.append(f"127.0.0.1:{port}")
            yield servers

    @contextmanager
    def open_endpoint(self, model: Path, *, slots: int, context: int) -> Generator[str]:
        """Run ``llama-server`` on loopback until the block ends; give its address.

        Args:
            model: GGUF file.
            slots: Sequences at a time.
            context: Tokens of each.

        Raises:
            TimeoutError: It has not loaded the model in time.
        """
        port = _free_port()
        command = [
            *(self.folder / PROGRAMS[3], "-m", model, "--host", "127.0.0.1", "--port", port),
            *("-t", self.threads, "-np", slots, "-c", slots * context, "--no-webui"),
        ]
        with subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                _wait_until_healthy(f"http://127.0.0.1:{port}/health")
                yield f"http://127.0.0.1:{port}"
            finally:
                process.kill()

    def _run(self, program: str, *arguments: object) -> str:
        done = subprocess.run(
            [str(self.folder / program), *map(str, arguments), "-t", str(self.threads)],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=RUN_DEADLINE_S,
            text=True,
        )
        return done.stdout


def find_llama_cpp(threads: int) -> LlamaCpp | None:
    """Return the built programs, or None and say on standard error how to build them."""
    folder = FOLDER / "bin"
    if all(os.access(folder / program, os.X_OK) for program in PROGRAMS):
        return LlamaCpp(folder=folder, threads=threads)
    print("llama.cpp is missing: `make rivals` builds it", file=sys.stderr)
    return None


def read_lines(output: str, kind: type[Line]) -> list[Line]:
    """Return the JSON lines of what a program has printed."""
    lines = (line for line in output.splitlines() if line.startswith("{"))
    return [msgspec.json.decode(line, type=kind) for line in lines]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_listening(port: int) -> None:
    deadline = time.monotonic() + SERVER_DEADLINE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
        else:
            return


def _wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + LOAD_DEADLINE_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).is_success:
                return
        time.sleep(POLL_S)
    raise TimeoutError(f"no model at {url} after {LOAD_DEADLINE_S:.0f} s")


# --- the build -----------------------------------------------------------------------


def build(jobs: int) -> None:
    """Download the sources and build the programs anew; takes minutes.

    Raises:
        FileNotFoundError: There is no cmake.
        CalledProcessError: The download or the build failed.
    """
    if shutil.which("cmake") is None:
        raise FileNotFoundError("cmake is not found: install it, and a C++ compiler")
    shutil.rmtree(FOLDER, ignore_errors=True)  # it remembers where the sources were
    with tempfile.TemporaryDirectory(prefix="pals-llama-cpp-") as name:
        sources = _download(Path(name))
        chosen = dict(OPTIONS)
        if platform.machine() == "x86_64":
            chosen |= {"CMAKE_C_FLAGS": WITHOUT_AMX, "CMAKE_CXX_FLAGS": WITHOUT_AMX}
        options = [f"-D{option}={value}" for option, value in chosen.items()]
        subprocess.run(["cmake", "-S", sources, "-B", FOLDER, *options], check=True)
        targets = ["--target", *PROGRAMS]
        subprocess.run(["cmake", "--build", FOLDER, *targets, "-j", str(jobs)], check=True)


def _download(folder: Path) -> Path:
    """Return the folder of llama.cpp's sources, unpacked from the package's."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, PACKAGE],
        cwd=folder,
        check=True,
    )
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    [sources] = folder.glob(f"*/{SOURCES}")
    return sources


if __name__ == "__main__":
    build(os.cpu_count() or 1)
