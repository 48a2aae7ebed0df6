"""Opening a session at every shard of one chain, and giving the chain its prompt."""

from __future__ import annotations

import logging

import msgspec
import numpy as np
import trio

from pals.driver.prefixes import Prefixes
from pals.driver.questions import Questions
from pals.driver.routes import RouteTable
from pals.driver.state import Attempt, ClientSession
from pals.errors import (
    CapacityError,
    DeadlineExceeded,
    PalsError,
    SessionPreempted,
    SessionRefused,
    ShardBusy,
    ShardDraining,
    StepTimeout,
)
from pals.net.announce import Announcement
from pals.net.control import Ack, Close, Control, Fork, Refused, Sampler, encode_control
from pals.net.flow import AckPolicy
from pals.net.links import Links
from pals.net.wire import (
    CONTROL_SHAPE,
    MAX_ROW_TOKENS,
    NO_ROWS,
    FrameShape,
    Lane,
    Outgoing,
    Row,
    Rows,
    buffer_of,
)
from pals.types import PeerId, SessionId, short_id

_log = logging.getLogger(__name__)

OPEN_DEADLINE_S = 15.0
OPEN_SUSPICION_S = 1.0
PROBE_DEADLINE_S = 1.5
"""For an answer that costs a shard nothing, however busy its steps keep it."""
BUSY_CODES = frozenset(error.code for error in CapacityError.__subclasses__() if error.retryable)
"""Why a shard has no room for a session now: it may have later, and another one may now."""


