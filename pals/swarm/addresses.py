"""Addresses of backends that are reached over libp2p: a multiaddr that names its peer."""

from __future__ import annotations

import ipaddress
import re

from pals.errors import InvalidRecord
from pals.swarm.identity import public_key_of
from pals.types import PeerId

_PEER = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/([1-9][0-9]{0,4})/p2p/([^/]+)")
_NAME = re.compile(r"(?!-)[A-Za-z0-9_.-]{1,253}")


def is_peer_address(address: str) -> bool:
    """Return whether an address is meant as a multiaddr; `peer_address_problem` says if it is."""
    return address.startswith("/")


def peer_in_address(address: str) -> PeerId:
    """Return the peer that a multiaddr without a problem names."""
    return PeerId(address.rpartition("/p2p/")[2])


def host_in(address: str) -> str:
    """Return the host that a multiaddr without a problem names: an IP address or a name."""
    return address.split("/")[2]


def peer_address_problem(address: str) -> str | None:
    """Return what keeps ``address`` from being ``/ip4/HOST/tcp/PORT/p2p/PEER``, or None."""
    match = _PEER.fullmatch(address)
    if match is None or int(match[3]) >= 1 << 16:
        return "is not of the form /ip4/HOST/tcp/PORT/p2p/PEER"
    if not _names_a_host(match[1], match[2]):
        return f"has no host of the kind {match[1]}"
    try:
        public_key_of(match[4])
    except InvalidRecord:
        return "does not end in the id of a peer"
    return None


def _names_a_host(kind: str, host: str) -> bool:
    if kind.startswith("dns"):
        return _NAME.fullmatch(host) is not None
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    return f"ip{ip.version}" == kind and not ip.is_unspecified and "%" not in host
