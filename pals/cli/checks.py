"""The checks of `pals doctor`: each looks at one thing and says what to do about it.

A check never raises for what it looks for; it returns a finding. Native packages are
tried in a process of their own, since a broken build may crash or hang the one that
imports it.
"""

from __future__ import annotations

import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pals.config import (
    PRIVATE_FILE,
    PRIVATE_FOLDER,
    Profile,
    cache_dir,
    check_private,
    child_environment,
)
from pals.engine.memory import free_host_bytes
from pals.errors import PalsError

State = Literal["ok", "warn", "fail", "skipped"]

OLDEST_PYTHON = (3, 11)
LEAST_FREE_MEMORY_BYTES = 2 << 30
LEAST_FREE_DISK_BYTES = 5 << 30
NATIVE_DEADLINE_S = 120
# The clock of a machine that lost its battery starts years before this was written.
EARLIEST_SANE_TIME_S = 1_767_225_600
LATEST_SANE_TIME_S = 4_102_444_800

_LIBP2P = "import fastecdsa.curve, libp2p, importlib.metadata as m; print(m.version('libp2p'))"
_DEVICES = "import jax; print(', '.join(str(d) for d in jax.devices()))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is examined.

    Attributes:
        profile: The profile folder.
        port: The port that `pals serve` would take.
        model: A model to look for; None for whatever was imported.
    """

    profile: Path
    port: int
    model: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found; ``hint`` says what to do unless the state is ok."""

    state: State
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check of the registry.

    Attributes:
        name: The word in the first column.
        code: The stable name for programs.
        run: Looks and returns what it found.
        needs: Names of checks without whose success this one says nothing new.
    """

    name: str
    code: str
    run: Callable[[Subject], Finding]
    needs: tuple[str, ...] = ()


def run_checks(checks: Sequence[Check], subject: Subject) -> dict[str, Finding]:
    """Run checks in order; one whose needs failed is skipped."""
    found: dict[str, Finding] = {}
    for check in checks:
        broken = [need for need in check.needs if found[need].state in ("fail", "skipped")]
        if broken:
            found[check.name] = Finding(state="skipped", text=f"needs {', '.join(broken)}")
        else:
            found[check.name] = check.run(subject)
    return found


def check_python(_: Subject) -> Finding:
    """Compare the interpreter's version with the oldest that runs Pals."""
    text = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= OLDEST_PYTHON:
        return Finding(state="ok", text=text)
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return Finding(state="fail", text=text, hint=f"install Python {wanted} or newer")


def check_libp2p(_: Subject) -> Finding:
    """Import libp2p and the C extension that it was built with."""
    hint = "install libgmp-dev (macOS: brew install gmp), then reinstall `fastecdsa`"
    return _try_native(_LIBP2P, hint)


def check_device(_: Subject) -> Finding:
    """List the devices that jax finds."""
    return _try_native(_DEVICES, "install jax for this machine: `pip install 'pals[cuda12]'`")


def check_memory(_: Subject) -> Finding:
    """Compare the memory that is free with what a small shard takes."""
    hint = "close programs, or serve fewer layers"
    return _at_least(free_host_bytes(), LEAST_FREE_MEMORY_BYTES, hint)


def check_disk(_: Subject) -> Finding:
    """Compare the free space where models are kept with what a small one takes."""
    free = shutil.disk_usage(_existing_parent(cache_dir())).free
    hint = "free space there, or point `PALS_CACHE_DIR` elsewhere"
    return _at_least(free, LEAST_FREE_DISK_BYTES, hint)


def check_port(subject: Subject) -> Finding:
    """Bind the port of `pals serve` for a moment."""
    try:
        with socket.create_server(("127.0.0.1", subject.port)):
            return Finding(state="ok", text=f"{subject.port} is free")
    except OSError as error:
        text = f"{subject.port}: {error.strerror}"
        return Finding(state="warn", text=text, hint="choose another with `--port`")


def check_clock(_: Subject) -> Finding:
    """Compare the wall clock with the span in which this version can be in use."""
    now = time.time()
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if EARLIEST_SANE_TIME_S <= now <= LATEST_SANE_TIME_S:
        return Finding(state="ok", text=text)
    return Finding(state="fail", text=text, hint="set the clock: signatures are checked by it")


def check_profile(subject: Subject) -> Finding:
    """Check that the profile exists and that nobody else can read its secrets."""
    profile = Profile(subject.profile)
    if not subject.profile.is_dir():
        return Finding(state="warn", text=f"none at {subject.profile}", hint="run `pals init`")
    try:
        profile.check_folder()
        for path in sorted(p for p in profile.path.rglob("*") if not p.is_symlink()):
            wanted = PRIVATE_FOLDER if path.is_dir() else PRIVATE_FILE
            check_private(path, path.stat(), wanted)
    except PalsError as error:
        return Finding(state="fail", text=str(error), hint=error.hint)
    except OSError as error:
        return Finding(state="fail", text=str(error), hint="check who owns the profile")
    mode = stat.S_IMODE(profile.path.stat().st_mode)
    return Finding(state="ok", text=f"{profile.path} ({mode:o})")


def check_model(subject: Subject) -> Finding:
    """Open the model that was asked for, or the imported ones."""
    # Reading models pulls in numpy, which no other check needs.
    from pals.models.hub import imported_models, resolve_model

    try:
        if subject.model is not None:
            return Finding(state="ok", text=resolve_model(subject.model).model_id)
        names = [snapshot.model_id for snapshot in imported_models()]
    except PalsError as error:
        return Finding(state="fail", text=str(error), hint=error.hint)
    if names:
        return Finding(state="ok", text=", ".join(names))
    hint = "import one with `pals models import FILE.gguf`, or name one on the hub"
    return Finding(state="warn", text="none imported", hint=hint)


CHECKS = (
    Check(name="python", code="DOCTOR-PYTHON", run=check_python),
    Check(name="libp2p", code="DOCTOR-LIBP2P", run=check_libp2p, needs=("python",)),
    Check(name="device", code="DOCTOR-DEVICE", run=check_device, needs=("python",)),
    Check(name="memory", code="DOCTOR-MEMORY", run=check_memory),
    Check(name="disk", code="DOCTOR-DISK", run=check_disk),
    Check(name="port", code="DOCTOR-PORT", run=check_port),
    Check(name="clock", code="DOCTOR-CLOCK", run=check_clock),
    Check(name="profile", code="DOCTOR-PROFILE", run=check_profile),
    Check(name="model", code="DOCTOR-MODEL", run=check_model, needs=("disk",)),
)
"""Every check, in the order it runs; a check comes after those it needs."""


def _try_native(program: str, hint: str) -> Finding:
    try:
        done = subprocess.run(  # noqa: S603 # this interpreter, with a program of this file
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=NATIVE_DEADLINE_S,
            env=child_environment({}),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(state="fail", text=f"no answer in {NATIVE_DEADLINE_S} s", hint=hint)
    if done.returncode == 0:
        return Finding(state="ok", text=done.stdout.strip())
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return Finding(state="fail", text=lines[-1][:200], hint=hint)


def _at_least(free: int, least: int, hint: str) -> Finding:
    text = f"{free / 1e9:.1f} GB free"
    if free >= least:
        return Finding(state="ok", text=text)
    return Finding(state="warn", text=f"{text}, less than {least / 1e9:.1f} GB", hint=hint)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
