"""A membership backend as its users see it, whatever carries their calls to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from pals.config import Profile
from pals.swarm.identity import Identity
from pals.types import SwarmId


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedRecords:
    """What a backend says the chain is; nothing of it is verified.

    Attributes:
        entries: Encoded entries from the genesis on; None when they are still those of the
            tag that was asked with.
        etag: Tag of the chain.
        freshness: A signed word that it is the newest chain; empty when the backend gives none.
    """

    entries: tuple[bytes, ...] | None
    etag: str
    freshness: bytes


class Backend(Protocol):
    """One backend; holds no state between calls.

    Every method raises `BackendUnreachable` when no proper answer comes within a deadline and
    `BackendRefused` when the answer is an error.
    """

    @property
    def url(self) -> str:
        """The address by which errors name it."""
        ...

    async def fetch_key(self) -> bytes:
        """Return the key with which it signs how new its lists are."""
        ...

    async def create_swarm(self, genesis: bytes) -> bytes:
        """Store a genesis and return its entry."""
        ...

    async def append(
        self, swarm_id: SwarmId, record: bytes, *, signer: Identity | None = None
    ) -> bytes:
        """Store a record and return its entry.

        Args:
            swarm_id: The swarm.
            record: The signed record.
            signer: The administrator who asks for it; None for a member that leaves.
        """
        ...

    async def redeem(self, swarm_id: SwarmId, auth: bytes, join: bytes) -> bytes:
        """Join by an invite and return the entry; may be repeated after a lost reply.

        Raises:
            InviteRefused: The invite is unknown, spent, closed or expired.
        """
        ...

    async def fetch_records(self, swarm_id: SwarmId, *, etag: str = "") -> FetchedRecords:
        """Return the chain, unless it is still that of ``etag``."""
        ...

    async def put_hint(self, swarm_id: SwarmId, hint: bytes) -> None:
        """Leave this machine's address hint."""
        ...

    async def fetch_hints(self, swarm_id: SwarmId) -> tuple[bytes, ...]:
        """Return the members' address hints, unverified."""
        ...


OnChange = Callable[[], Awaitable[None]]
"""Called when a backend of this process took a record, before its sender is answered."""

OpenBackend = Callable[[str, Profile], Backend]
"""Returns the backend at an address, as a profile reaches it; connects to nothing yet."""
