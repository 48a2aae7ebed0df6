"""The driver's view of who serves what, kept fresh from discovery."""

from __future__ import annotations

import time
from collections.abc import Iterable, Set
from dataclasses import dataclass

import trio

from pals.driver.recovery import Offer
from pals.driver.suspects import Suspects
from pals.errors import NoChain
from pals.net.announce import Announcement
from pals.net.node import Node
from pals.net.route import Chain, find_chain
from pals.types import ActivationDtype, PeerId

FIND_DEADLINE_S = 5.0
REFRESH_S = 10.0
REFRESH_INCOMPLETE_S = 1.0


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
    """Announcements of the swarm's shards, and the chain that they give."""

    def __init__(self, node: Node, model: ServedModel) -> None:
        self._node = node
        self._model = model
        self._announcements: dict[PeerId, Announcement] = {}
        self._suspects = Suspects()
        self._refreshing = trio.Lock()
        self._doubtful = trio.Event()

    async def run(self) -> None:
        """Refresh until cancelled: often while no healthy chain is known, seldom then."""
        while True:
            self._doubtful = trio.Event()
            await self.refresh()
            if self._is_healthy():
                with trio.move_on_after(REFRESH_S):
                    await self._doubtful.wait()
            else:
                await trio.sleep(REFRESH_INCOMPLETE_S)

    async def refresh(self) -> None:
        """Ask discovery once for the announcements of all members."""
        async with self._refreshing:
            found = await self._node.discovery.find(
                self._node.members(), deadline_s=FIND_DEADLINE_S
            )
            self._announcements.update(found)

    async def find(self, *, without: Set[Offer] = frozenset()) -> Chain:
        """Return the best chain now, after asking again if none is known.

        Args:
            without: Offers that must not be used.

        Raises:
            NoChain: The missing layers are served by nobody reachable.
        """
        try:
            return self.choose(without=without)
        except NoChain:
            await self.refresh()
            return self.choose(without=without)

    def choose(
        self,
        *,
        without: Set[Offer] = frozenset(),
        dtype: ActivationDtype | None = None,
        context_tokens: int = 0,
    ) -> Chain:
        """Return the best chain of those known now.

        Peers that failed lately are used only where nobody else serves their layers: it
        may have been their connection that failed.

        Args:
            without: Offers that must not be used.
            dtype: The activations that the chain must run in; ``None`` takes any.
            context_tokens: Tokens that a session must be able to reach on every hop.

        Raises:
            NoChain: The missing layers are served by nobody reachable.
        """
        now = trio.current_time()
        usable = [
            a
            for a in self._usable()
            if (a.peer, a.layers) not in without and a.max_context_tokens >= context_tokens
        ]
        return find_chain(
            usable,
            manifest=self._model.manifest,
            num_layers=self._model.num_layers,
            dtype=dtype,
            model=self._model.model_id,
            failures={a.peer: self._suspects.failures(a, now) for a in usable},
        )

    def mark_failed(self, peer: PeerId) -> None:
        """Use ``peer`` last, until it gives an answer or announces itself after a while."""
        self._suspects.mark_failed(peer, seq=self._newest_seq(peer), now=trio.current_time())
        self._doubtful.set()

    def mark_leaving(self, peer: PeerId) -> None:
        """Use ``peer`` no more, until it announces itself again."""
        self._suspects.mark_leaving(peer, seq=self._newest_seq(peer))
        self._doubtful.set()

    def mark_good(self, peers: Iterable[PeerId]) -> None:
        """Forget what was held against peers: they gave an answer."""
        self._suspects.mark_good(peers)

    def _newest_seq(self, peer: PeerId) -> int:
        known = self._announcements.get(peer)
        return 0 if known is None else known.seq

    def _usable(self) -> list[Announcement]:
        members, unix = self._node.members(), time.time()
        return [
            a
            for peer, a in self._announcements.items()
            if peer in members and a.expires_at > unix and not self._suspects.is_leaving(a)
        ]

    def _is_healthy(self) -> bool:
        """Return whether a chain is known without a peer that failed lately."""
        try:
            chain = self.choose()
        except NoChain:
            return False
        now = trio.current_time()
        return not any(self._suspects.failures(hop, now) for hop in chain.hops)
