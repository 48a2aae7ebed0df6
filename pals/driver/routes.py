"""The driver's view of who serves what, kept fresh from discovery."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import trio

from pals.errors import NoChain
from pals.net.announce import Announcement
from pals.net.node import Node
from pals.net.route import Chain, find_chain
from pals.types import LayerRange, PeerId

FIND_DEADLINE_S = 5.0
REFRESH_INCOMPLETE_S = 1.0
REFRESH_S = 10.0
REFRESH_WITH_NEWS_S = 60.0
FAILED_FOR_S = 15.0
MAX_FAILED_FOR_S = 300.0


Offer = tuple[PeerId, LayerRange]
"""What one peer serves; a peer that came back with other layers makes another offer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model that a driver drives.

    Attributes:
        model_id: Its name, for people.
        manifest: SHA-256 of its files; a chain of other files is never used.
        num_layers: Its decoder layers.
        max_position_embeddings: Tokens that the model itself allows in a session.
    """

    model_id: str
    manifest: bytes
    num_layers: int
    max_position_embeddings: int


class RouteTable:
    """The chain that the announcements of the swarm's shards give now.

    What members announce is known without asking; the DHT is asked, and more members are
    met, while that gives no chain, and now and then.
    """

    def __init__(self, node: Node, model: ServedModel) -> None:
        self._node = node
        self._model = model
        self._failures: dict[PeerId, tuple[int, float]] = {}
        self._refreshing = trio.Lock()

    async def run(self) -> None:
        """Refresh until cancelled: often while no chain is known, seldom then."""
        discovery = self._node.discovery
        pause_s = REFRESH_WITH_NEWS_S if discovery.hears_news else REFRESH_S
        while True:
            await self.refresh()
            with trio.move_on_after(pause_s):
                while self._is_covered():
                    await discovery.wait_for_change()
            await trio.sleep(REFRESH_INCOMPLETE_S)

    async def refresh(self) -> None:
        """Ask the DHT once for the announcements of all members."""
        async with self._refreshing:
            members = self._node.members()
            await self._node.discovery.find(members, deadline_s=FIND_DEADLINE_S)

    async def find(self, *, without: Set[Offer] = frozenset()) -> Chain:
        """Return the best chain now, after asking again if none is known.

        Peers that failed lately are used only when nothing else completes a chain: it
        may have been their connection that failed.

        Args:
            without: Offers that must not be used.

        Raises:
            NoChain: The missing layers are served by nobody reachable.
        """
        try:
            return self._chain(without)
        except NoChain:
            await self.refresh()
            return self._chain(without)

    def mark_failed(self, peer: PeerId) -> None:
        """Use ``peer`` last for a while, longer each time: its announcement outlives it."""
        count = self._failures.get(peer, (0, 0.0))[0] + 1
        pause_s = min(FAILED_FOR_S * 2.0 ** (count - 1), MAX_FAILED_FOR_S)
        self._failures[peer] = (count, trio.current_time() + pause_s)

    def mark_good(self, peers: Iterable[PeerId]) -> None:
        """Forget what was held against peers: they gave an answer."""
        for peer in peers:
            self._failures.pop(peer, None)

    def _chain(self, without: Set[Offer]) -> Chain:
        usable = [a for a in self._usable() if (a.peer, a.layers) not in without]
        now = trio.current_time()
        trusted = [a for a in usable if self._failures.get(a.peer, (0, now))[1] <= now]
        try:
            return self._find(trusted)
        except NoChain:
            return self._find(usable)

    def _find(self, announcements: Sequence[Announcement]) -> Chain:
        return find_chain(
            announcements,
            manifest=self._model.manifest,
            num_layers=self._model.num_layers,
            model=self._model.model_id,
        )

    def _usable(self) -> list[Announcement]:
        known = self._node.discovery.announcements()
        return [a for a in known.values() if a.state == "serving"]

    def _is_covered(self) -> bool:
        try:
            self._chain(frozenset())
        except NoChain:
            return False
        return True
