"""Sessions of one driver over chains of shards, on the trio thread.

The driver opens a session at every shard in parallel, sends the prompt to the head,
and then only listens: the tail sends each token here and to the head in one go.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import trio

from pals.driver.interface import HopReport
from pals.driver.routes import Offer, RouteTable, ServedModel
from pals.errors import (
    CapacityError,
    ContextTooLong,
    InvalidFrame,
    NoChain,
    PalsError,
    PeerError,
    PeerUnreachable,
    ProtocolError,
    SessionRefused,
    ShardBusy,
    ShardFull,
    ShardLost,
    StepTimeout,
)
from pals.net.announce import Announcement
from pals.net.control import (
    Ack,
    Close,
    Control,
    Failed,
    Hop,
    Open,
    Opened,
    Refused,
    Stats,
    StatsRequest,
    encode_control,
    session_of,
)
from pals.net.flow import AckPolicy, window_tokens
from pals.net.host import ungrouped_errors
from pals.net.links import Arrival, Links
from pals.net.node import Node, NodeOptions, open_node
from pals.net.route import Chain
from pals.net.wire import (
    CONTROL_SHAPE,
    FLAG_LAST,
    MAX_ROW_TOKENS,
    NO_ROWS,
    FrameShape,
    Kind,
    Lane,
    Outgoing,
    Row,
    Rows,
    buffer_of,
    sampled_shape,
    tokens_shape,
)
from pals.types import LayerRange, PeerId, SessionId, short_id

_log = logging.getLogger(__name__)

OPEN_DEADLINE_S = 15.0
STATS_DEADLINE_S = 5.0
PROBE_DEADLINE_S = 1.0
MAX_AVOIDED = 64
"""Offers that may fail one request before it fails itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """One sequence to generate.

    Attributes:
        prompt: Token ids, at least one.
        max_new_tokens: Most tokens to sample; None takes what the context has left.
        stop_token_ids: Ids after which the tail stops.
        temperature: 0 is greedy.
        top_p: Smallest probability mass to sample from.
        seed: Start of the random stream, below 2**32.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int | None
    stop_token_ids: tuple[int, ...]
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token of the answer; ``last`` when the tail has stopped by itself."""

    token: int
    last: bool


SessionEvent = SampledToken | PalsError
Sink = Callable[[SessionEvent], None]


@dataclass(slots=True, kw_only=True)
class ClientSession:
    """One session as its driver sees it."""

    session: SessionId
    chain: Chain
    sink: Sink
    next_position: int
    remaining_tokens: int
    acks: AckPolicy
    unanswered: set[PeerId]
    answered: trio.Event = field(default_factory=trio.Event)
    error: PalsError | None = None
    failed: set[PeerId] = field(default_factory=set[PeerId])

    @property
    def peers(self) -> frozenset[PeerId]:
        return frozenset(hop.peer for hop in self.chain.hops)


@dataclass(slots=True, kw_only=True, eq=False)
class _Question:
    """A request for timings that waits for its answers."""

    unanswered: set[PeerId]
    stats: dict[PeerId, Stats] = field(default_factory=dict[PeerId, Stats])
    answered: trio.Event = field(default_factory=trio.Event)

    def take(self, peer: PeerId, stats: Stats) -> None:
        if peer in self.unanswered:
            self.unanswered.discard(peer)
            self.stats[peer] = stats
        if not self.unanswered:
            self.answered.set()


