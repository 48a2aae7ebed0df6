"""The batcher of one shard: sessions and their rows in, steps out.

Continuous batching (Yu et al. 2022, Orca): each step takes what waits now, of all sessions;
none waits for another to end. Prompts run in chunks beside the rows of those that decode
(Agrawal et al. 2023, https://arxiv.org/abs/2308.16369), within their share of the time.

Pure: no clock, no jax. Whoever owns it calls `plan` whenever something was added or `next_at`
has come and no step runs, runs the step, calls `finish`, and takes the events. It is called
by one thread at a time. `now` is seconds on a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pals.engine.batch import BatchRules, Event, RowKind, SessionRequest, Step, StepRow
from pals.engine.buckets import Buckets, Program, usual_chunk
from pals.engine.fairness import FairOrder
from pals.engine.gathering import Gathering, find_gap, gap_after_step
from pals.engine.pacing import ChunkOption, PrefillPace, StepCosts
from pals.engine.pages import PageCopy, PagePool
from pals.engine.running import Running, WaitingRow
from pals.engine.sessions import Sessions
from pals.errors import InvalidConfig, InvalidStep, PalsError, QueueFull
from pals.types import SessionId

NEVER = float("inf")

MAX_CHUNKS_AHEAD = 3
"""So many steps have a chunk alone while rows wait, if far more prompts wait than decode."""


@dataclass(slots=True)
class _Draft:
    """A step that is being put together.

    Attributes:
        now: When.
        rows: Short rows.
        row_tokens: What short rows are padded to.
        chunk: Of a prompt.
        pages: Of the widest page table.
        copies: To do before.
        members: The sessions in it.
    """

    now: float
    rows: list[StepRow] = field(default_factory=list[StepRow])
    row_tokens: int = 1
    chunk: StepRow | None = None
    pages: int = 1
    copies: list[PageCopy] = field(default_factory=list[PageCopy])
    members: list[Running] = field(default_factory=list[Running])


class Batcher:
    """Plans the steps of one shard.

    Args:
        buckets: The programs that are compiled.
        pool: The pages that they run over, of the same size.
        rules: How much waits, and who gives way.
        costs: What warm-up measured of each program.
    """

    def __init__(
        self, buckets: Buckets, pool: PagePool, rules: BatchRules, costs: StepCosts
    ) -> None:
        _check(buckets, pool, rules)
        self._buckets = buckets
        self._pool = pool
        self._rules = rules
        self._costs = costs
        self._sessions = Sessions(pool, rules)
        self._pace = PrefillPace(rules.prefill_share)
        self._gathering = Gathering(self._seconds_of)
        self._left: list[Running] = []
        self._chunk_is_due = False
        self._chunks_ahead = 0
        self._wake_at = NEVER
        self._decode_s = 0.0
        self._fits_gaps = False

    # --- sessions --------------------------------------------------------------------

    @property
    def free_tokens(self) -> int:
        """Tokens that sessions to come find room for, as a shard announces them."""
        return self._sessions.free_tokens

    @property
    def max_session_tokens(self) -> int:
        """Tokens that one session may reach if it is alone."""
        return min(self._buckets.limits.max_context_tokens, self._pool.num_tokens)

    @property
    def programs(self) -> tuple[Program, ...]:
        """All that steps may be."""
        return self._buckets.programs

    @property
    def num_running(self) -> int:
        """Sessions that hold pages, or are about to by a fork."""
        return len(self._sessions.running)

    def open(self, request: SessionRequest, now: float) -> None:
        """Let a session wait for room; see `Sessions.open`."""
        if request.max_tokens > self._buckets.limits.max_context_tokens:
            limit = self._buckets.limits.max_context_tokens
            raise InvalidStep(problem=f"{request.max_tokens} tokens, the context has {limit}")
        self._sessions.open(request, now)

    def fork(self, parent: SessionId, child: SessionId, position: int, now: float) -> None:
        """Begin a session with the first tokens of another; see `Sessions.fork`."""
        self._sessions.fork(parent, child, position, now)

    def close(self, session: SessionId, names: tuple[bytes, ...] = ()) -> None:
        """End a session and free its pages at once; see `Sessions.close`."""
        self._sessions.close(session, names)

    def fail(self, error: PalsError) -> None:
        """End every session that runs: a step failed, and took the cache along."""
        self._sessions.fail(error)

    def take_events(self) -> list[Event]:
        """Return what has happened since the last call, in order."""
        return self._sessions.take_events()

    # --- rows ------------------------------------------------------------------------

    def add(
        self, session: SessionId, kind: RowKind, position: int, tokens: int, now: float
    ) -> bool:
        """Queue a row behind the session's others.

        Args:
            session: Whose it is.
            kind: Whether it is of a prompt, one token, or a few to verify.
            position: Of its first token: where the last row ended, or before, which takes
                back what is there from that position on.
            tokens: How many.
            now: The time.

        Returns:
            False when the session is over: a late row is no fault.

        Raises:
            InvalidStep: The row leaves a gap or the session's length, or is too long.
            QueueFull: Too many tokens wait.
        """
        running = self._sessions.running.get(session)
        if running is None:
            return False
        self._check_row(running, kind, position, tokens)
        if self._sessions.waiting_tokens + tokens > self._rules.max_waiting_tokens:
            raise QueueFull(queue="step", limit=f"{self._rules.max_waiting_tokens} tokens")
        self._sessions.waiting_tokens += tokens
        running.add_row(kind, position, tokens, now)
        self._sessions.stand_in_line(running)
        return True

    def _check_row(self, running: Running, kind: RowKind, position: int, tokens: int) -> None:
        if not 0 <= position <= running.end:
            raise InvalidStep(problem=f"position {position}, the session has {running.end}")
        if not position + tokens <= running.request.max_tokens:
            limit = running.request.max_tokens
            raise InvalidStep(
                problem=f"{tokens} tokens at {position} leave the {limit} it may have"
            )
        most = {
            "prefill": running.request.max_tokens,
            "decode": 1,
            "verify": self._buckets.limits.verify_tokens,
        }[kind]
        if not 1 <= tokens <= most:
            raise InvalidStep(problem=f"a {kind} row of {tokens} tokens, which takes 1 to {most}")

    # --- steps -----------------------------------------------------------------------

    def plan(self, now: float) -> Step | None:
        """Return the next step, or None when nothing can run now.

        The step's rows are taken out of the queue and their pages are set; it has to run,
        and steps have to run in the order in which they were planned.
        """
        self._sessions.tend(now)
        self._let_go(now)
        self._pace.fill(now, self._waiting_prompts(now), is_unnoticed=self._fits_gaps)
        self._wake_at = NEVER
        draft = _Draft(now)
        if self._chunk_is_due or self._prompts_are_behind():  # the rows wait for one step
            self._add_chunk(draft)
        if draft.chunk is None:
            if self._waits_for_rows(now):
                return None
            self._add_rows(draft)
            self._add_chunk(draft)
        if draft.members:
            self._chunks_ahead = 0 if draft.rows else self._chunks_ahead + 1
        return self._launch(draft)

    def finish(self, step: Step, seconds: float) -> None:
        """Take that a step has run, and how long it took."""
        self._costs.note(step.program, seconds)
        decoding_s = min(seconds, self._seconds_of(len(step.rows), step.program.row_tokens))
        self._pace.note_step(seconds, decoding_s)
        if decoding_s:
            self._decode_s = decoding_s
        for row in step.all_rows:
            running = self._sessions.running.get(row.session)
            if running is not None and running.is_started:  # else another has its id by now
                self._pool.publish(row.session, row.end)
                if row.kind != "prefill":
                    self._left.append(running)

    def _let_go(self, now: float) -> None:
        """Note whose rows went on to the next shard when the last step ended."""
        for running in self._left:
            if running.next_row is None:
                running.returns.leave(now)
        self._left.clear()

    def _waits_for_rows(self, now: float) -> bool:
        """Return whether the step should rather run with rows that are about to come."""
        if (rows := len(self._sessions.short_line)) == 0:
            return False
        returns = (running.returns for running in self._sessions.running.values())
        until = self._gathering.wait_until(rows, returns, now)
        if until is None:
            return False
        self._wake_at = until
        return True

    def next_at(self) -> float:
        """Return when to call `plan` although nothing was added and no step has ended."""
        return min(self._wake_at, self._sessions.next_at())

    def _add_rows(self, draft: _Draft) -> None:
        """Take all short rows that one program holds, furthest behind first."""
        for running, row in self._in_line(self._sessions.short_line):
            if not draft.rows and row.tokens > 1:
                draft.row_tokens = self._buckets.limits.verify_tokens
            pages = max(draft.pages, self._pool.format.pages_of(row.end))
            fits = self._buckets.choose(len(draft.rows) + 1, draft.row_tokens, 0, pages)
            if row.tokens > draft.row_tokens or fits is None:
                continue
            if (taken := self._take(draft, running, row.tokens)) is not None:
                draft.rows.append(taken)
                self._sessions.stand_in_line(running)
        if not draft.rows:
            draft.row_tokens = 1

    def _add_chunk(self, draft: _Draft) -> None:
        """Take a chunk of the prompt that is furthest behind, if there is time and room."""
        is_free: bool | None = False if draft.rows else None
        is_first = True
        for running, row in self._in_line(self._sessions.prompt_line):
            if running in draft.members:  # this row has to see what the step writes
                is_first = False
                continue
            options = self._chunk_options(draft, running, row)
            if not options:
                self._chunk_is_due = self._chunk_is_due or is_first
                return
            is_first = False
            if is_free is None:
                is_free = next(self._decoding(draft.now), None) is None
            chosen = _fullest(options) if is_free else self._pay(options, draft, running)
            if chosen is None:
                return
            if (taken := self._take(draft, running, chosen.tokens)) is not None:
                draft.chunk = taken
                self._chunk_is_due = False
                self._sessions.stand_in_line(running)
                return
            if not is_free:
                self._pace.refund(chosen.cost_s)
        if is_first:
            self._chunk_is_due = False
            self._pace.rest()

    def _in_line(self, line: FairOrder[SessionId]) -> Iterator[tuple[Running, WaitingRow]]:
        """Yield the sessions that stand in a line with their next rows, first whose turn it is."""
        for session in line.order():
            running = self._sessions.running.get(session)
            if running is not None and running.next_row is not None:  # not preempted meanwhile
                yield running, running.next_row

    def _take(self, draft: _Draft, running: Running, tokens: int) -> StepRow | None:
        """Move the first tokens of a session's next row to a step, if there are pages."""
        row = running.next_row
        assert row is not None
        self._sessions.move_to_next_row(running)
        copies = self._sessions.reserve(running, tokens, draft.members, draft.now)
        if copies is None:  # until pages come free, or those who could give some pause
            self._wake_at = min(self._wake_at, draft.now + self._rules.decoding_s)
            return None
        taken = StepRow(
            session=running.session,
            kind=row.kind,
            position=row.position,
            tokens=tokens,
            pages=self._pool.table(running.session),
        )
        prompt = row.kind == "prefill"
        line = self._sessions.prompt_line if prompt else self._sessions.short_line
        line.charge(running.peer, running.session, tokens)
        running.take_tokens(tokens)
        self._sessions.waiting_tokens -= tokens
        draft.copies += copies
        draft.members.append(running)
        draft.pages = max(draft.pages, len(taken.pages))
        return taken

    def _prompts_are_behind(self) -> bool:
        """Return whether more was saved for prompts than chunks beside rows will spend."""
        return self._chunks_ahead < MAX_CHUNKS_AHEAD and self._pace.has(2 * self._usual_s())

    def _launch(self, draft: _Draft) -> Step | None:
        if not draft.members:
            return None
        chunk_tokens = draft.chunk.tokens if draft.chunk is not None else 0
        program = self._buckets.choose(len(draft.rows), draft.row_tokens, chunk_tokens, draft.pages)
        assert program is not None
        return Step(
            program=program,
            rows=tuple(draft.rows),
            chunk=draft.chunk,
            copies=tuple(draft.copies),
        )

    # --- chunks ----------------------------------------------------------------------

    def _waiting_prompts(self, now: float) -> float:
        """Return for how many prompts to save; those that one chunk does not end count as one.

        Peers who only decode keep their part of the time, however many prompts others bring.
        """
        most = self._buckets.limits.max_chunk_tokens
        waiting = list(self._in_line(self._sessions.prompt_line))
        if not waiting:
            return 0
        short = sum(r.request.prompt_tokens - row.position <= most for r, row in waiting)
        prompts = short + (short < len(waiting))
        peers = {running.peer for running, _ in waiting}
        others = {running.peer for running in self._decoding(now)} - peers
        if not others:
            return prompts
        return min(prompts, self._pace.prompts_for(len(peers) / len(others)))

    def _decoding(self, now: float) -> Iterator[Running]:
        """Yield the sessions whose rows may come at any moment."""
        since = now - self._rules.decoding_s
        for running in self._sessions.running.values():
            if running.decodes and running.origin is None and running.last_row > since:
                yield running

    def _chunk_options(
        self, draft: _Draft, running: Running, row: WaitingRow
    ) -> list[tuple[Program, ChunkOption]]:
        """Return the chunks of a prompt that there are programs for beside a step's rows."""
        if draft.row_tokens > 1:
            return []
        self._sessions.move_to_next_row(running)
        most = min(row.tokens, self._tokens_with_room(running, row))
        spent_s = self._seconds_of(len(draft.rows))
        options: list[tuple[Program, ChunkOption]] = []
        for size in self._buckets.chunk_sizes:
            tokens = min(size, most)
            pages = max(draft.pages, self._pool.format.pages_of(row.position + tokens))
            program = self._buckets.choose(len(draft.rows), 1, tokens, pages)
            if program is not None:
                cost_s = max(0.0, self._costs.seconds(program) - spent_s)
                options.append((program, ChunkOption(tokens, cost_s)))
        return options

    def _tokens_with_room(self, running: Running, row: WaitingRow) -> int:
        """Return how much of a prompt fits the pages that are free, but at least one page's."""
        page_tokens = self._pool.format.page_tokens
        free = self._pool.tokens_within(running.session, self._pool.available)
        return max(free, page_tokens - row.position % page_tokens)

    def _pay(
        self, options: list[tuple[Program, ChunkOption]], draft: _Draft, running: Running
    ) -> ChunkOption | None:
        """Return the chunk that prompts have saved for, while others decode."""
        sizes = self._fit_gap(_little_padded(options), draft, running)
        if not sizes:
            return None
        step_s = self._seconds_of(len(draft.rows)) or self._decode_s
        chosen = self._pace.choose(sizes, self._usual_s(), step_s, in_gap=not draft.rows)
        if chosen is None:
            least_s = min(option.cost_s for option in sizes)
            self._wake_at = min(self._wake_at, self._pace.pays_at(least_s))
        return chosen

    def _fit_gap(
        self, sizes: list[ChunkOption], draft: _Draft, running: Running
    ) -> list[ChunkOption]:
        """Return which chunks may run now: where gaps between rows are long enough for one, those.

        Rows that wait for a chunk wait for it at every shard, since they come there behind it.
        Once, for a short prompt, they do.
        """
        left = running.request.prompt_tokens - running.rows[0].position
        if left <= usual_chunk(self._buckets.limits):
            self._fits_gaps = False
            return sizes
        if self._sessions.short_line:
            return sizes
        if draft.rows:
            least_s = self._seconds_of(0, chunk_tokens=self._buckets.chunk_sizes[0])
            self._fits_gaps = least_s <= self._gap_after(draft)
            return [] if self._fits_gaps else sizes
        gap = find_gap((each.returns for each in self._decoding(draft.now)), draft.now)
        small = [size for size in sizes if size.cost_s <= self._usual_s()]
        self._fits_gaps = gap is not None and any(s.cost_s <= gap.whole_s for s in small)
        if gap is None or not self._fits_gaps:
            return sizes
        fitting = [size for size in small if size.cost_s <= gap.left_s]
        if not fitting:
            self._wake_at = min(self._wake_at, gap.until)
        return fitting[-1:]

    def _gap_after(self, draft: _Draft) -> float:
        """Return how long no row will be here after a step with all that are."""
        here = {running: running.returns for running in draft.members}
        others = (r.returns for r in self._decoding(draft.now) if r not in here)
        return gap_after_step(here.values(), others, draft.now + self._seconds_of(len(draft.rows)))

    def _usual_s(self) -> float:
        """Return how long a chunk takes that is worth its reading of the weights."""
        return self._seconds_of(0, chunk_tokens=usual_chunk(self._buckets.limits))

    def _seconds_of(self, rows: int, row_tokens: int = 1, chunk_tokens: int = 0) -> float:
        """Return how long a step of so many rows takes; 0 for none at all."""
        program = self._buckets.choose(rows, row_tokens, chunk_tokens, 1)
        return 0.0 if program is None else self._costs.seconds(program)


def _fullest(options: list[tuple[Program, ChunkOption]]) -> ChunkOption:
    """Return the chunk that takes most of a prompt without much padding."""
    return max(_little_padded(options), key=lambda option: option.tokens)


def _little_padded(options: list[tuple[Program, ChunkOption]]) -> list[ChunkOption]:
    """Return the chunks without much padding, or the smallest one.

    The rest of a prompt is padded to at most twice its length; a longer padding costs more
    than to compute a full smaller chunk first, and the rest after it.
    """
    little = [o for p, o in options if 2 * o.tokens >= p.chunk_tokens]
    return little or [options[0][1]]


def _check(buckets: Buckets, pool: PagePool, rules: BatchRules) -> None:
    """Raise unless the parts fit one another.

    Raises:
        InvalidConfig: They do not.
    """
    assert buckets.limits.page_tokens == pool.format.page_tokens
    for name, value in (("prefill_share", rules.prefill_share), ("kv_share", rules.kv_share)):
        if not 0 < value < 1:
            problem = f"{name} is {value}"
            raise InvalidConfig(
                source="shard", problem=problem, advice="choose more than 0 and less than 1"
            )
