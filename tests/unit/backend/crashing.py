"""Backends that die at a chosen moment of an operation, and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from pals.backend.service import BackendService, SignedRequest
from pals.errors import PalsError, StorageFailed
from pals.types import SwarmId
from tests.postgres import PostgresServer


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One call of the service.

    Attributes:
        record: Of a genesis when there is no swarm id, of a join when there is an auth.
        now: Unix seconds by the backend's clock.
        authorization: Proof of an administrator's request over ``record``; empty for a leave.
    """

    record: bytes
    now: float
    swarm_id: bytes = b""
    auth: bytes = b""
    path: str = ""
    authorization: str = ""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What was answered: an entry, or the name of an error's class."""

    entry: bytes = b""
    error: str = ""


class Died(Exception):
    """The backend was killed before it answered: nobody knows what it did."""


class Crashing(Protocol):
    """A backend in the hands of a test."""

    def call(self, operation: Operation, die_at: int | None = None) -> Outcome:
        """Run an operation, and kill something at its n-th step, or before its answer.

        Raises:
            Died: It was killed; it is up again.
        """
        ...

    def entries(self, swarm_id: SwarmId) -> tuple[bytes, ...]: ...

    def crash(self) -> None:
        """Kill it between two operations and bring it up again."""
        ...

    def close(self) -> None: ...


class Tripwire:
    """Runs an action at the n-th step of a transaction: a statement or the commit."""

    def __init__(self, engine: Engine, action: Callable[[], None]) -> None:
        self._action = action
        self._left: int | None = None
        sa.event.listen(engine, "before_cursor_execute", self._step)
        sa.event.listen(engine, "commit", self._step)

    def arm(self, steps: int | None) -> None:
        self._left = steps

    def spring(self) -> None:
        """Run the action unless a step did."""
        if self._left is not None:
            self._left = None
            self._action()

    def _step(self, *_: object) -> None:
        if self._left == 0:
            self.spring()
        elif self._left is not None:
            self._left -= 1


def perform(service: BackendService, operation: Operation) -> Outcome:
    """Run an operation on a service."""
    try:
        return Outcome(entry=_perform(service, operation))
    except PalsError as error:
        return Outcome(error=type(error).__name__)


def _perform(service: BackendService, operation: Operation) -> bytes:
    swarm_id = SwarmId(operation.swarm_id)
    if not swarm_id:
        return service.create_swarm(operation.record)
    if operation.auth:
        return service.redeem(swarm_id, operation.auth, operation.record)
    request = SignedRequest(
        method="POST",
        path=operation.path,
        body=operation.record,
        authorization=operation.authorization,
    )
    return service.append_record(swarm_id, operation.record, request)


class _Fell(BaseException):
    """Unwinds a service in the middle of what it did, as if its process had ended."""


class Abandoned:
    """A service in this process that is left where it stands and made anew."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._now = 0.0
        self._open()

    def call(self, operation: Operation, die_at: int | None = None) -> Outcome:
        self._now = operation.now
        self._wire.arm(die_at)
        try:
            outcome = perform(self._service, operation)
            self._wire.spring()
        except _Fell:
            self.crash()
            raise Died from None
        return outcome

    def entries(self, swarm_id: SwarmId) -> tuple[bytes, ...]:
        return self._service.entries(swarm_id).entries or ()

    def crash(self) -> None:
        self._service.close()
        self._open()

    def close(self) -> None:
        self._service.close()

    def _open(self) -> None:
        self._service = BackendService(self._url, clock=lambda: self._now)
        self._wire = Tripwire(self._service._engine, self._fall)

    def _fall(self) -> None:
        raise _Fell


class ServerKilled:
    """A service that goes on while PostgreSQL is killed under it."""

    def __init__(self, postgres: PostgresServer) -> None:
        self._postgres = postgres
        self._now = 0.0
        self._service = BackendService(postgres.new_url(), clock=lambda: self._now)
        self._wire = Tripwire(self._service._engine, postgres.kill)

    def call(self, operation: Operation, die_at: int | None = None) -> Outcome:
        self._now = operation.now
        self._wire.arm(die_at)
        outcome = perform(self._service, operation)
        self._wire.spring()
        if die_at is not None:
            self._postgres.start()
            raise Died
        assert outcome.error != StorageFailed.__name__
        return outcome

    def entries(self, swarm_id: SwarmId) -> tuple[bytes, ...]:
        return self._service.entries(swarm_id).entries or ()

    def crash(self) -> None:
        self._postgres.kill()
        self._postgres.start()

    def close(self) -> None:
        self._service.close()
