"""A backend inside its operator's profile: its files, and how it is named.

The database is a file of the profile; the key that signs freshness is the machine's own
identity, which the operator appoints. Commands open the database for a moment beside the node
that runs with the profile.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from pals.config import Profile, read_private, write_private
from pals.errors import InvalidConfig, ProfileMissing
from pals.net.announce import useful_first
from pals.settings import NodeSettings
from pals.swarm.addresses import is_peer_address, peer_address_problem, peer_in_address
from pals.swarm.identity import Identity, load_or_create_identity

if TYPE_CHECKING:
    from pals.backend.service import BackendService

DATABASE_NAME = "hosted.db"
DOOR_KEY_NAME = "redeem.key"
DOOR_ADDRESSES_NAME = "redeem.addresses"
MEMBERS_PORT = 8472
"""Where a node that hosts a backend listens unless it is told otherwise: members must find
it again after a restart."""


def own_backend_address(profile: Profile) -> str:
    """Return the address of a backend inside a profile, which is made if it is not there.

    Only its end means anything: the profile knows itself, and others are told of addresses.

    Raises:
        ProfileExposed: Others can read the profile.
        InvalidConfig: Its identity is damaged.
    """
    profile.create_folder()
    peer = load_or_create_identity(profile).peer_id
    return f"/ip4/127.0.0.1/tcp/{MEMBERS_PORT}/p2p/{peer}"


def is_hosted_here(address: str, identity: Identity) -> bool:
    """Return whether a backend's address names the machine with this identity."""
    return is_peer_address(address) and peer_in_address(address) == identity.peer_id


def listen_as_host(settings: NodeSettings) -> NodeSettings:
    """Return the settings of a node that hosts a backend: with a port that stays the same."""
    if settings.listen != NodeSettings().listen:
        return settings
    return replace(settings, listen=f"/ip4/0.0.0.0/tcp/{MEMBERS_PORT}")


@contextmanager
def open_hosted_service(profile: Profile, identity: Identity) -> Generator[BackendService]:
    """Open the profile's own backend.

    Raises:
        InvalidConfig: Its database cannot be opened.
    """
    from pals.backend.database import sqlite_url
    from pals.backend.service import BackendService

    url = sqlite_url((profile.path / DATABASE_NAME).absolute())
    with closing(BackendService(url, signer=identity)) as service:
        yield service


def load_door_identity(folder: Path) -> Identity:
    """Return the identity of the door of a profile or a backend, made on the first call.

    Raises:
        ProfileExposed: Others can read it.
        InvalidConfig: The file is not an Ed25519 key.
    """
    from pals.backend.key_file import load_or_create_key

    return load_or_create_key(folder / DOOR_KEY_NAME)


# --- addresses for invites -----------------------------------------------------------


def invite_address(profile: Profile, identity: Identity, address: str, given: str | None) -> str:
    """Return the address of a swarm's backend as an invite should state it.

    Args:
        profile: Of whoever makes the invite.
        identity: The profile's.
        address: The backend's, as the profile states it.
        given: What the user says; a multiaddr may leave out the door's peer id.

    Raises:
        InvalidConfig: The backend is in this profile, and no server ran with it yet, so that
            nothing is known of the door.
    """
    if not is_hosted_here(address, identity):
        return given or address
    if given is not None and is_peer_address(given) and "/p2p/" not in given:
        key = load_door_identity(profile.path)
        return f"{given}/p2p/{key.peer_id}"
    addresses = (given,) if given is not None else load_door_addresses(profile)
    if not addresses:
        raise InvalidConfig(
            source="the address for the invite",
            problem="no server has run with this profile yet, which lets machines in",
            advice="start `pals serve` or `pals shard` first, or name it: "
            "`--backend /ip4/HOST/tcp/8471`",
        )
    return addresses[0]


def load_door_addresses(profile: Profile) -> tuple[str, ...]:
    """Return where the profile's door listened last, the most useful first."""
    try:
        text = read_private(profile.path / DOOR_ADDRESSES_NAME).decode(errors="replace")
    except ProfileMissing:
        return ()
    return tuple(line for line in text.split() if peer_address_problem(line) is None)


def save_door_addresses(profile: Profile, addresses: Sequence[str]) -> None:
    """Keep where the profile's door listens, for the invites that are made meanwhile."""
    text = "".join(f"{address}\n" for address in useful_first(addresses))
    write_private(profile.path / DOOR_ADDRESSES_NAME, text.encode())
