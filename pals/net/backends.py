"""Which kind of backend an address names."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from pals.config import KnownPeer, Profile
from pals.net.backend import Backend
from pals.net.backend_local import LocalBackend
from pals.net.hosted import is_hosted_here, open_hosted_service
from pals.net.membership import REQUEST_DEADLINE_S, MembershipClient
from pals.swarm.addresses import is_peer_address, peer_address_problem, peer_in_address
from pals.swarm.hints import AddressHint
from pals.swarm.identity import Identity, load_or_create_identity
from pals.swarm.roster import Roster

if TYPE_CHECKING:
    from pals.backend.service import BackendService


def open_backend(
    address: str, profile: Profile, *, deadline_s: float = REQUEST_DEADLINE_S
) -> Backend:
    """Return the backend of a profile's swarm: over HTTP, in its files, or at a member.

    Args:
        address: As the profile states it.
        profile: Whose identity calls a member.
        deadline_s: Seconds for one call; one in this profile's own files takes what it takes.
    """
    if not is_peer_address(address):
        return MembershipClient(address, deadline_s=deadline_s)
    identity = load_or_create_identity(profile)
    if is_hosted_here(address, identity):
        return LocalBackend(address, partial(open_hosted_service, profile, identity))
    from pals.net.backend_peer import PeerBackend  # libp2p takes long to import

    return PeerBackend(address, profile, deadline_s=deadline_s)


@contextmanager
def open_node_backend(
    address: str, profile: Profile, identity: Identity
) -> Generator[tuple[Backend, BackendService | None]]:
    """Give a node its backend, and the service behind it where that is the profile's own.

    Args:
        address: As the profile states it.
        profile: Of the node.
        identity: The profile's.

    Raises:
        InvalidConfig: The profile's own database cannot be opened.
    """
    if not is_hosted_here(address, identity):
        yield open_backend(address, profile), None
        return
    with open_hosted_service(profile, identity) as service:
        yield LocalBackend(address, lambda: nullcontext(service)), service


def open_redemption_backend(address: str) -> Backend:
    """Return the backend at which an invite with this address is redeemed."""
    if not is_peer_address(address):
        return MembershipClient(address)
    from pals.net.redemption import RedemptionBackend  # libp2p takes long to import

    return RedemptionBackend(address)


def members_address(address: str, roster: Roster, hints: Iterable[AddressHint]) -> str:
    """Return the address at which a new member finds the backend from now on.

    Args:
        address: That of the invite. A door lets machines in and does nothing else; members
            ask the one among them whom the operator appointed.
        roster: The verified list.
        hints: Where members are, verified.
    """
    if not is_peer_address(address):
        return address
    for hint in hints:
        if roster.authorities.get(hint.key) == "backend" and hint.peer in roster.live:
            usable = [at for at in hint.addresses if peer_address_problem(at) is None]
            own = [at for at in usable if peer_in_address(at) == hint.peer]
            if own:
                return own[0]
    return address


def hinted_peers(hints: Iterable[AddressHint], roster: Roster) -> list[KnownPeer]:
    """Return what hints say of live members, as a profile remembers them."""
    return [
        KnownPeer(peer=hint.peer, addresses=hint.addresses, reached_at=hint.issued_at)
        for hint in hints
        if hint.addresses and hint.peer in roster.live
    ]
