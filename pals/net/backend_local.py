"""The backend inside this process: its service, called in worker threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

import trio

from pals.errors import BackendRefused
from pals.net.backend import FetchedRecords
from pals.swarm.calls import append_proof, append_request
from pals.swarm.identity import Identity
from pals.types import SwarmId

if TYPE_CHECKING:
    from pals.backend.service import BackendService, SignedRequest

_T = TypeVar("_T")

CALLS_AT_ONCE = 8


class LocalBackend:
    """`pals.net.backend.Backend` over a database that this process opens.

    Args:
        url: The address by which others know the backend.
        open_service: Gives the service for one call; several threads may be in it at once.
    """

    def __init__(
        self, url: str, open_service: Callable[[], AbstractContextManager[BackendService]]
    ) -> None:
        self.url = url
        self._open_service = open_service
        self._threads = trio.CapacityLimiter(CALLS_AT_ONCE)

    async def fetch_key(self) -> bytes:
        return await self._call(lambda service: service.public_key)

    async def create_swarm(self, genesis: bytes) -> bytes:
        return await self._call(lambda service: service.create_swarm(genesis))

    async def append(
        self, swarm_id: SwarmId, record: bytes, *, signer: Identity | None = None
    ) -> bytes:
        proof = append_proof(signer, swarm_id, record, at=int(time.time()))
        request = signed_append(swarm_id, record, proof)
        return await self._call(lambda service: service.append_record(swarm_id, record, request))

    async def redeem(self, swarm_id: SwarmId, auth: bytes, join: bytes) -> bytes:
        raise BackendRefused(url=self.url, status=405, problem="it is this profile's own backend")

    async def fetch_records(self, swarm_id: SwarmId, *, etag: str = "") -> FetchedRecords:
        return await self._call(lambda service: read_records(service, swarm_id, etag))

    async def put_hint(self, swarm_id: SwarmId, hint: bytes) -> None:
        await self._call(lambda service: service.put_hint(swarm_id, hint))

    async def fetch_hints(self, swarm_id: SwarmId) -> tuple[bytes, ...]:
        return await self._call(lambda service: service.hints(swarm_id))

    async def _call(self, work: Callable[[BackendService], _T]) -> _T:
        def run() -> _T:
            with self._open_service() as service:
                return work(service)

        return await trio.to_thread.run_sync(run, limiter=self._threads)


def signed_append(swarm_id: SwarmId, record: bytes, proof: str) -> SignedRequest:
    """Return the request that an administrator's proof is checked against."""
    from pals.backend.service import SignedRequest

    method, path, body = append_request(swarm_id, record)
    return SignedRequest(method=method, path=path, body=body, authorization=proof)


def read_records(service: BackendService, swarm_id: SwarmId, etag: str) -> FetchedRecords:
    """Return what a service says the chain is, unless it is still that of ``etag``."""
    listed = service.entries(swarm_id, etag)
    return FetchedRecords(entries=listed.entries, etag=listed.etag, freshness=listed.freshness)
