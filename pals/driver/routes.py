"""The driver's view of who serves what, kept fresh from discovery."""

from __future__ import annotations

import time
from dataclasses import dataclass

import trio

from pals.errors import NoChain
from pals.net.announce import Announcement
from pals.net.node import Node
from pals.net.route import Chain, find_chain
from pals.types import PeerId

FIND_DEADLINE_S = 5.0
REFRESH_S = 10.0
REFRESH_INCOMPLETE_S = 1.0
FAILED_FOR_S = 15.0


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
        self._failed_until: dict[PeerId, float] = {}
        self._refreshing = trio.Lock()

    async def run(self) -> None:
        """Refresh until cancelled: often while no chain is known, seldom then."""
        while True:
            await self.refresh()
            await trio.sleep(REFRESH_S if self._is_covered() else REFRESH_INCOMPLETE_S)

    async def refresh(self) -> None:
        """Ask discovery once for the announcements of all members."""
        async with self._refreshing:
            found = await self._node.discovery.find(
                self._node.members(), deadline_s=FIND_DEADLINE_S
            )
            self._announcements.update(found)

    async def find(self) -> Chain:
        """Return the best chain now, after asking again if none is known.

        Raises:
            NoChain: The missing layers are served by nobody reachable.
        """
        try:
            return self._chain()
        except NoChain:
            await self.refresh()
            return self._chain()

    def mark_failed(self, peer: PeerId) -> None:
        """Leave ``peer`` out for a while: its announcement outlives it."""
        self._failed_until[peer] = trio.current_time() + FAILED_FOR_S

    def _chain(self) -> Chain:
        return find_chain(
            self._usable(),
            manifest=self._model.manifest,
            num_layers=self._model.num_layers,
            model=self._model.model_id,
        )

    def _usable(self) -> list[Announcement]:
        members, now, unix = self._node.members(), trio.current_time(), time.time()
        return [
            a
            for peer, a in self._announcements.items()
            if peer in members and a.expires_at > unix and self._failed_until.get(peer, now) <= now
        ]

    def _is_covered(self) -> bool:
        try:
            self._chain()
        except NoChain:
            return False
        return True
