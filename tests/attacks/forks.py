"""Commands of `pals`, each in a process forked from one that has imported what they need.

A process that imports it by itself takes seconds. A forked one keeps the command line and
the environment that the first was started with, as others see them; whatever it executes
shows its own.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.processes import DEADLINE_S, Finished, Pals

LAZY = (
    "huggingface_hub",
    "pals.api.openai.app",
    "pals.api.server",
    "pals.backend.service",
    "pals.backend.transfer",
    "pals.driver.sessions",
    "pals.models.hub",
    "pals.models.inventory",
    "pals.net.administration",
    "pals.net.enrolment",
    "pals.net.invites",
    "pals.net.moving",
    "pals.net.fitting",
    "pals.net.removal",
    "pals.net.report_socket",
    "pals.net.standing",
    "pals.net.telling",
)
"""What commands import only when they run."""
READY = "ready\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One command: what it is given, and where its outputs go."""

    arguments: tuple[str, ...]
    stdin: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


class Forks:
    """The parent's side: runs commands as `Pals.run` does, one by one or at the same time."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder

    @property
    def process_id(self) -> int:
        """The process that forks: what it starts are commands, as of a shell."""
        return self._process.pid

    def run(self, *arguments: str | Path, stdin: str = "", **variables: str) -> Finished:
        """Run a command to its end."""
        order = Order(arguments=tuple(map(str, arguments)), stdin=stdin, variables=variables)
        return self.run_all([order])[0]

    def run_all(self, orders: Sequence[Order]) -> list[Finished]:
        """Run commands at the same time to the end of the last."""
        started_s = time.monotonic()
        asked = [self._ask(order) for order in orders]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process that forks has ended"
        took_s = time.monotonic() - started_s
        return [
            Finished(
                status=status,
                out=Path(ask["out"]).read_text(),
                err=Path(ask["err"]).read_text(),
                took_s=took_s,
            )
            for ask, status in zip(asked, json.loads(answer), strict=True)
        ]

    def _ask(self, order: Order) -> dict[str, object]:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        (folder / "in").write_text(order.stdin)
        files = {name: str(folder / name) for name in ("in", "out", "err")}
        return {"arguments": order.arguments, "variables": dict(order.variables), **files}


@contextmanager
def open_forks(pals: Pals, folder: Path) -> Iterator[Forks]:
    """Start the process that forks, in the environment of ``pals``; it ends with the block.

    Args:
        pals: Whose environment and mark every command has.
        folder: For the outputs of commands.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        env=pals.environment | {"OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == READY
        yield Forks(process, folder)
    finally:
        process.communicate(timeout=DEADLINE_S)


def main() -> None:
    """Fork for each command of each line, and say with which status they ended."""
    from pals.cli.app import COMMANDS
    from pals.net import membership

    modules = {target.partition(":")[0] for target, _ in COMMANDS.values()}
    for module in (*sorted(modules), *LAZY):
        importlib.import_module(module)
    membership._trusted()  # takes longer than a command, and is the same for all
    print(READY, end="", flush=True)  # noqa: T201
    for line in sys.stdin:
        children = [start(order) for order in json.loads(line)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)  # noqa: T201


def start(order: dict[str, object]) -> int:
    """Run a command in a process of its own and return its id."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        status = perform(**order)
    finally:
        os._exit(status)


def perform(*, arguments: list[str], variables: dict[str, str], **files: str) -> int:
    from pals.cli.app import main as pals

    for number, name in enumerate(("in", "out", "err")):
        flags = os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(files[name], flags, 0o600), number)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.update(variables)
    sys.argv = ["pals", *arguments]
    try:
        pals()
    except SystemExit as leaving:
        sys.stdout.flush()
        sys.stderr.flush()
        return leaving.code if isinstance(leaving.code, int) else 1


if __name__ == "__main__":
    main()
