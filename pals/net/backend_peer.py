"""The backend in another member's node, called over libp2p.

A node calls it over its own host. A command that runs no node, and a node whose list expired
so that its gate lets nobody in, connect for one call and listen nowhere.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from pals.config import Profile
from pals.errors import BackendRefused, BackendUnreachable, InvalidRecord, PeerUnreachable
from pals.net.backend import FetchedRecords
from pals.net.backend_members import PROTOCOL
from pals.net.framed import read_message, write_message
from pals.net.host import Host, Stream, open_caller
from pals.net.membership import load_saved
from pals.swarm.addresses import peer_in_address
from pals.swarm.calls import (
    MAX_ANSWER_BYTES,
    Answer,
    AppendCall,
    Call,
    Done,
    EntryAnswer,
    Failed,
    HintsAnswer,
    HintsCall,
    KeyAnswer,
    KeyCall,
    PutHintCall,
    RecordsAnswer,
    RecordsCall,
    append_proof,
    decode_answer,
    encode_message,
)
from pals.swarm.identity import Identity, load_or_create_identity
from pals.types import SwarmId

CALL_DEADLINE_S = 10.0
MAX_ADDRESSES = 16

_Expected = TypeVar("_Expected", KeyAnswer, EntryAnswer, RecordsAnswer, HintsAnswer, Done)


class PeerBackend:
    """`pals.net.backend.Backend` over libp2p.

    Args:
        address: Multiaddr of the member that runs it, from the profile.
        profile: Whose identity calls, and where addresses of members are remembered.
        deadline_s: Seconds for one call.
    """

    def __init__(
        self, address: str, profile: Profile, *, deadline_s: float = CALL_DEADLINE_S
    ) -> None:
        self.url = address
        self._peer = peer_in_address(address)
        self._profile = profile
        self._deadline_s = deadline_s
        self._host: Host | None = None

    def use_host(self, host: Host) -> None:
        """Call over a running node's host from now on, wherever its gate allows it."""
        self._host = host

    async def fetch_key(self) -> bytes:
        return (await self._ask(KeyCall(), KeyAnswer)).key

    async def create_swarm(self, genesis: bytes) -> bytes:
        raise BackendRefused(url=self.url, status=405, problem="it serves its members' swarm alone")

    async def append(
        self, swarm_id: SwarmId, record: bytes, *, signer: Identity | None = None
    ) -> bytes:
        proof = append_proof(signer, swarm_id, record, at=int(time.time()))
        call = AppendCall(swarm_id=swarm_id, record=record, proof=proof)
        return (await self._ask(call, EntryAnswer)).entry

    async def redeem(self, swarm_id: SwarmId, auth: bytes, join: bytes) -> bytes:
        raise BackendRefused(url=self.url, status=405, problem="invites are redeemed elsewhere")

    async def fetch_records(self, swarm_id: SwarmId, *, etag: str = "") -> FetchedRecords:
        answer = await self._ask(RecordsCall(swarm_id=swarm_id, etag=etag), RecordsAnswer)
        return FetchedRecords(entries=answer.entries, etag=answer.etag, freshness=answer.freshness)

    async def put_hint(self, swarm_id: SwarmId, hint: bytes) -> None:
        await self._ask(PutHintCall(swarm_id=swarm_id, hint=hint), Done)

    async def fetch_hints(self, swarm_id: SwarmId) -> tuple[bytes, ...]:
        return (await self._ask(HintsCall(swarm_id=swarm_id), HintsAnswer)).hints

    # --- one call --------------------------------------------------------------------

    async def _ask(self, call: Call, expected: type[_Expected]) -> _Expected:
        try:
            with trio.fail_after(self._deadline_s):
                answer = await self._exchange(call)
        except trio.TooSlowError:
            raise self._unreachable(f"no answer within {self._deadline_s:g} s") from None
        except (PeerUnreachable, InvalidRecord) as error:
            raise self._unreachable(str(error)) from error
        if isinstance(answer, Failed):
            raise BackendRefused(url=self.url, status=answer.status, problem=answer.problem)
        if not isinstance(answer, expected):
            raise self._unreachable("the answer is one to another call")
        return answer

    async def _exchange(self, call: Call) -> Answer:
        async with self._open_stream() as stream:
            try:
                await write_message(stream, encode_message(call))
                data = await read_message(stream, max_bytes=MAX_ANSWER_BYTES)
            finally:
                with trio.CancelScope(shield=True):
                    await stream.reset()
        return decode_answer(data)

    @asynccontextmanager
    async def _open_stream(self) -> AsyncGenerator[Stream]:
        host = self._host
        if host is not None and host.is_member(self._peer):
            await host.connect(self._peer, self._addresses())
            yield await host.open_stream(self._peer, PROTOCOL)
            return
        if not await trio.to_thread.run_sync(self._is_on_saved_list):
            raise PeerUnreachable(peer=self._peer, problem="it is no member on the last list")
        identity = load_or_create_identity(self._profile)
        async with open_caller(identity, allow=lambda peer: peer == self._peer) as caller:
            await caller.connect(self._peer, self._addresses())
            yield await caller.open_stream(self._peer, PROTOCOL)

    def _is_on_saved_list(self) -> bool:
        ids = [SwarmId(bytes.fromhex(swarm_id)) for swarm_id in self._profile.swarm_ids()]
        saved = [load_saved(self._profile, swarm_id) for swarm_id in ids]
        return any(self._peer in found.roster.live for found in saved if found is not None)

    def _addresses(self) -> list[str]:
        """Return where the member was last reached, and where it was when this one joined."""
        known: list[str] = []
        for swarm_id in self._profile.swarm_ids():
            for peer in self._profile.load_known_peers(swarm_id):
                known += peer.addresses if peer.peer == self._peer else ()
        return list(dict.fromkeys([*known, self.url]))[:MAX_ADDRESSES]

    def _unreachable(self, problem: str) -> BackendUnreachable:
        return BackendUnreachable(url=self.url, problem=problem)
