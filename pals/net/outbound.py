"""Rows on their way out of a shard: a frame for each peer that rows of one step go to.

Row tables are made by columns, and payloads a frame at a time. What does not go out ends
its sessions, by way of whoever made the `Outbound`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pals.engine.worker import StepResult
from pals.errors import PalsError
from pals.net.control import Control, encode_control
from pals.net.links import Links
from pals.net.ring import ShardSession
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
    """Token ids for one peer, by columns with one entry a row."""

    sessions: list[ShardSession] = field(default_factory=list[ShardSession])
    ids: list[SessionId] = field(default_factory=list[SessionId])
    positions: list[int] = field(default_factory=list[int])
    flags: list[int] = field(default_factory=list[int])
    tokens: list[int] = field(default_factory=list[int])


class Tokens:
    """Sampled ids and where each of them goes."""

    def __init__(self) -> None:
        self.batches: defaultdict[PeerId, _TokenBatch] = defaultdict(_TokenBatch)

    def add(
        self,
        peer: PeerId,
        session: ShardSession,
        position: int,
        token: int,
        *,
        last: bool = False,
    ) -> None:
        """Have a token go to ``peer`` in the frame that it gets."""
        batch = self.batches[peer]
        batch.sessions.append(session)
        batch.ids.append(session.session)
        batch.positions.append(position)
        batch.flags.append(FLAG_LAST if last else 0)
        batch.tokens.append(token)


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
        """Send the hidden states of a step on.

        Args:
            shape: Of the frames.
            result: The step, whose outputs are ``[sum(T), D]``.
            sessions: That of each item; None where it has ended meanwhile.
        """
        places: defaultdict[PeerId, list[int]] = defaultdict(list)
        for place, session in enumerate(sessions):
            if session is not None:
                places[session.receiver].append(place)
        for peer, of_peer in places.items():
            self._send_hidden_to(peer, shape, result, sessions, of_peer)

    def _send_hidden_to(
        self,
        peer: PeerId,
        shape: FrameShape,
        result: StepResult,
        sessions: Sequence[ShardSession | None],
        places: list[int],
    ) -> None:
        items, outputs = result.items, result.outputs
        count = len(places)
        tokens_each = len(outputs) // len(items)
        taken = [session for place in places if (session := sessions[place]) is not None]
        rows = Rows(
            tuple([session.session for session in taken]),
            tuple([items[place].position for place in places]),
            (tokens_each,) * count,
            (0,) * count,
        )
        # Rows of several peers in one step are copied apart; of one peer they stay as they are.
        sent = outputs if count == len(items) else outputs[places]
        lane = Lane.DECODE if items[0].is_decode else Lane.PREFILL
        self._send(peer, lane, Outgoing(shape, rows, (buffer_of(sent),)), taken)

    def send_tokens(self, shape: FrameShape, tokens: Tokens) -> None:
        """Send sampled tokens, a frame to each peer that gets some."""
        for peer, batch in tokens.batches.items():
            count = len(batch.tokens)
            rows = Rows(tuple(batch.ids), tuple(batch.positions), (1,) * count, tuple(batch.flags))
            payload = buffer_of(np.array(batch.tokens, "<i4"))
            self._send(peer, Lane.DECODE, Outgoing(shape, rows, (payload,)), batch.sessions)

    def _send(
        self, peer: PeerId, lane: Lane, outgoing: Outgoing, sessions: Sequence[ShardSession]
    ) -> None:
        try:
            self._links.send(peer, lane, outgoing)
        except PalsError as error:
            for session in sessions:
                self._on_unsent(session, error, peer)