class ChainOpener:
    """What a driver says to the shards of chains, and which attempts are alive.

    Args:
        links: The node's links.
        routes: Told who cannot be talked to.
        questions: To ask shards that say nothing.
        tokens: The shape of prompts.
        window: Sampled tokens that a tail may be ahead of this driver.
    """

    def __init__(
        self,
        links: Links,
        routes: RouteTable,
        questions: Questions,
        *,
        tokens: FrameShape,
        window: int,
    ) -> None:
        self._links = links
        self._routes = routes
        self._questions = questions
        self._tokens = tokens
        self._window = window
        self._prefixes = Prefixes()
        self._attempts: dict[SessionId, Attempt] = {}

    def find(self, session: SessionId) -> Attempt | None:
        """Return a living attempt by the id that its shards know."""
        return self._attempts.get(session)

    @property
    def open_sessions(self) -> int:
        """How many sessions run."""
        return len({id(attempt.owner) for attempt in self._attempts.values()})

    def attempts_over(self, peer: PeerId) -> list[Attempt]:
        """Return the living attempts that need ``peer``."""
        return [a for a in self._attempts.values() if peer in a.peers]

    async def try_chain(self, attempt: Attempt) -> None:
        """Open a session on a chain and give it prompt and answer so far.

        A new session's prompt goes out right behind the `Open` messages, which saves a round
        trip. Where a chain has seen its beginning before, and where a session goes on, the
        answers come first: they say where the prompt may begin. A session that goes on may
        also ask for many chains, and each that does not hold would have computed some of the
        prompt for nothing.

        An older attempt of the session goes on meanwhile; once the new chain is asked, the
        tokens of the old one are held until it is known which of the two goes on.

        Raises:
            PeerUnreachable: A shard cannot be dialled, or went away.
            LinkRefused: A shard does not share this swarm's secret.
            WireVersionMismatch: A shard speaks another wire version.
            SessionRefused: A shard does not take the session.
            ShardBusy: A shard has no room.
            ShardDraining: A shard is about to stop.
            ShardLost: A shard went away.
            SessionPreempted: A shard had room, and gave it to others already.
            DeadlineExceeded: Nobody wants the answer any more.
            StepTimeout: A shard says nothing.
            QueueFull: A shard reads too slowly.
        """
        session = attempt.owner
        is_new = session.current is None
        # What is held already is not computed, and could not be pooled.
        names = b"" if session.request.sampling.pooling else self._prefixes.name(session.history())
        is_ahead = is_new and not self._prefixes.are_likely_held(names, attempt.chain)
        self._attempts[attempt.session] = attempt
        try:
            await self._link_all(attempt)
            if not is_new:
                session.held = []
            self._ask_all(attempt, names)
            if is_ahead:
                self._send_prompt(attempt, session.history())
            await self._wait_for_answers(attempt)
            attempt.check()
            if not is_ahead:
                attempt.start = min(*attempt.held.values(), len(session.history()) - 1)
                self._send_prompt(attempt, session.history())
            self._prefixes.note(names, attempt.chain)
        except BaseException:
            self.drop(attempt)
            session.release_held(trio.current_time())
            raise

    async def try_fork(self, attempt: Attempt, parent: Attempt) -> None:
        """Begin a new session with the prompt that another one over the same chain has computed.

        Args:
            attempt: Of the new session.
            parent: Its tail has sampled a token, so that every shard has the prompt.

        Raises:
            PalsError: As `try_chain` does.
        """
        prompt = attempt.owner.request.prompt
        fork = Fork(session=parent.session, child=attempt.session, position=len(prompt) - 1)
        self._attempts[attempt.session] = attempt
        try:
            for peer in attempt.peers:
                sampler = self._sampler_for(attempt, peer)
                send_control(self._links, peer, msgspec.structs.replace(fork, sampler=sampler))
            await self._wait_for_answers(attempt)
            attempt.check()
            attempt.start = len(prompt) - 1
            self._send_prompt(attempt, prompt)
        except BaseException:
            self.drop(attempt)
            raise

    def drop(self, attempt: Attempt) -> None:
        """Free an attempt on every shard; may be called twice.

        What its shards have computed stays findable by its names, for whatever begins with
        the same tokens: the rest of this answer over another chain, or the next turn.
        """
        if self._attempts.pop(attempt.session, None) is None:
            return
        # Nobody has computed with the last token that came.
        history = attempt.owner.history()[: max(1, attempt.next_position)]
        names = self._prefixes.name(history[:-1])
        self._prefixes.note(names, attempt.chain)
        for peer in attempt.peers:
            self._tell(peer, Close(session=attempt.session, names=names))

    def acknowledge(self, attempt: Attempt) -> None:
        """Let the tail go on; it is told so rarely that it costs nothing."""
        assert attempt.acks is not None
        told = attempt.acks.take(attempt.next_position)
        if told is not None:
            self._tell(attempt.chain.tail.peer, Ack(session=attempt.session, position=told))

    def _tell(self, peer: PeerId, message: Control) -> None:
        try:
            send_control(self._links, peer, message)
        except PalsError as error:  # a peer that is gone has freed the session by itself
            _log.debug("no message to %s: %s", short_id(peer), error)

    def drop_all(self, session: ClientSession) -> None:
        """Free every attempt of a session; may be called twice."""
        for attempt in [a for a in self._attempts.values() if a.owner is session]:
            self.drop(attempt)

    async def _link_all(self, attempt: Attempt) -> None:
        """Return when there is a link with every shard."""
        errors: list[PalsError] = []

        async def link(hop: Announcement) -> None:
            try:
                await self._links.ensure(hop.peer, hop.addresses)
            except PalsError as error:
                self.blame(attempt, hop.peer)
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for hop in attempt.chain.hops:
                nursery.start_soon(link, hop)
        if errors:
            raise errors[0]

    def _ask_all(self, attempt: Attempt, names: bytes) -> None:
        session, now = attempt.owner, trio.current_time()
        if now >= session.deadline:
            raise DeadlineExceeded(tokens=len(session.tokens))
        message = session.build_open(attempt, names, now)
        session.former = attempt.session
        for peer in attempt.peers:
            asked = msgspec.structs.replace(message, sampler=self._sampler_for(attempt, peer))
            try:
                send_control(self._links, peer, asked)
            except PalsError:
                self.blame(attempt, peer)
                raise

    def _sampler_for(self, attempt: Attempt, peer: PeerId) -> Sampler | None:
        """Return how to sample for the tail, which alone has to know."""
        return attempt.owner.build_sampler() if peer == attempt.chain.tail.peer else None

    async def _wait_for_answers(self, attempt: Attempt) -> None:
        """Return when every shard keeps a slot and can reach the next, or one does not."""
        deadline = trio.current_time() + OPEN_DEADLINE_S
        while not attempt.answered.is_set():
            with trio.move_on_after(OPEN_SUSPICION_S):
                await attempt.answered.wait()
                return
            missing = set(attempt.unanswered)
            answers = await self._questions.ask(missing, deadline_s=PROBE_DEADLINE_S)
            silent = answers.unanswered & attempt.unanswered
            if trio.current_time() >= deadline:
                silent |= attempt.unanswered
            if silent and not attempt.answered.is_set():
                for peer in silent:
                    self.blame(attempt, peer)
                raise StepTimeout(deadline_s=OPEN_DEADLINE_S, chain=attempt.chain)

    def _send_prompt(self, attempt: Attempt, prompt: tuple[int, ...]) -> None:
        """Send all tokens that the chain has to compute before its first one."""
        attempt.next_position = len(prompt)
        attempt.prompted_at = trio.current_time()
        attempt.acks = AckPolicy(self._window, len(prompt), len(prompt))
        head = attempt.chain.head.peer
        for start in range(attempt.start, len(prompt), MAX_ROW_TOKENS):
            part = np.asarray(prompt[start : start + MAX_ROW_TOKENS], dtype="<i4")
            row = Row(attempt.session, start, len(part))
            self._links.send(
                head, Lane.PREFILL, Outgoing(self._tokens, Rows.of(row), (buffer_of(part),))
            )

    def take_refusal(self, attempt: Attempt, peer: PeerId, message: Refused) -> None:
        """Fail an attempt that a shard does not take."""
        name = short_id(peer)
        if message.peer:
            # Both answer this driver: it is the way between them that does not hold.
            attempt.broken_link = peer, PeerId(message.peer)
            error: PalsError = SessionRefused(peer=name, problem=message.problem)
        elif message.code == ShardDraining.code:
            self._routes.mark_leaving(peer)
            attempt.failed.add(peer)
            error = ShardDraining(peer=name)
        elif message.code == DeadlineExceeded.code:
            error = DeadlineExceeded(tokens=len(attempt.owner.tokens))
        elif message.code in BUSY_CODES:
            attempt.failed.add(peer)
            error = ShardBusy(peer=name, problem=message.problem)
        else:
            attempt.failed.add(peer)
            error = SessionRefused(peer=name, problem=message.problem)
        attempt.fail(error)

    def take_preemption(self, attempt: Attempt, peer: PeerId) -> None:
        """End an attempt whose room at a shard went to others: nobody is blamed for it."""
        attempt.failed.add(peer)
        attempt.fail(SessionPreempted(peer=short_id(peer)))

    def blame(self, attempt: Attempt, peer: PeerId) -> None:
        """Note a peer that cannot be talked to, and use it last."""
        attempt.failed.add(peer)
        self._routes.mark_failed(peer)


def send_control(links: Links, peer: PeerId, message: Control) -> None:
    """Queue a control message.

    Raises:
        PeerUnreachable: There is no link with ``peer``.
        QueueFull: It reads too slowly.
    """
    links.send(peer, Lane.CONTROL, Outgoing(CONTROL_SHAPE, NO_ROWS, (encode_control(message),)))
