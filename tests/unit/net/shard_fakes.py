"""What a shard's service stands between: links that note what is sent, and no engine."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from pals.engine.scheduler import WorkItem
from pals.errors import PeerUnreachable
from pals.net.control import Control, decode_control
from pals.net.wire import Kind, Lane, Outgoing, Row
from pals.types import PeerId

DRIVER, LOCAL, NEXT = PeerId("driver"), PeerId("local"), PeerId("next")


class FakeLinks:
    """Notes what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[PeerId, Outgoing]] = []
        self.decode_seal_s: list[float] = []

        self.unreachable = trio.Event()
        self.silent: set[PeerId] = set()
        self.members = {DRIVER, LOCAL, NEXT}

    def is_member(self, peer: PeerId) -> bool:
        return peer in self.members

    async def ensure(self, peer: PeerId, addresses: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        if peer in self.silent:
            await self.unreachable.wait()
            raise PeerUnreachable(peer=peer, problem="silent")

    def send(self, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        self.sent.append((peer, outgoing))

    def control(self) -> list[Control]:
        return [
            decode_control(peer, memoryview(b"".join(outgoing.payload)))
            for peer, outgoing in self.sent
            if outgoing.shape.kind is Kind.CONTROL
        ]

    def rows(self) -> list[tuple[PeerId, Row]]:
        return [(peer, row) for peer, outgoing in self.sent for row in outgoing.rows]


class FakeCompute:
    """Keeps submitted rows until the test says what came out of them."""

    def __init__(self) -> None:
        self.items: list[WorkItem] = []

    def submit(self, items: list[WorkItem]) -> None:
        self.items += items

    def drop(self, session: object) -> None:
        self.items = [item for item in self.items if item.session is not session]