class SessionClient:
    """The driver's role on the network."""

    input_kind = Kind.SAMPLED

    def __init__(self, node: Node, model: ServedModel, routes: RouteTable) -> None:
        self._node = node
        self._links: Links = node.links
        self._model = model
        self._routes = routes
        self._sessions: dict[SessionId, ClientSession] = {}
        self._questions: list[_Question] = []
        self._last_chain: Chain | None = None
        self._tokens = tokens_shape(model.manifest)
        self._sampled = sampled_shape(model.manifest, model.num_layers)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where this driver's node listens: any member may start from it."""
        return self._node.host.addresses()

    # --- for the API -----------------------------------------------------------------

    async def open(self, request: SessionRequest, sink: Sink) -> ClientSession:
        """Start a session and send its prompt; ``sink`` is then called with each event.

        A chain that cannot be reached is given up for another, while there is one.

        Raises:
            ContextTooLong: Prompt and answer do not fit the chain's context.
            NoChain: No reachable shards cover every layer.
            SessionRefused: A shard does not take the session.
            ShardBusy: A shard has no slot, and there is no other chain.
            PeerError: A shard could not be reached or did not answer.
            ProtocolError: A shard speaks another wire version, or has another secret.
        """
        avoided: set[Offer] = set()
        failure: PalsError | None = None
        while len(avoided) <= MAX_AVOIDED:
            chain = await self._find_chain(avoided, failure)
            session = self._build(request, chain, sink)
            try:
                await self._open_chain(session, request)
            except (PeerError, ProtocolError, CapacityError) as error:
                self.close(session)
                _log.info("chain %s: %s", chain, error)
                failed = session.failed or session.peers
                avoided |= {(h.peer, h.layers) for h in chain.hops if h.peer in failed}
                failure = error
            except BaseException:
                self.close(session)
                raise
            else:
                self._last_chain = chain
                name, tokens = short_id(session.session), len(request.prompt)
                _log.info("session %s: %d prompt tokens over %s", name, tokens, chain)
                return session
        assert failure is not None
        raise failure

    async def _find_chain(self, avoided: Set[Offer], failure: PalsError | None) -> Chain:
        """Return a chain without the offers that failed this request already.

        When there is none, the error says why the last one failed; a peer that is simply
        gone is told as the layers that are missing.
        """
        try:
            return await self._routes.find(without=avoided)
        except NoChain as no_chain:
            if failure is None or isinstance(failure, PeerUnreachable | ShardLost):
                raise
            raise failure from no_chain

    def close(self, session: ClientSession) -> None:
        """Free the session on every shard; may be called twice."""
        if self._sessions.pop(session.session, None) is not None:
            for peer in session.peers:
                self._send_control(peer, Close(session=session.session))

    async def give_up(self, session: ClientSession) -> None:
        """Close a session whose tokens stopped coming, and use its silent shards last."""
        self.close(session)
        stats = await self._ask_for_stats(session.chain, deadline_s=PROBE_DEADLINE_S)
        silent = session.peers - stats.keys()
        for peer in silent or session.peers:
            self._routes.mark_failed(peer)

    async def report(self) -> list[HopReport]:
        """Ask the shards of the last used chain how long their steps take."""
        chain = self._last_chain
        if chain is None:
            return []
        return _build_reports(chain, await self._ask_for_stats(chain, deadline_s=STATS_DEADLINE_S))

    async def _ask_for_stats(self, chain: Chain, *, deadline_s: float) -> dict[PeerId, Stats]:
        """Return the timings of those shards that answer in time."""
        question = _Question(unanswered={hop.peer for hop in chain.hops})
        self._questions.append(question)
        try:
            for hop in chain.hops:
                self._send_control(hop.peer, StatsRequest())
            with trio.move_on_after(deadline_s):
                await question.answered.wait()
        finally:
            self._questions.remove(question)
        return question.stats

    # --- opening ---------------------------------------------------------------------

    def _build(self, request: SessionRequest, chain: Chain, sink: Sink) -> ClientSession:
        prompt_tokens = len(request.prompt)
        limit = min(chain.max_context_tokens, self._model.max_position_embeddings)
        wanted = request.max_new_tokens or max(1, limit - prompt_tokens)
        if prompt_tokens + wanted > limit:
            total = prompt_tokens + wanted
            raise ContextTooLong(limit=limit, total=total, prompt=prompt_tokens, completion=wanted)
        session = ClientSession(
            session=SessionId(os.urandom(16)),
            chain=chain,
            sink=sink,
            next_position=prompt_tokens,
            remaining_tokens=wanted,
            acks=AckPolicy(window_tokens(self._sampled), prompt_tokens, prompt_tokens),
            unanswered={hop.peer for hop in chain.hops},
        )
        self._sessions[session.session] = session
        return session

    async def _open_chain(self, session: ClientSession, request: SessionRequest) -> None:
        await self._link_all(session)
        message = _build_open(session, request)
        for peer in session.peers:
            self._links.send(peer, Lane.CONTROL, _control_frame(message))
        with trio.move_on_after(OPEN_DEADLINE_S):
            await session.answered.wait()
        if session.error is not None:
            raise session.error
        if session.unanswered:
            for peer in session.unanswered:
                self._blame(session, peer)
            raise StepTimeout(deadline_s=OPEN_DEADLINE_S, chain=session.chain)
        self._send_prompt(session, request.prompt)

    async def _link_all(self, session: ClientSession) -> None:
        errors: list[PalsError] = []

        async def link(hop: Announcement) -> None:
            try:
                await self._links.ensure(hop.peer, hop.addresses)
            except PalsError as error:
                self._blame(session, hop.peer)
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for hop in session.chain.hops:
                nursery.start_soon(link, hop)
        if errors:
            raise errors[0]

    def _blame(self, session: ClientSession, peer: PeerId) -> None:
        """Leave ``peer`` out of this request's next chain, and use it last for a while."""
        session.failed.add(peer)
        self._routes.mark_failed(peer)

    def _send_prompt(self, session: ClientSession, prompt: Sequence[int]) -> None:
        for start in range(0, len(prompt), MAX_ROW_TOKENS):
            part = np.asarray(prompt[start : start + MAX_ROW_TOKENS], dtype="<i4")
            row = Row(session.session, start, len(part))
            outgoing = Outgoing(self._tokens, Rows.of(row), (buffer_of(part),))
            self._links.send(session.chain.head.peer, Lane.PREFILL, outgoing)

    # --- role ------------------------------------------------------------------------

    def accepted(self, lane: Lane) -> tuple[FrameShape, ...]:
        return (self._sampled,) if lane is Lane.DECODE else ()

    def on_control(self, peer: PeerId, message: Control) -> None:
        """Take an answer of a shard; messages about sessions that are over are ignored."""
        if isinstance(message, Stats):
            for question in self._questions:
                question.take(peer, message)
        elif isinstance(message, Opened | Refused | Failed):
            session = self._sessions.get(session_of(message))
            if session is not None and peer in session.peers:
                self._on_answer(peer, session, message)

    def on_rows(self, peer: PeerId, arrival: Arrival) -> None:
        """Pass sampled tokens to their sessions.

        Raises:
            InvalidFrame: They are not from the session's tail, or out of order.
        """
        tokens = np.frombuffer(arrival.frame.payload, "<i4")
        if len(tokens) != len(arrival.frame.rows):
            raise InvalidFrame(peer=peer, problem="rows of more than one sampled token")
        for row, token in zip(arrival.frame.rows, tokens, strict=True):
            session = self._sessions.get(row.session)
            if session is not None:  # else it is what the tail overshoots after a close
                self._take_token(peer, session, row, int(token))

    def _take_token(self, peer: PeerId, session: ClientSession, row: Row, token: int) -> None:
        if peer != session.chain.tail.peer or row.position != session.next_position:
            problem = f"a token for position {row.position}, expected {session.next_position}"
            raise InvalidFrame(peer=peer, problem=problem)
        session.next_position += 1
        session.remaining_tokens -= 1
        last = bool(row.flags & FLAG_LAST) or session.remaining_tokens == 0
        if last:
            self._routes.mark_good(session.peers)
            self.close(session)
        session.sink(SampledToken(token, last))
        if not last:
            self._acknowledge(session)

    def _acknowledge(self, session: ClientSession) -> None:
        """Let the tail go on when it is told so rarely that it costs nothing."""
        told = session.acks.take(session.next_position)
        if told is not None:
            tail = session.chain.tail.peer
            self._send_control(tail, Ack(session=session.session, position=told))

    def needs(self, peer: PeerId) -> bool:
        """Return whether a session is open that goes by way of ``peer``."""
        return any(peer in session.peers for session in self._sessions.values())

    def on_peer_lost(self, peer: PeerId, problem: str) -> None:
        for session in [s for s in self._sessions.values() if peer in s.peers]:
            self._blame(session, peer)
            lost = ShardLost(peer=short_id(peer), layers=_layers_of(session, peer), problem=problem)
            self._fail(session, lost)

    def _on_answer(
        self, peer: PeerId, session: ClientSession, message: Opened | Refused | Failed
    ) -> None:
        if isinstance(message, Opened):
            session.unanswered.discard(peer)
            if not session.unanswered:
                session.answered.set()
            return
        name, problem = short_id(peer), message.problem
        session.failed.add(peer)
        if isinstance(message, Failed):
            layers = _layers_of(session, peer)
            self._fail(session, ShardLost(peer=name, layers=layers, problem=problem))
        elif message.code == ShardFull.code:
            self._fail(session, ShardBusy(peer=name, problem=problem))
        else:
            self._fail(session, SessionRefused(peer=name, problem=problem))

    def _fail(self, session: ClientSession, error: PalsError) -> None:
        """End a session with an error, told to whoever waits for it."""
        if session.answered.is_set():
            self.close(session)
            session.sink(error)
        else:
            session.error = error
            session.answered.set()

    def _send_control(self, peer: PeerId, message: Control) -> None:
        try:
            self._links.send(peer, Lane.CONTROL, _control_frame(message))
        except PalsError as error:  # a peer that is gone has freed the session by itself
            _log.debug("no message to %s: %s", short_id(peer), error)


