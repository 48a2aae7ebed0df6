"""TCP endpoints, the addresses that name a member to meet at, and which of them others can use.

Pure. A member that others cannot dial announces, beside its own addresses, members that
it is connected to, as ``/p2p/<member>/p2p-circuit/p2p/<this peer>``: at these it can be met.

Source of that form: libp2p specs, relay/circuit-v2.md.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pals.errors import InvalidConfig
from pals.types import PeerId

MAX_MEETING_PEERS = 3
"""Members named as a place to meet, by one address list."""

_TCP = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/([1-9][0-9]{0,4})(?:/p2p/([^/]+))?")
_MEETING = re.compile(r"/p2p/([^/]+)/p2p-circuit/p2p/([^/]+)")
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_.-]{1,253}")

# Where addresses are given out anew in every network: they name nothing to outsiders.
_INSIDE = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/3",
        "::/127",
        "fc00::/7",
        "fe80::/10",
        "ff00::/8",
    )
)


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """An IP address, in its one canonical text, and a TCP port."""

    ip: str
    port: int

    @classmethod
    def of(cls, ip: str, port: int) -> Endpoint:
        """Return the endpoint; an IPv4 address seen by an IPv6 socket is told as IPv4.

        Raises:
            ValueError: ``ip`` is no address, or ``port`` none of 1 to 65535.
        """
        address = ipaddress.ip_address(ip.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if not 0 < port < 1 << 16:
            raise ValueError(f"{port} is no port")
        return cls(str(address), port)

    @classmethod
    def parse(cls, multiaddr: str) -> Endpoint:
        """Read ``/ip4/<address>/tcp/<port>``, or the same of IPv6; a peer id may follow.

        Raises:
            ValueError: It is none.
        """
        match = _TCP.fullmatch(multiaddr)
        if match is None or not match[1].startswith("ip"):
            raise ValueError(f"not a TCP endpoint: {multiaddr[:100]!r}")
        endpoint = cls.of(match[2], int(match[3]))
        if (match[1] == "ip6") != (":" in match[2]):
            raise ValueError(f"not an address of {match[1]}: {match[2]}")
        return endpoint

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.ip

    def __str__(self) -> str:
        return f"/ip{6 if self.is_ipv6 else 4}/{self.ip}/tcp/{self.port}"


def is_inside(ip: str) -> bool:
    """Return whether an address means something only within its own network or machine."""
    address = ipaddress.ip_address(ip)
    return any(address.version == net.version and address in net for net in _INSIDE)


def neighbourhood(ip: str) -> str:
    """Return what counts as one source: an IPv4 address, or a whole /64 of IPv6.

    Args:
        ip: An address literal, such as that of an `Endpoint`.
    """
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


def read_announced(text: str) -> str:
    """Check an address that the user announces, such as that of a port forward.

    Returns:
        ``/ip4/<address>/tcp/<port>``, or the same with ``ip6``, ``dns``, ``dns4``, ``dns6``.

    Raises:
        InvalidConfig: It is none that others could dial.
    """
    match = _TCP.fullmatch(text)
    problem = "it is not a TCP multiaddr"
    if match is not None and match[1].startswith("dns"):
        usable = _HOST_NAME.fullmatch(match[2]) is not None and int(match[3]) < 1 << 16
        if usable:
            return f"/{match[1]}/{match[2]}/tcp/{match[3]}"
    elif match is not None:
        try:
            endpoint = Endpoint.parse(text)
        except ValueError as error:
            problem = str(error)
        else:
            if not ipaddress.ip_address(endpoint.ip).is_unspecified:
                return str(endpoint)
            problem = "nobody can dial the unspecified address"
    raise InvalidConfig(
        source=f"announced address `{text[:100]}`",
        problem=problem,
        advice="write it as `/ip4/203.0.113.7/tcp/4001` or `/dns4/home.example.org/tcp/4001`",
    )


def port_of(announced: str) -> int:
    """Return the port of an address that `read_announced` returned."""
    return int(announced.rpartition("/")[2])


def meeting_address(member: PeerId, peer: PeerId) -> str:
    """Return the address that says: ``peer`` can be met at ``member``."""
    return f"/p2p/{member}/p2p-circuit/p2p/{peer}"


def meeting_peers(addresses: Iterable[str], peer: PeerId) -> tuple[PeerId, ...]:
    """Return the members at which ``peer`` says it can be met, at most a few."""
    found: dict[PeerId, None] = {}
    for address in addresses:
        match = _MEETING.fullmatch(address)
        if match is not None and match[2] == peer and match[1] != peer:
            found[PeerId(match[1])] = None
    return tuple(found)[:MAX_MEETING_PEERS]


def endpoints_in(addresses: Iterable[str]) -> tuple[Endpoint, ...]:
    """Return the different IP endpoints among multiaddrs, in their order."""
    found: dict[Endpoint, None] = {}
    for address in addresses:
        try:
            found[Endpoint.parse(address)] = None
        except ValueError:
            continue
    return tuple(found)
