"""Grammars at the tail: what each session may sample next, found out while the ring runs.

A token that was sampled goes on its way first; then a thread asks which may follow, and the
row that samples next takes the answer along. It waits here where it comes before that. Runs
on the trio thread but for `MaskSource.next_mask`.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import trio

from pals.engine.work import AllowedTokens, InputRow
from pals.errors import GrammarTimeout, InvalidStep, ModelError, PalsError, SessionRefused
from pals.net.control import answer_of
from pals.net.ring import ShardSession
from pals.text.grammar import GuidedAnswer
from pals.types import Grammar, PeerId

_log = logging.getLogger(__name__)

MASK_DEADLINE_S = 15.0
"""Of one session for one token, whatever the grammars of others take."""


class MaskSource(Protocol):
    """A `pals.text.grammar.GrammarMasks`."""

    def begin(
        self, grammar: Grammar, stop_token_ids: Sequence[int], tokens: Sequence[int]
    ) -> GuidedAnswer: ...

    def next_mask(self, answer: GuidedAnswer) -> AllowedTokens | None: ...

    def end(self, answer: GuidedAnswer) -> None: ...

    def close(self) -> None: ...


_Found = AllowedTokens | Exception | None
_FindAll = Callable[[], list[_Found]]
_RunInThread = Callable[[_FindAll], Awaitable[list[_Found]]]


@dataclass(slots=True, kw_only=True, eq=False)
class _Guided:
    """A session that a grammar guides.

    Attributes:
        session: Which.
        answer: As far as it has come.
        position: Where its next token will stand.
        is_new: Its grammar has not been compiled.
        is_free: Its grammar allows anything from now on.
        allowed: What that token may be; None before it is known, and when the row has it.
        held: The row that samples it, which came before that.
        asked_at: Since when it is looked for; infinity while it is not.
    """

    session: ShardSession
    answer: GuidedAnswer
    position: int
    is_new: bool = True
    is_free: bool = False
    allowed: AllowedTokens | None = None
    held: InputRow | None = None
    asked_at: float = math.inf


class _Begins:
    """Grammars that wait to be compiled, those of one peer after another.

    Compiling takes seconds at worst: whoever sends slow ones keeps its own waiting, and those
    of each other peer for one at a time.
    """

    def __init__(self) -> None:
        self._of_peer: OrderedDict[PeerId, deque[_Guided]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._of_peer)

    def push(self, guided: _Guided) -> None:
        self._of_peer.setdefault(guided.session.driver, deque()).append(guided)

    def pop(self) -> _Guided:
        peer, waiting = self._of_peer.popitem(last=False)
        guided = waiting.popleft()
        if waiting:
            self._of_peer[peer] = waiting
        return guided


class Guides:
    """The sessions of a tail that grammars guide.

    Args:
        local: This shard.
        masks: Knows the grammars; None where the shard is no tail, or has no tokenizer.
        submit: Takes rows that may run now.
        fail: Ends a session.
    """

    def __init__(
        self,
        local: PeerId,
        masks: MaskSource | None,
        *,
        submit: Callable[[Sequence[InputRow]], None],
        fail: Callable[[ShardSession, PalsError], None],
    ) -> None:
        self._local = local
        self._masks = masks
        self._submit = submit
        self._fail = fail
        self._run_in_thread: _RunInThread
        self._run_in_thread = partial(trio.to_thread.run_sync, abandon_on_cancel=True)
        self._guided: dict[ShardSession, _Guided] = {}
        self._steps: deque[_Guided] = deque()
        self._begins = _Begins()
        self._wake = trio.Event()

    def open(self, session: ShardSession, now: float) -> None:
        """Begin to guide a session, if it has a grammar.

        Raises:
            InvalidGrammar: The grammar is none at first sight.
            SessionRefused: This shard enforces no grammars.
        """
        spec = session.sampler.grammar
        if spec is None:
            return
        if self._masks is None:
            raise SessionRefused(peer=self._local, problem="it has no tokenizer for grammars")
        answer = self._masks.begin(
            spec.to_grammar(), tuple(session.stop_token_ids), answer_of(session.sampler)
        )
        guided = _Guided(session=session, answer=answer, position=session.prompt_tokens)
        self._guided[session] = guided
        self._look(guided, now)

    def close(self, session: ShardSession) -> None:
        """Forget a session that is over, or has no grammar."""
        guided = self._guided.pop(session, None)
        if guided is not None and self._masks is not None:
            self._masks.end(guided.answer)

    def attach(self, rows: Sequence[InputRow]) -> Sequence[InputRow]:
        """Return the rows that may run now, with what they may sample; the others wait."""
        if not self._guided:
            return rows
        return [ready for row in rows if (ready := self._attach(row)) is not None]

    def _attach(self, row: InputRow) -> InputRow | None:
        assert isinstance(row.owner, ShardSession)
        guided = self._guided.get(row.owner)
        end = row.position + len(row.inputs)
        if guided is None or guided.is_free or end < guided.session.prompt_tokens:
            return row
        if row.kind == "verify" or end != guided.position or guided.held is not None:
            problem = f"a row of {len(row.inputs)} tokens at {row.position}, where a grammar "
            problem += f"guides the token at {guided.position}"
            self._fail(row.owner, InvalidStep(problem=problem))
            return None
        if guided.allowed is None:
            guided.held = row
            return None
        allowed, guided.allowed = guided.allowed, None
        return replace(row, allowed=allowed)

    def advance(self, session: ShardSession, position: int, token: int, now: float) -> None:
        """Take the token that was sampled for ``position``, and look what may follow it."""
        guided = self._guided.get(session)
        if guided is None or guided.is_free:
            return
        guided.answer.tokens.append(token)
        guided.position = position + 1
        self._look(guided, now)

    def fail_late(self, now: float) -> None:
        """End the sessions whose grammars take too long."""
        for guided in list(self._guided.values()):
            if now - guided.asked_at > MASK_DEADLINE_S:
                self._fail(guided.session, GrammarTimeout(deadline_s=MASK_DEADLINE_S))

    async def run(self) -> None:
        """Find out what the sessions may sample, until cancelled."""
        while True:
            if self._steps:
                # one hop to the thread for all of them; what is new waits, and may take seconds
                due = [self._steps.popleft() for _ in range(len(self._steps))]
            elif self._begins:
                due = [self._begins.pop()]
            else:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            due = [guided for guided in due if self._is_current(guided)]
            found = await self._run_in_thread(partial(self._find_all, due))
            for guided, result in zip(due, found, strict=True):
                if self._is_current(guided):
                    self._take(guided, result)

    def stop(self) -> None:
        """End the process that knows the grammars."""
        if self._masks is not None:
            self._masks.close()

    def _look(self, guided: _Guided, now: float) -> None:
        guided.asked_at = now
        if guided.is_new:
            self._begins.push(guided)
        else:
            self._steps.append(guided)
        self._wake.set()

    def _is_current(self, guided: _Guided) -> bool:
        return self._guided.get(guided.session) is guided

    def _find_all(self, due: Sequence[_Guided]) -> list[_Found]:
        """Return what each may sample next, or why that cannot be said; on a thread."""
        assert self._masks is not None
        found: list[_Found] = []
        for guided in due:
            try:
                found.append(self._masks.next_mask(guided.answer))
            except Exception as error:
                found.append(error)
        return found

    def _take(self, guided: _Guided, found: _Found) -> None:
        guided.asked_at, guided.is_new = math.inf, False
        if isinstance(found, Exception):
            self._fail(guided.session, self._show(found))
            return
        guided.allowed, guided.is_free = found, found is None
        held, guided.held = guided.held, None
        if held is not None:
            self._submit(self.attach((held,)))

    def _show(self, error: Exception) -> PalsError:
        """Return what the driver is told; what only this machine may know goes to its log."""
        if isinstance(error, PalsError) and not isinstance(error, ModelError):
            return error
        _log.error("a grammar could not be followed", exc_info=error)
        return SessionRefused(peer=self._local, problem="its tokenizer enforces no grammar")