def _layers_of(session: ClientSession, peer: PeerId) -> LayerRange:
    return next(hop.layers for hop in session.chain.hops if hop.peer == peer)


def _control_frame(message: Control) -> Outgoing:
    return Outgoing(CONTROL_SHAPE, NO_ROWS, (encode_control(message),))


def _build_open(session: ClientSession, request: SessionRequest) -> Open:
    hops = tuple(
        Hop(peer=h.peer, start=h.layers.start, stop=h.layers.stop, addresses=h.addresses)
        for h in session.chain.hops
    )
    return Open(
        session=session.session,
        chain=hops,
        prompt_tokens=len(request.prompt),
        max_new_tokens=session.remaining_tokens,
        stop_token_ids=request.stop_token_ids,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
    )


def _build_reports(chain: Chain, stats: dict[PeerId, Stats]) -> list[HopReport]:
    """Return the shards' timings, with a share of the time that no shard spent.

    Two machines have no common clock, so the time on the wire is what is left of a turn
    of the ring, in equal parts for its hops.
    """
    known = [stats[hop.peer] for hop in chain.hops if hop.peer in stats]
    spent_ms = sum(s.step_ms + s.queue_ms + s.handover_ms + s.codec_ms for s in known)
    turn_ms = max((s.turn_ms for s in known), default=0.0)
    wire_ms = max(0.0, turn_ms - spent_ms) / len(chain.hops) if known else 0.0
    return [
        HopReport(
            peer=hop.peer,
            layers=str(hop.layers),
            steps=stats[hop.peer].steps,
            step_ms=stats[hop.peer].step_ms,
            queue_ms=stats[hop.peer].queue_ms,
            handover_ms=stats[hop.peer].handover_ms,
            codec_ms=stats[hop.peer].codec_ms,
            wire_ms=wire_ms,
        )
        for hop in chain.hops
        if hop.peer in stats
    ]


@asynccontextmanager
async def open_sessions(
    options: NodeOptions,
    model: ServedModel,
    *,
    serve: Callable[[Node], Awaitable[None]] | None = None,
) -> AsyncGenerator[SessionClient]:
    """Run a node that drives ``model`` until the block ends.

    Args:
        options: The member that drives.
        model: The model that it drives.
        serve: What the same node does besides, such as serving a shard: one identity is
            one process.

    Raises:
        RosterUnavailable: There is no verified member list.
        PortInUse: The listening address is taken.
    """
    with ungrouped_errors():
        async with open_node(options) as node, trio.open_nursery() as nursery:
            routes = RouteTable(node, model)
            client = SessionClient(node, model, routes)
            node.add_role(client)
            nursery.start_soon(routes.run)
            if serve is not None:
                nursery.start_soon(serve, node)
            yield client
            nursery.cancel_scope.cancel()
