"""Who a request counts against, and is logged as: a key's name, or part of an address."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from litestar.types import Scope

LOOPBACK = "loopback"

_STATE = "pals.client"


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Whoever asks, as far as the gate can tell.

    Attributes:
        key: Name of the API key; empty where none is asked for.
        network: What one client can be expected to own, see `network_of`; empty with a key.
    """

    key: str = ""
    network: str = ""


NOBODY = Client()


def client_of_address(host: str) -> Client:
    """Return the client behind an address literal."""
    return Client(network=network_of(host))


def note_client(scope: Scope, client: Client) -> None:
    """Leave in a request's scope who asks."""
    scope["state"][_STATE] = client


def client_in(scope: Scope) -> Client:
    """Return who asks, or `NOBODY` where the gate has not let the request in."""
    client = scope["state"].get(_STATE)
    return client if isinstance(client, Client) else NOBODY


def network_of(host: str) -> str:
    """Return what one client can be expected to own: an IPv4 address, an IPv6 /64."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback:
        return LOOPBACK
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
