"""The members' shell of a backend: `/pals/backend/1` on the host of the node that runs it.

The host's gate has let nobody in who is no member. One call a stream, few of each member at a
time, and few in all; a member that is removed loses its connection like everywhere else.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import trio

from pals.errors import PalsError, PeerUnreachable, StorageFailed, TooManyAttempts, UnknownSwarm
from pals.net.backend import OnChange
from pals.net.backend_local import CALLS_AT_ONCE, read_records, signed_append
from pals.net.framed import read_message, write_message
from pals.net.host import Host, Stream
from pals.net.rates import RateLimit
from pals.swarm.calls import (
    MAX_CALL_BYTES,
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
    decode_call,
    encode_message,
)
from pals.types import PeerId, SwarmId

if TYPE_CHECKING:
    from pals.backend.service import BackendService

_log = logging.getLogger(__name__)

PROTOCOL = "/pals/backend/1"
CALL_DEADLINE_S = 5.0
ANSWER_DEADLINE_S = 30.0
MEMBER_CALLS_AT_ONCE = 4
CALLS_PER_S = 0.5
CALLS_BURST = 30.0


class MembersBackend:
    """Answers members' calls.

    Args:
        host: The node's host.
        service: Its methods are called from worker threads.
        swarm_id: The swarm of the host's members; calls about another are refused.
        on_change: Lets the node follow at once.
    """

    def __init__(
        self, host: Host, service: BackendService, swarm_id: SwarmId, on_change: OnChange
    ) -> None:
        self._service = service
        self._swarm_id = swarm_id
        self._on_change = on_change
        self._rates = RateLimit(per_s=CALLS_PER_S, burst=CALLS_BURST)
        self._answering = Counter[PeerId]()
        self._threads = trio.CapacityLimiter(CALLS_AT_ONCE)
        host.handle(PROTOCOL, self._serve)

    async def _serve(self, stream: Stream) -> None:
        peer = stream.peer_id
        if self._answering[peer] >= MEMBER_CALLS_AT_ONCE:
            raise PeerUnreachable(peer=peer, problem="it makes too many calls at once")
        self._answering[peer] += 1
        try:
            with trio.fail_after(CALL_DEADLINE_S):
                call = decode_call(await read_message(stream, max_bytes=MAX_CALL_BYTES))
            with trio.fail_after(ANSWER_DEADLINE_S):
                answer = await self._answer(peer, call)
                if isinstance(answer, EntryAnswer):
                    await self._on_change()
                await write_message(stream, encode_message(answer))
        except trio.TooSlowError:
            raise PeerUnreachable(peer=peer, problem="its call took too long") from None
        finally:
            self._answering[peer] -= 1
            self._answering += Counter()  # drops whoever is at 0

    async def _answer(self, peer: PeerId, call: Call) -> Answer:
        try:
            if not self._rates.allows(peer, trio.current_time()):
                raise TooManyAttempts(limit=int(60 * CALLS_PER_S))
            work = partial(_do, self._service, self._swarm_id, call)
            return await trio.to_thread.run_sync(work, limiter=self._threads)
        except StorageFailed as error:
            _log.error("%s", error)
            return _failed(StorageFailed(problem="the backend's log says why"))
        except PalsError as error:
            return _failed(error)


def _do(service: BackendService, own: SwarmId, call: Call) -> Answer:
    if isinstance(call, KeyCall):
        return KeyAnswer(key=service.public_key)
    swarm_id = SwarmId(call.swarm_id)
    if swarm_id != own:
        raise UnknownSwarm(swarm=swarm_id.hex())
    match call:
        case AppendCall():
            request = signed_append(swarm_id, call.record, call.proof)
            return EntryAnswer(entry=service.append_record(swarm_id, call.record, request))
        case RecordsCall():
            fetched = read_records(service, swarm_id, call.etag)
            return RecordsAnswer(
                etag=fetched.etag, freshness=fetched.freshness, entries=fetched.entries
            )
        case PutHintCall():
            service.put_hint(swarm_id, call.hint)
            return Done()
        case HintsCall():
            return HintsAnswer(hints=service.hints(swarm_id))


def _failed(error: PalsError) -> Failed:
    return Failed(status=error.http_status, code=error.code, problem=str(error)[:500])
