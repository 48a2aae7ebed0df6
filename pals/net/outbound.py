"""Rows on their way out of a shard: a frame for each peer that rows of one step go to.

Row tables are made by columns, and payloads a frame at a time. What does not go out ends
its sessions, by way of whoever made the `Outbound`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pals.engine.work import Array, RowResult, Sampled, StepResult
from pals.errors import PalsError
from pals.net.control import Control, encode_control
from pals.net.links import Links
from pals.net.ring import ShardSession
from pals.net.scores import pack_scores
from pals.net.wire import (
    CONTROL_SHAPE,
    FLAG_LAST,
    NO_ROWS,
    FrameShape,
    Lane,
    Outgoing,
    Rows,
    buffer_of,
)
from pals.types import PeerId, SessionId

OnUnsent = Callable[[ShardSession, PalsError, PeerId], None]
"""Told of each session whose rows did not go out, why, and to whom they were to go."""


@dataclass(slots=True)
class _TokenBatch:
    """Tokens for one peer, by columns with one entry a row; of `tokens` one a token."""

    sessions: list[ShardSession] = field(default_factory=list[ShardSession])
    ids: list[SessionId] = field(default_factory=list[SessionId])
    positions: list[int] = field(default_factory=list[int])
    counts: list[int] = field(default_factory=list[int])
    flags: list[int] = field(default_factory=list[int])
    tokens: list[int] = field(default_factory=list[int])


class Tokens:
    """Sampled tokens and where each of them goes: ids, or their places in what was sampled."""

    def __init__(self) -> None:
        self.batches: defaultdict[PeerId, _TokenBatch] = defaultdict(_TokenBatch)

    def add(
        self,
        peer: PeerId,
        session: ShardSession,
        position: int,
        tokens: Sequence[int],
        *,
        last: bool = False,
    ) -> None:
        """Have the tokens of a row go to ``peer`` in the frame that it gets."""
        batch = self.batches[peer]
        batch.sessions.append(session)
        batch.ids.append(session.session)
        batch.positions.append(position)
        batch.counts.append(len(tokens))
        batch.flags.append(FLAG_LAST if last else 0)
        batch.tokens += tokens


class Outbound:
    """Sends what a shard makes.

    Args:
        links: The node's links.
        on_unsent: See `OnUnsent`.
    """

    def __init__(self, links: Links, on_unsent: OnUnsent) -> None:
        self._links = links
        self._on_unsent = on_unsent

    def send_control(self, peer: PeerId, message: Control) -> None:
        """Queue a control message.

        Raises:
            PeerUnreachable: There is no link with ``peer``.
            QueueFull: It reads too slowly.
        """
        outgoing = Outgoing(CONTROL_SHAPE, NO_ROWS, (encode_control(message),))
        self._links.send(peer, Lane.CONTROL, outgoing)

    def send_hidden(
        self, shape: FrameShape, result: StepResult, sessions: Sequence[ShardSession | None]
    ) -> None:
        """Send the hidden states of a step on, those of prompts on their own lane.

        Args:
            shape: Of the frames.
            result: The step.
            sessions: That of each row; None where it has ended meanwhile.
        """
        assert result.output is not None
        hidden = result.output.hidden
        assert hidden is not None
        ways: defaultdict[tuple[PeerId, Lane], list[tuple[RowResult, ShardSession]]]
        ways = defaultdict(list)
        for row, session in zip(result.rows, sessions, strict=True):
            if session is not None:
                # The first row of a fork runs among those that decode, but is of a prompt.
                lane = Lane.PREFILL if row.position < session.prompt_tokens else Lane.DECODE
                ways[session.receiver, lane].append((row, session))
        for (peer, lane), taken in ways.items():
            self._send_hidden_on(peer, lane, shape, hidden, taken)

    def _send_hidden_on(
        self,
        peer: PeerId,
        lane: Lane,
        shape: FrameShape,
        hidden: Array,
        taken: Sequence[tuple[RowResult, ShardSession]],
    ) -> None:
        rows = Rows(
            tuple([row.session for row, _ in taken]),
            tuple([row.position for row, _ in taken]),
            tuple([row.tokens for row, _ in taken]),
            (0,) * len(taken),
        )
        states = _states_of(hidden, [row for row, _ in taken])
        outgoing = Outgoing(shape, rows, (buffer_of(states),))
        self._send(peer, lane, outgoing, [session for _, session in taken])

    def send_tokens(self, shape: FrameShape, tokens: Tokens) -> None:
        """Send sampled tokens, a frame to each peer that gets some."""
        for peer, batch in tokens.batches.items():
            self._send_batch(peer, shape, batch, np.array(batch.tokens, "<i4"))

    def send_scores(self, shape: FrameShape, places: Tokens, sampled: Sampled) -> None:
        """Send sampled tokens with their log-probabilities, a frame to each peer.

        Args:
            shape: Of the frames.
            places: Where the tokens stand in ``sampled``.
            sampled: What the step has made.
        """
        for peer, batch in places.batches.items():
            at = batch.tokens
            words = pack_scores(
                sampled.ids[at],
                sampled.logprobs[at],
                sampled.top_ids[at],
                sampled.top_logprobs[at],
            )
            self._send_batch(peer, shape, batch, words)

    def send_pooled(self, shape: FrameShape, session: ShardSession, mean: Array) -> None:
        """Send the mean of the hidden states of a session's prompt to its driver.

        Args:
            shape: Of the frame.
            session: Whose it is.
            mean: ``float32[D]``.
        """
        rows = Rows((session.session,), (session.prompt_tokens,), (1,), (FLAG_LAST,))
        outgoing = Outgoing(shape, rows, (buffer_of(mean.astype("<f4")),))
        self._send(session.driver, Lane.DECODE, outgoing, [session])

    def _send_batch(
        self, peer: PeerId, shape: FrameShape, batch: _TokenBatch, payload: Array
    ) -> None:
        rows = Rows(
            tuple(batch.ids), tuple(batch.positions), tuple(batch.counts), tuple(batch.flags)
        )
        outgoing = Outgoing(shape, rows, (buffer_of(payload),))
        self._send(peer, Lane.DECODE, outgoing, batch.sessions)

    def _send(
        self, peer: PeerId, lane: Lane, outgoing: Outgoing, sessions: Sequence[ShardSession]
    ) -> None:
        try:
            self._links.send(peer, lane, outgoing)
        except PalsError as error:
            for session in sessions:
                self._on_unsent(session, error, peer)


def _states_of(hidden: Array, rows: Sequence[RowResult]) -> Array:
    """Return the states of some rows of a step, where they lie if they follow one another."""
    begin, end = rows[0].first, rows[-1].first + rows[-1].outputs
    if end - begin == sum([row.outputs for row in rows]):
        return hidden[begin:end]
    return np.concatenate([hidden[row.first : row.first + row.outputs] for row in rows])
