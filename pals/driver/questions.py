"""Asking shards how they are: for people's reports, and to tell the slow from the gone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import trio

from pals.driver.interface import HopReport
from pals.errors import PalsError
from pals.net.control import Stats
from pals.net.route import Chain
from pals.types import PeerId


@dataclass(slots=True, kw_only=True, eq=False)
class Answers:
    """What came back from the shards that were asked.

    Attributes:
        unanswered: Shards that said nothing.
        stats: The timings of those that answered.
        lost: Those whose link ended before they did.
    """

    unanswered: set[PeerId]
    stats: dict[PeerId, Stats] = field(default_factory=dict[PeerId, Stats])
    lost: set[PeerId] = field(default_factory=set[PeerId])
    complete: trio.Event = field(default_factory=trio.Event)

    def settle(self, peer: PeerId, answer: Stats | None) -> None:
        """Take an answer, or that there will be none."""
        if peer not in self.unanswered:
            return
        self.unanswered.discard(peer)
        if answer is None:
            self.lost.add(peer)
        else:
            self.stats[peer] = answer
        if not self.unanswered:
            self.complete.set()


class Questions:
    """Requests for timings, each waiting for its answers.

    Args:
        send: Sends a request to one shard; raises `PalsError` when there is no link.
    """

    def __init__(self, send: Callable[[PeerId], None]) -> None:
        self._send = send
        self._open: list[Answers] = []

    async def ask(self, peers: Iterable[PeerId], *, deadline_s: float) -> Answers:
        """Ask shards, and return what they answered by ``deadline_s`` seconds."""
        asked = sorted(set(peers))
        answers = Answers(unanswered=set(asked))
        self._open.append(answers)
        try:
            for peer in asked:
                try:
                    self._send(peer)
                except PalsError:
                    answers.settle(peer, None)
            if asked:
                with trio.move_on_after(deadline_s):
                    await answers.complete.wait()
        finally:
            self._open.remove(answers)
        return answers

    def on_stats(self, peer: PeerId, stats: Stats) -> None:
        """Take the timings of a shard."""
        for answers in self._open:
            answers.settle(peer, stats)

    def on_peer_lost(self, peer: PeerId) -> None:
        """Wait no longer for a peer whose link ended."""
        for answers in self._open:
            answers.settle(peer, None)


def build_reports(chain: Chain, stats: Mapping[PeerId, Stats]) -> list[HopReport]:
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
