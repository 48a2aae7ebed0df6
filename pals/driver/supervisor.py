"""Keeping a session going: which sign of trouble asks for which chain, and when to give up."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Set
from contextlib import suppress
from functools import partial

import trio

from pals.driver.opening import OPEN_SUSPICION_S, PROBE_DEADLINE_S, ChainOpener
from pals.driver.questions import Questions
from pals.driver.recovery import (
    MAX_FAILURES,
    MAX_PREEMPTIONS,
    Offer,
    Patience,
    PrefillPace,
    Round,
    StepClock,
    offers_of,
)
from pals.driver.routes import RouteTable, ServedModel
from pals.driver.state import Attempt, ClientSession, SampledToken
from pals.errors import (
    CapacityError,
    ContextTooLong,
    DeadlineExceeded,
    GrammarTimeout,
    InvalidGrammar,
    NoChain,
    PalsError,
    PeerError,
    ProtocolError,
    SessionPreempted,
    ShardBusy,
    StepTimeout,
)
from pals.net.route import Chain
from pals.types import PeerId, activation_dtype, short_id

_log = logging.getLogger(__name__)

RETRY_S = 0.5
"""Between looks at the table for a chain that was not there before."""

FINAL_ERRORS = (DeadlineExceeded, InvalidGrammar, GrammarTimeout)
"""What every other chain would end in too."""

CHAIN_ERRORS = (PeerError, ProtocolError, CapacityError)
"""What one chain may raise and another may not."""


class Supervisor:
    """Gives each session a chain, and another one whenever it needs it.

    Attributes:
        last_chain: The chain that was opened last.
    """

    def __init__(
        self,
        opener: ChainOpener,
        routes: RouteTable,
        questions: Questions,
        model: ServedModel,
        *,
        patience: Patience,
    ) -> None:
        self._opener = opener
        self._routes = routes
        self._questions = questions
        self._model = model
        self._patience = patience
        self._pace = PrefillPace()
        self.last_chain: Chain | None = None

    async def begin(self, session: ClientSession) -> None:
        """Open a new session on its first chain.

        Raises:
            ContextTooLong: Prompt and answer do not fit the chain's context.
            PeerError: There is no chain, also after a while.
            CapacityError: Every chain is full.
            ProtocolError: A shard speaks another wire version, or has another secret.
        """
        attempt = await _keep_trying(
            partial(self._try_new, session),
            wait_s=self._patience.new_request_s,
            passing=(PeerError,),
        )
        self._switch(session, attempt)

    async def begin_fork(self, session: ClientSession, parent: ClientSession) -> None:
        """Open a new session with the prompt of another one, or on a chain of its own.

        Raises:
            PalsError: As `begin` does.
        """
        origin = parent.current
        has_prompt = bool(parent.tokens) and len(session.request.prompt) > 1
        if origin is not None and origin.error is None and has_prompt and not parent.ended:
            session.max_new_tokens = parent.max_new_tokens
            attempt = Attempt(chain=origin.chain, owner=session)
            try:
                await self._opener.try_fork(attempt, origin)
            except CHAIN_ERRORS as error:  # it may have moved, or its room gone to others
                _log.info("fork over %s: %s", origin.chain, error)
            else:
                self._switch(session, attempt)
                return
        await self.begin(session)

    async def run(self, session: ClientSession) -> None:
        """Watch an open session until it ends; what cannot be mended goes to its sink."""
        with session.scope:
            try:
                while not session.ended:
                    await self._mind(session)
            except PalsError as error:
                self._fail(session, error)
            except Exception:  # whatever went wrong, the other sessions go on
                _log.exception("session %s failed", short_id(session.attempt.session))
                self._fail(session, PalsError())

    def end(self, session: ClientSession) -> None:
        """Free a session on every shard; may be called twice."""
        session.ended = True
        session.scope.cancel()
        self._opener.drop_all(session)

    def take_token(self, attempt: Attempt, token: SampledToken) -> None:
        """Give a session its next token, once its attempt is the one that makes them.

        The first ones may be here before the last shard's answer, which alone they wait for.
        """
        session = attempt.owner
        if attempt is not session.current:
            attempt.early.append(token)
            return
        assert session.clock is not None
        if session.silent or not session.clock.has_token:
            self._routes.mark_good(attempt.peers)
        session.take_token(token, trio.current_time())
        if token.last:
            self.end(session)
        else:
            self._opener.acknowledge(attempt)

    def _fail(self, session: ClientSession, error: PalsError) -> None:
        if session.ended:
            return
        session.ended = True
        self._opener.drop_all(session)
        session.sink(error)

    # --- chains ----------------------------------------------------------------------

    async def _try_new(self, session: ClientSession) -> Attempt:
        """Try the chains for a new session, asking discovery when there is none."""
        tries = Round()
        tokens = len(session.request.prompt) + 1
        while True:
            try:
                chain = await self._routes.find(without=tries.avoided, tokens=tokens)
            except NoChain as no_chain:
                raise tries.explain(no_chain) from None
            if not tries.is_new(chain):
                raise tries.explain(None)
            self._plan_length(session, chain)
            attempt = await self._try_chain(session, chain, tries)
            if attempt is not None:
                return attempt

    async def _try_next(self, session: ClientSession, tries: Round) -> Attempt:
        """Try the chains that can go on with a session, of those known now."""
        dtype = activation_dtype(session.chain.head.dtype)
        while True:
            try:
                chain = self._routes.choose(
                    without=tries.avoided,
                    dtype=dtype,
                    context_tokens=session.context_tokens,
                    tokens=len(session.history()) + 1,
                )
            except NoChain as no_chain:
                raise tries.explain(no_chain) from None
            if not tries.is_new(chain):
                raise tries.explain(None)
            attempt = await self._try_chain(session, chain, tries)
            if attempt is not None:
                return attempt

    async def _try_chain(
        self, session: ClientSession, chain: Chain, tries: Round
    ) -> Attempt | None:
        while True:
            attempt = Attempt(chain=chain, owner=session)
            try:
                await self._opener.try_chain(attempt)
            except DeadlineExceeded:
                raise  # also of every other chain
            except CHAIN_ERRORS as error:
                _log.info("chain %s: %s", chain, error)
                if isinstance(error, SessionPreempted) and _may_replay(session):
                    continue
                await self._find_fault(attempt)
                tries.note(chain, frozenset(attempt.failed), error)
                return None
            return attempt

    def _plan_length(self, session: ClientSession, chain: Chain) -> None:
        """Decide how long the answer may get on a session's first chain.

        Raises:
            ContextTooLong: Prompt and answer do not fit.
        """
        prompt_tokens = len(session.request.prompt)
        limit = min(chain.max_context_tokens, self._model.max_position_embeddings)
        wanted = session.request.max_new_tokens or max(1, limit - prompt_tokens)
        if (total := prompt_tokens + wanted) > limit:
            raise ContextTooLong(limit=limit, total=total, prompt=prompt_tokens, completion=wanted)
        session.max_new_tokens = wanted

    def _switch(self, session: ClientSession, attempt: Attempt) -> None:
        """Let an attempt, which has its prompt, make the session's tokens from now on."""
        if session.current is not None:
            self._opener.drop(session.current)
        session.held = None
        session.current = attempt
        session.silent, session.silent_since = frozenset(), None
        now = trio.current_time()
        tokens = len(session.history()) - attempt.start
        session.clock = StepClock.start(
            limit_s=self._patience.step_deadline_s,
            pace=self._pace,
            step_ms=attempt.chain.step_ms,
            prompt_tokens=tokens,
            # What a prompt waited for room says nothing about how fast it is computed.
            sent=max(attempt.prompted_at, now - OPEN_SUSPICION_S),
            now=now,
        )
        self.last_chain = attempt.chain
        name = short_id(attempt.session)
        _log.info(
            "session %s: %d prompt tokens from %d on over %s",
            name,
            tokens,
            attempt.start,
            attempt.chain,
        )
        for token in attempt.early:
            self.take_token(attempt, token)

    async def _find_fault(self, attempt: Attempt) -> None:
        """Learn who is at fault where a shard says that it lost another.

        When one of the chain is silent, it is that one; when all answer here, the two do
        not reach each other, and chains with only one of them come first.
        """
        if attempt.broken_link is None:
            return
        asked = attempt.peers - attempt.failed
        answers = await self._questions.ask(asked, deadline_s=PROBE_DEADLINE_S)
        for peer in answers.unanswered:
            self._opener.blame(attempt, peer)
        attempt.failed |= answers.lost
        reporter, lost = attempt.broken_link
        if lost in answers.stats:
            self._routes.mark_failed(lost)
            self._routes.mark_failed(reporter)

    # --- trouble ---------------------------------------------------------------------

    async def _mind(self, session: ClientSession) -> None:
        """Wait until something may be wrong, and do what it asks for."""
        attempt, clock = session.attempt, session.clock
        assert clock is not None
        wake_at = clock.suspicious_at
        if attempt.leaving:  # nobody could take over yet
            wake_at = min(wake_at, trio.current_time() + RETRY_S)
        with trio.move_on_at(wake_at):
            await session.changed.wait()
        session.changed = trio.Event()
        if attempt.error is not None:
            await self._replace(session, attempt.error)
        elif trio.current_time() >= clock.suspicious_at:
            await self._ask_shards(session, attempt, clock)
        elif attempt.leaving:
            await self._move_from(session, attempt.leaving)

    async def _replace(self, session: ClientSession, error: PalsError) -> None:
        """Go on over another chain after the one at hand has failed.

        Raises:
            PalsError: No chain came in time, or chain after chain fails.
        """
        failed = session.attempt
        name = short_id(failed.session)
        _log.info("session %s after %d tokens: %s", name, len(session.tokens), error)
        if isinstance(error, FINAL_ERRORS):
            raise error
        self._opener.drop(failed)
        if isinstance(error, SessionPreempted):
            await self._replay(session, failed, error)
            return
        session.failures += 1
        if session.failures > MAX_FAILURES:
            raise error
        await self._find_fault(failed)
        attempt = await _keep_trying(
            lambda: self._try_next(session, Round()),
            wait_s=self._patience.wait_for_peers_s,
            passing=CHAIN_ERRORS,
        )
        self._switch(session, attempt)

    async def _replay(
        self, session: ClientSession, preempted: Attempt, error: SessionPreempted
    ) -> None:
        """Go on over a chain where a session's room went to others, or over another one.

        Nobody has failed: the other shards still have its pages, and it keeps its place in
        line. It waits for room for longer than for peers, since those who have it end.

        Raises:
            PalsError: There is no room in time, or it goes to others again and again.
        """
        attempt = None
        if _may_replay(session):
            attempt = await self._try_chain(session, preempted.chain, Round())
        elif session.preemptions > 2 * MAX_PREEMPTIONS:
            raise error
        else:
            avoided = _offers_by(preempted.chain, preempted.failed)
            with suppress(*CHAIN_ERRORS):
                attempt = await self._try_next(session, Round(avoided=avoided))
        if attempt is None:
            attempt = await _keep_trying(
                lambda: self._try_next(session, Round()),
                wait_s=self._patience.wait_for_room_s,
                passing=CHAIN_ERRORS,
            )
        self._switch(session, attempt)

    async def _move_from(self, session: ClientSession, peers: Set[PeerId]) -> PalsError | None:
        """Go on without some shards of a chain that may still work, if another chain can.

        Returns:
            Why none can.
        """
        tries = Round(avoided=_offers_by(session.chain, peers))
        try:
            self._switch(session, await self._try_next(session, tries))
        except ShardBusy as error:
            if not tries.failed & session.attempt.peers:
                return error
            # This session itself may hold the slot that is missing.
            await self._replace(session, error)
        except CHAIN_ERRORS as error:
            return error
        return None

    async def _ask_shards(self, session: ClientSession, attempt: Attempt, clock: StepClock) -> None:
        """Tell a slow chain, which is left alone, from a silent shard and a stuck chain."""
        last = clock.last
        answers = await self._questions.ask(attempt.peers, deadline_s=PROBE_DEADLINE_S)
        if attempt.error is not None or clock.last != last:
            return
        now = trio.current_time()
        if answers.unanswered:
            await self._leave_silent(session, frozenset(answers.unanswered))
        elif now < clock.stuck_at:
            session.silent, session.silent_since = frozenset(), None
            clock.note_answers(now)
        else:
            for peer in attempt.peers:
                self._routes.mark_failed(peer)
            await self._replace(
                session, StepTimeout(deadline_s=clock.deadline_s, chain=attempt.chain)
            )

    async def _leave_silent(self, session: ClientSession, silent: frozenset[PeerId]) -> None:
        """Move away from shards that do not answer, or wait for them to come back."""
        now = trio.current_time()
        for peer in silent - session.silent:
            self._routes.mark_failed(peer)
        session.silent = silent
        session.silent_since = now if session.silent_since is None else session.silent_since
        problem = await self._move_from(session, silent)
        if problem is None:
            return
        if trio.current_time() - session.silent_since >= self._patience.wait_for_peers_s:
            raise problem


async def _keep_trying(
    make: Callable[[], Awaitable[Attempt]],
    *,
    wait_s: float,
    passing: tuple[type[PalsError], ...],
) -> Attempt:
    """Return what ``make`` makes, called again for ``wait_s`` after errors that may pass."""
    until = trio.current_time() + wait_s
    while True:
        try:
            return await make()
        except DeadlineExceeded:
            raise
        except passing:
            if trio.current_time() >= until:
                raise
        await trio.sleep(RETRY_S)


def _may_replay(session: ClientSession) -> bool:
    """Count a preemption, and return whether the session may have the same chain again."""
    session.preemptions += 1
    return session.preemptions <= MAX_PREEMPTIONS


def _offers_by(chain: Chain, peers: Set[PeerId]) -> set[Offer]:
    return {offer for offer in offers_of(chain) if offer[0] in peers}
