"""Redeeming an invite over libp2p: what stands behind the door, and who knocks at it.

One call and one answer. Whatever is wrong with an invite or with the call, the answer is the
same; a good invite is answered with everything that a member needs to find its first peer.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

import trio

from pals.errors import (
    BackendRefused,
    BackendUnreachable,
    CapacityError,
    InvalidRecord,
    InviteRefused,
    PalsError,
    PeerUnreachable,
    StorageFailed,
    SwarmFull,
)
from pals.net.backend import FetchedRecords, OnChange
from pals.net.door import Door, DoorLimits, knock, open_door
from pals.net.framed import read_message, write_message
from pals.net.host import Stream
from pals.swarm.calls import (
    MAX_ANSWER_BYTES,
    MAX_CALL_BYTES,
    Joined,
    NotJoined,
    RedeemCall,
    decode_redeem_answer,
    decode_redeem_call,
    encode_message,
)
from pals.swarm.identity import Identity
from pals.types import SwarmId

_log = logging.getLogger(__name__)

PROTOCOL = "/pals/redeem/1"
ANSWER_DEADLINE_S = 15.0
REDEEMS_AT_ONCE = 4
KNOCK_DEADLINE_S = 20.0


class Redeemer(Protocol):
    """Admits strangers; it blocks the calling thread."""

    def redeem(self, call: RedeemCall, source: str) -> Joined:
        """Admit one by its invite.

        Args:
            call: The join, and what proves the right to it.
            source: Address literal that attempts are counted by.

        Raises:
            PalsError: Nobody joined.
        """
        ...


@asynccontextmanager
async def open_redemption(
    identity: Identity,
    *,
    listen: str,
    redeemer: Redeemer,
    on_join: OnChange | None = None,
    limits: DoorLimits | None = None,
) -> AsyncGenerator[Door]:
    """Let strangers redeem invites until the block ends.

    Args:
        identity: The door's, which is no member's.
        listen: Multiaddr to listen on.
        redeemer: Called in worker threads.
        on_join: Called when somebody joined, before it hears of it.
        limits: What is spent on strangers.

    Raises:
        InvalidConfig: ``listen`` is not a TCP multiaddr.
        PortInUse: The address cannot be bound.
    """
    limits = limits or DoorLimits()
    threads = trio.CapacityLimiter(REDEEMS_AT_ONCE)

    async def answer(stream: Stream, source: str) -> None:
        try:
            with trio.fail_after(limits.call_s):
                data = await read_message(stream, max_bytes=MAX_CALL_BYTES)
        except trio.TooSlowError:
            raise PeerUnreachable(peer=stream.peer_id, problem="its call took too long") from None
        said = await trio.to_thread.run_sync(
            partial(_admit, redeemer, data, source), limiter=threads
        )
        if isinstance(said, Joined) and on_join is not None:
            await on_join()
        with trio.move_on_after(ANSWER_DEADLINE_S):
            await write_message(stream, encode_message(said))

    opening = open_door(identity, listen=listen, protocol=PROTOCOL, handler=answer, limits=limits)
    async with opening as door:
        yield door


def _admit(redeemer: Redeemer, data: bytes, source: str) -> Joined | NotJoined:
    try:
        return redeemer.redeem(decode_redeem_call(data), source)
    except SwarmFull:
        return NotJoined(reason="full")
    except (CapacityError, StorageFailed) as error:
        if isinstance(error, StorageFailed):
            _log.error("%s", error)
        return NotJoined(reason="busy")
    except PalsError:
        return NotJoined(reason="refused")


class RedemptionBackend:
    """The part of a backend that a stranger reaches: `pals.net.backend.Backend` for a login.

    After `redeem` it gives out what came with the answer; everything else is refused.

    Args:
        address: Multiaddr of the door, from the invite.
    """

    def __init__(self, address: str, *, limits: DoorLimits | None = None) -> None:
        self.url = address
        self._limits = limits
        self._joined: Joined | None = None

    async def redeem(self, swarm_id: SwarmId, auth: bytes, join: bytes) -> bytes:
        call = RedeemCall(swarm_id=swarm_id, auth=auth, join=join)
        try:
            with trio.fail_after(KNOCK_DEADLINE_S):
                answer = await self._exchange(call)
        except trio.TooSlowError:
            raise self._unreachable(f"no answer within {KNOCK_DEADLINE_S:g} s") from None
        except (PeerUnreachable, InvalidRecord) as error:
            raise self._unreachable(str(error)) from error
        if isinstance(answer, NotJoined):
            raise self._refusal(answer)
        self._joined = answer
        return answer.entry

    async def fetch_records(self, swarm_id: SwarmId, *, etag: str = "") -> FetchedRecords:
        joined = self._answer()
        return FetchedRecords(entries=joined.entries, etag="", freshness=joined.freshness)

    async def fetch_hints(self, swarm_id: SwarmId) -> tuple[bytes, ...]:
        return self._answer().hints

    async def fetch_key(self) -> bytes:
        raise self._only_joining()

    async def create_swarm(self, genesis: bytes) -> bytes:
        raise self._only_joining()

    async def append(
        self, swarm_id: SwarmId, record: bytes, *, signer: Identity | None = None
    ) -> bytes:
        raise self._only_joining()

    async def put_hint(self, swarm_id: SwarmId, hint: bytes) -> None:
        raise self._only_joining()

    async def _exchange(self, call: RedeemCall) -> Joined | NotJoined:
        async with knock(self.url, PROTOCOL, limits=self._limits) as stream:
            await write_message(stream, encode_message(call))
            return decode_redeem_answer(await read_message(stream, max_bytes=MAX_ANSWER_BYTES))

    def _answer(self) -> Joined:
        if self._joined is None:
            raise self._only_joining()
        return self._joined

    def _refusal(self, answer: NotJoined) -> PalsError:
        match answer.reason:
            case "refused":
                return InviteRefused()
            case "full":
                problem = "the swarm has as many members as it may have"
                return BackendRefused(url=self.url, status=429, problem=problem)
            case "busy":
                problem = "it is busy, or was asked too often; try again in a minute"
                return BackendRefused(url=self.url, status=429, problem=problem)

    def _only_joining(self) -> BackendRefused:
        return BackendRefused(url=self.url, status=405, problem="it only lets machines join")

    def _unreachable(self, problem: str) -> BackendUnreachable:
        return BackendUnreachable(url=self.url, problem=problem)
