"""The driver's view of who serves what, kept fresh from discovery."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Set
from dataclasses import dataclass
from functools import partial

import trio

from pals.driver.recovery import Offer
from pals.driver.suspects import Suspects
from pals.errors import NoChain
from pals.net.announce import Announcement
from pals.net.node import Node
from pals.net.route import Chain, find_chain
from pals.types import ActivationDtype, PeerId

FIND_DEADLINE_S = 5.0
REFRESH_INCOMPLETE_S = 1.0
REFRESH_S = 10.0
REFRESH_WITH_NEWS_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model that a driver drives.

    Attributes:
        model_id: Its name, for people.
        manifest: SHA-256 of its files; a chain of other files is never used.
        num_layers: Its decoder layers.
        max_position_embeddings: Tokens that the model itself allows in a session.
        hidden_size: Of the model, which is the size of its embeddings.
    """

    model_id: str
    manifest: bytes
    num_layers: int
    max_position_embeddings: int
    hidden_size: int


class RouteTable:
    """The chain that the announcements of the swarm's shards give now.

    What members announce is known without asking; the DHT is asked, and more members are
    met, while that gives no chain, and now and then.
    """

    def __init__(self, node: Node, model: ServedModel) -> None:
        self._node = node
        self._model = model
        self._suspects = Suspects()
        self._refreshing = trio.Lock()
        self._doubtful = trio.Event()

    async def run(self) -> None:
        """Refresh until cancelled: often while no healthy chain is known, seldom then."""
        discovery = self._node.discovery
        pause_s = REFRESH_WITH_NEWS_S if discovery.hears_news else REFRESH_S
        while True:
            await self.refresh()
            with trio.move_on_after(pause_s):
                while self._is_healthy():
                    await self._wait_for_news()
            await trio.sleep(REFRESH_INCOMPLETE_S)

    async def _wait_for_news(self) -> None:
        """Wait until an announcement or a failure may change which chain is best."""
        self._doubtful = trio.Event()
        async with trio.open_nursery() as nursery:

            async def wait(for_news: Callable[[], Awaitable[None]]) -> None:
                await for_news()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait, self._node.discovery.wait_for_change)
            nursery.start_soon(wait, self._doubtful.wait)

    async def refresh(self) -> None:
        """Ask the DHT once for the announcements of all members, and meet more of them."""
        node = self._node
        async with self._refreshing:
            with trio.move_on_after(FIND_DEADLINE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(node.meet_more)
                    find = partial(node.discovery.find, deadline_s=FIND_DEADLINE_S)
                    nursery.start_soon(find, node.members())

    async def find(self, *, without: Set[Offer] = frozenset(), tokens: int = 1) -> Chain:
        """Return the best chain now, after asking again if none is known.

        Args:
            without: Offers that must not be used.
            tokens: See `choose`.

        Raises:
            NoChain: The missing layers are served by nobody reachable.
        """
        try:
            return self.choose(without=without, tokens=tokens)
        except NoChain:
            await self.refresh()
            return self.choose(without=without, tokens=tokens)

    def choose(
        self,
        *,
        without: Set[Offer] = frozenset(),
        dtype: ActivationDtype | None = None,
        context_tokens: int = 0,
        tokens: int = 1,
    ) -> Chain:
        """Return the best chain of those known now.

        Peers that failed lately are used only where nobody else serves their layers: it
        may have been their connection that failed.

        Args:
            without: Offers that must not be used.
            dtype: The activations that the chain must run in; ``None`` takes any.
            context_tokens: Tokens that a session must be able to reach on every hop.
            tokens: That should find room at every hop now; chains without come last.

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
            tokens=tokens,
        )

    def mark_failed(self, peer: PeerId) -> None:
        """Use ``peer`` last, until it gives an answer or announces itself after a while.

        The other members are told when it is gone.
        """
        discovery = self._node.discovery
        self._suspects.mark_failed(peer, seq=discovery.last_seq(peer), now=trio.current_time())
        discovery.report_lost(peer)
        self._doubtful.set()

    def mark_leaving(self, peer: PeerId) -> None:
        """Use ``peer`` no more, until it announces itself again."""
        self._suspects.mark_leaving(peer, seq=self._node.discovery.last_seq(peer))
        self._doubtful.set()

    def mark_good(self, peers: Iterable[PeerId]) -> None:
        """Forget what was held against peers: they gave an answer."""
        self._suspects.mark_good(peers)

    def _usable(self) -> list[Announcement]:
        return [
            a
            for a in self._node.discovery.announcements().values()
            if a.state == "serving" and not self._suspects.is_leaving(a)
        ]

    def _is_healthy(self) -> bool:
        """Return whether a chain is known without a peer that failed lately."""
        try:
            chain = self.choose()
        except NoChain:
            return False
        now = trio.current_time()
        return not any(self._suspects.failures(hop, now) for hop in chain.hops)
