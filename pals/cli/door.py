"""The door of `pals backend`: invites redeemed over libp2p beside the HTTP service."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pals.cli import console
from pals.driver.bridge import TrioThread
from pals.net.nat.addresses import read_announced

if TYPE_CHECKING:
    from pals.backend.limiter import BackendLimiter
    from pals.backend.service import BackendService


@dataclass(frozen=True, slots=True, kw_only=True)
class Doorway:
    """Where a door is.

    Attributes:
        folder: Where its identity is kept.
        port: Port to listen on, 0 for a free one; None is no door.
        announced: Multiaddrs at which a port forward leads to it.
    """

    folder: Path
    port: int | None
    announced: tuple[str, ...]


@contextmanager
def door_beside(
    doorway: Doorway,
    service: BackendService,
    limiter: BackendLimiter,
    *,
    on_crash: Callable[[], None],
) -> Generator[tuple[str, ...]]:
    """Let strangers join over libp2p until the block ends, in a thread of its own.

    Args:
        doorway: Where.
        service: What they join.
        limiter: How often, over all transports together.
        on_crash: Called when it ends by an error.

    Returns:
        The addresses for invites, those announced first.

    Raises:
        InvalidConfig: An announced address is none, or the door's identity is damaged.
        PortInUse: The port is taken.
    """
    if doorway.port is None:
        yield ()
        return
    from pals.net.hosted import load_door_identity
    from pals.net.hosting import open_service_door

    announced = [read_announced(address) for address in doorway.announced]
    identity = load_door_identity(doorway.folder)
    listen = f"/ip4/0.0.0.0/tcp/{doorway.port}"
    opening = partial(open_service_door, service, identity, limiter=limiter, listen=listen)
    thread = TrioThread(opening, on_crash=on_crash)
    try:
        door = thread.start()
        yield (*(f"{address}/p2p/{door.peer_id}" for address in announced), *door.addresses())
    finally:
        thread.stop()
    if thread.error is not None:
        raise thread.error


def announce_door(addresses: Sequence[str], *, as_json: bool) -> None:
    """Print where machines join over libp2p."""
    if addresses and as_json:
        console.json({"schema": 1, "event": "door", "addresses": list(addresses)})
    for address in () if as_json else addresses:
        console.out(f"machines join at {address}")
