"""Sessions of one driver over chains of shards, on the trio thread.

The driver opens a session at every shard in parallel, sends the prompt to the head,
and then only listens: the tail sends each token here and to the head in one go. When a
shard fails, leaves or falls silent, another chain is given prompt and answer as its
prompt, and goes on at the same position: the sink sees a pause and nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import trio

from pals.driver.interface import HopReport
from pals.driver.opening import ChainOpener, send_control
from pals.driver.questions import Questions, build_reports
from pals.driver.recovery import Patience
from pals.driver.routes import RouteTable, ServedModel
from pals.driver.state import (
    Attempt,
    ClientSession,
    SampledToken,
    SessionEvent,
    SessionRequest,
    Sink,
)
from pals.driver.supervisor import Supervisor
from pals.errors import (
    DeadlineExceeded,
    GrammarTimeout,
    InvalidFrame,
    InvalidGrammar,
    PalsError,
    QueueFull,
    ShardLost,
)
from pals.net.control import (
    Control,
    Draining,
    Failed,
    Opened,
    Preempted,
    Refused,
    Stats,
    StatsRequest,
    session_of,
)
from pals.net.flow import window_tokens
from pals.net.guiding import MASK_DEADLINE_S
from pals.net.host import ungrouped_errors
from pals.net.links import Arrival
from pals.net.node import Node, NodeOptions, open_node
from pals.net.process_report import RoleLine
from pals.net.scores import unpack_scores
from pals.net.wire import (
    FLAG_LAST,
    Frame,
    FrameShape,
    Kind,
    Lane,
    Row,
    pooled_shape,
    sampled_shape,
    scored_shape,
    tokens_shape,
)
from pals.text.grammar import check_source
from pals.types import PeerId, Sampling, short_id

STATS_DEADLINE_S = 5.0
BLAMELESS = ("PALS-SESSION-IDLE", InvalidFrame.code, QueueFull.code)
"""Ends of a session that say nothing against the shard that reports them."""


class SessionClient:
    """The driver's role on the network.

    Args:
        node: The member that drives.
        model: What it drives.
        routes: Who serves it.
        nursery: Runs the supervisors of sessions.
        patience: How long to wait for peers and tokens.
    """

    def __init__(
        self,
        node: Node,
        model: ServedModel,
        routes: RouteTable,
        *,
        nursery: trio.Nursery,
        patience: Patience,
    ) -> None:
        self._node = node
        self._model = model
        self._routes = routes
        self._nursery = nursery
        self._questions = Questions(lambda peer: send_control(node.links, peer, StatsRequest()))
        self._sampled = sampled_shape(model.manifest, model.num_layers)
        self._scored = scored_shape(model.manifest, model.num_layers)
        self._pooled = pooled_shape(model.manifest, model.num_layers, model.hidden_size)
        self._opener = ChainOpener(
            node.links,
            routes,
            self._questions,
            tokens=tokens_shape(model.manifest),
            window=window_tokens(self._sampled),
        )
        self._supervisor = Supervisor(
            self._opener, routes, self._questions, model, patience=patience
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where this driver's node listens: any member may start from it."""
        return self._node.host.addresses()

    # --- for the API -----------------------------------------------------------------

    async def open(self, request: SessionRequest, sink: Sink) -> ClientSession:
        """Start a session and send its prompt; ``sink`` is then called with each event.

        A chain that cannot be reached is given up for another, while there is one; when
        there is none, the request waits for peers for a while (`Patience`).

        Raises:
            ContextTooLong: Prompt and answer do not fit the chain's context.
            NoChain: No reachable shards cover every layer.
            SessionRefused: A shard does not take the session.
            ShardBusy: A shard has no room, and there is no other chain.
            DeadlineExceeded: The request's time is over.
            InvalidGrammar: The grammar is too long, or the last shard cannot enforce it.
            GrammarTimeout: It takes too long to.
            PeerError: A shard could not be reached or did not answer.
            ProtocolError: A shard speaks another wire version, or has another secret.
        """
        if request.grammar is not None:
            check_source(request.grammar)
        session = _new_session(request, sink)
        await self._start(session, self._supervisor.begin(session))
        return session

    async def fork(self, parent: ClientSession, sampling: Sampling, sink: Sink) -> ClientSession:
        """Start another answer to the prompt of a session, over its chain where that can be.

        The shards compute the prompt once for both. A session that has no token yet, or is
        over, is not forked: the prompt is sent again, and found where it was computed.

        Raises:
            PalsError: As `open` does.
        """
        session = _new_session(replace(parent.request, sampling=sampling), sink)
        await self._start(session, self._supervisor.begin_fork(session, parent))
        return session

    async def embed(self, prompt: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return the mean of a prompt's last hidden states after the final norm, ``[D]``.

        Raises:
            PalsError: As `open` does, or the session failed on the way.
        """
        send, receive = trio.open_memory_channel[SessionEvent](2)
        request = SessionRequest(
            prompt=prompt,
            max_new_tokens=1,
            stop_token_ids=(),
            sampling=Sampling(pooling=True),
        )
        session = await self.open(request, send.send_nowait)
        try:
            event = await receive.receive()
        finally:
            self.close(session)
        if isinstance(event, PalsError):
            raise event
        assert event.pooled is not None
        return event.pooled

    async def _start(self, session: ClientSession, begin: Awaitable[None]) -> None:
        try:
            await begin
        except BaseException:
            self.close(session)
            raise
        self._nursery.start_soon(self._supervisor.run, session)

    def close(self, session: ClientSession) -> None:
        """Free the session on every shard; may be called twice."""
        self._supervisor.end(session)

    async def report(self) -> list[HopReport]:
        """Ask the shards of the last used chain how long their steps take."""
        chain = self._supervisor.last_chain
        if chain is None:
            return []
        peers = (hop.peer for hop in chain.hops)
        answers = await self._questions.ask(peers, deadline_s=STATS_DEADLINE_S)
        return build_reports(chain, answers.stats)

    # --- role ------------------------------------------------------------------------

    def accepted(self, lane: Lane) -> tuple[FrameShape, ...]:
        return (self._sampled, self._scored, self._pooled) if lane is Lane.DECODE else ()

    def on_control(self, peer: PeerId, message: Control) -> None:
        """Take an answer of a shard; messages about sessions that are over are ignored."""
        match message:
            case Stats():
                self._questions.on_stats(peer, message)
            case Draining():
                self._on_draining(peer)
            case Opened() | Refused() | Preempted() | Failed():
                attempt = self._opener.find(session_of(message))
                if attempt is not None and peer in attempt.peers:
                    self._on_answer(peer, attempt, message)
            case _:
                pass

    def on_rows(self, peer: PeerId, arrival: Arrival) -> None:
        """Pass sampled tokens to their sessions.

        Raises:
            InvalidFrame: They are not from the session's tail, or out of order.
        """
        rows = arrival.frame.rows
        is_pooled = arrival.frame.shape.kind is Kind.POOLED
        tokens = _read_tokens(peer, arrival.frame)
        if len(tokens) != len(rows):
            raise InvalidFrame(peer=peer, problem="rows of more than one sampled token")
        for row, token in zip(rows, tokens, strict=True):
            attempt = self._opener.find(row.session)
            if attempt is None:
                continue  # it is what the tail overshoots after a close
            if attempt.owner.request.sampling.pooling is not is_pooled:
                raise InvalidFrame(peer=peer, problem="a token where a mean was asked for, or not")
            self._take_token(peer, attempt, row, token)

    def _take_token(self, peer: PeerId, attempt: Attempt, row: Row, token: SampledToken) -> None:
        if peer != attempt.chain.tail.peer or row.position != attempt.next_position:
            problem = f"a token for position {row.position}, expected {attempt.next_position}"
            raise InvalidFrame(peer=peer, problem=problem)
        wanted = attempt.owner.request.sampling.logprobs
        if (token.logprob is None) != (wanted is None):
            raise InvalidFrame(peer=peer, problem="log-probabilities that are not as asked for")
        attempt.next_position += 1
        is_end = attempt.next_position == attempt.owner.context_tokens
        last = bool(row.flags & FLAG_LAST) or is_end
        taken = replace(token, last=last, top=token.top[:wanted])
        self._supervisor.take_token(attempt, taken)

    def describe(self) -> RoleLine:
        """Return what people are told of this role."""
        return RoleLine(
            role="driver", model=self._model.model_id, sessions=self._opener.open_sessions
        )

    def needs(self, peer: PeerId) -> bool:
        """Return whether a session is open that goes by way of ``peer``."""
        return bool(self._opener.attempts_over(peer))

    def on_peer_lost(self, peer: PeerId, problem: str) -> None:
        self._questions.on_peer_lost(peer)
        attempts = self._opener.attempts_over(peer)
        if attempts:
            self._routes.mark_failed(peer)
        for attempt in attempts:
            attempt.failed.add(peer)
            attempt.fail(_lost(attempt, peer, problem))

    def _on_answer(
        self, peer: PeerId, attempt: Attempt, message: Opened | Refused | Preempted | Failed
    ) -> None:
        match message:
            case Opened():
                attempt.note_opened(peer, message.held)
            case Preempted():
                self._opener.take_preemption(attempt, peer)
            case Refused():
                self._opener.take_refusal(attempt, peer, message)
            case Failed():
                self._on_failed(peer, attempt, message)

    def _on_failed(self, peer: PeerId, attempt: Attempt, message: Failed) -> None:
        if (final := _final_error(peer, attempt, message)) is not None:
            attempt.fail(final)
            return
        if message.peer:
            attempt.broken_link = peer, PeerId(message.peer)
        elif message.code not in BLAMELESS:
            self._opener.blame(attempt, peer)
        attempt.fail(_lost(attempt, peer, message.problem))

    def _on_draining(self, peer: PeerId) -> None:
        self._routes.mark_leaving(peer)
        for attempt in self._opener.attempts_over(peer):
            attempt.leaving.add(peer)
            attempt.owner.wake()


def _new_session(request: SessionRequest, sink: Sink) -> ClientSession:
    session = ClientSession(request=request, sink=sink)
    if request.deadline_s is not None:
        session.deadline = trio.current_time() + request.deadline_s
    return session


def _read_tokens(peer: PeerId, frame: Frame) -> list[SampledToken]:
    """Return what a tail sent, of all rows of a frame; whether it is the last is not said."""
    match frame.shape.kind:
        case Kind.SCORED:
            scores = unpack_scores(peer, frame.payload)
            return [SampledToken(s.token, False, s.logprob, s.top) for s in scores]
        case Kind.POOLED:
            means = np.frombuffer(frame.payload, "<f4").reshape(-1, frame.shape.width)
            if not np.isfinite(means).all():
                raise InvalidFrame(peer=peer, problem="an embedding that is not of numbers")
            return [SampledToken(0, True, pooled=mean) for mean in means.astype(np.float32)]
        case _:
            ids = np.frombuffer(frame.payload, "<i4").tolist()
            return [SampledToken(token, False) for token in ids]


def _final_error(peer: PeerId, attempt: Attempt, message: Failed) -> PalsError | None:
    """Return why a session ended that would end on every other chain too.

    Only the tail knows of a grammar; what another shard says of one is a failure of its own.
    """
    is_guided = attempt.owner.request.grammar is not None and peer == attempt.chain.tail.peer
    match message.code:
        case DeadlineExceeded.code:
            return DeadlineExceeded(tokens=len(attempt.owner.tokens))
        case InvalidGrammar.code if is_guided:
            return InvalidGrammar(problem=message.problem)
        case GrammarTimeout.code if is_guided:
            return GrammarTimeout(deadline_s=MASK_DEADLINE_S)
        case _:
            return None


def _lost(attempt: Attempt, peer: PeerId, problem: str) -> ShardLost:
    layers = attempt.layers_of(peer)
    return ShardLost(peer=short_id(peer), layers=layers, problem=problem)


@asynccontextmanager
async def open_clients(
    options: NodeOptions,
    models: Sequence[ServedModel],
    *,
    serve: Callable[[Node], Awaitable[None]] | None = None,
) -> AsyncGenerator[Sequence[SessionClient]]:
    """Run a node that drives ``models`` until the block ends; gives a client for each.

    Args:
        options: The member that drives.
        models: The models that it drives, of different files.
        serve: What the same node does besides, such as serving a shard: one identity is
            one process.

    Raises:
        RosterUnavailable: There is no verified member list.
        PortInUse: The listening address is taken.
    """
    patience = Patience(
        step_deadline_s=options.settings.step_deadline_s,
        wait_for_peers_s=options.settings.wait_for_peers_s,
    )
    with ungrouped_errors():
        async with open_node(options) as node, trio.open_nursery() as nursery:
            clients: list[SessionClient] = []
            for model in models:
                routes = RouteTable(node, model)
                client = SessionClient(node, model, routes, nursery=nursery, patience=patience)
                node.add_role(client)
                nursery.start_soon(routes.run)
                clients.append(client)
            if serve is not None:
                nursery.start_soon(serve, node)
            yield clients
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_sessions(
    options: NodeOptions,
    model: ServedModel,
    *,
    serve: Callable[[Node], Awaitable[None]] | None = None,
) -> AsyncGenerator[SessionClient]:
    """Run a node that drives one model until the block ends; see `open_clients`."""
    async with open_clients(options, [model], serve=serve) as (client,):
        yield client
