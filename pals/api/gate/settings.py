"""What one listener lets through."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from pals.api.gate.body import BODY_DEADLINE_S, MAX_BODY_BYTES
from pals.api.keys import KeyRing
from pals.api.problems import JSON_TYPE
from pals.errors import InvalidConfig

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_HOST = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_.-]{0,252})|\[[0-9a-f:.]{2,45}\])(?::\d{1,5})?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]{0,31}://[a-z0-9_.:\[\]-]{1,260}")
_HTTP_PORT = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """What one listener lets through.

    Attributes:
        hosts: Exact values of the `Host` header, in lower case.
        port: The port that a connection's own address is a host with; None where `hosts`
            are all. For a wildcard bind: each connection says at which address it arrived.
        origins: Exact values of the `Origin` header of other sites whose pages may ask.
        keys: The accepted API keys; None asks for none.
        content_types: Media types of request bodies.
        max_body_bytes: Longest body.
        body_s: Seconds in which a body arrives.
    """

    hosts: frozenset[str]
    port: int | None = None
    origins: frozenset[str] = frozenset()
    keys: KeyRing | None = None
    content_types: frozenset[str] = frozenset({JSON_TYPE})
    max_body_bytes: int = MAX_BODY_BYTES
    body_s: float = BODY_DEADLINE_S

    @classmethod
    def for_bind(
        cls,
        host: str,
        port: int,
        *,
        keys: KeyRing | None = None,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
    ) -> GateSettings:
        """Return the settings of a listener on ``host`` (an address literal) and ``port``.

        Args:
            host: Where it listens.
            port: Where it listens.
            keys: The accepted API keys; None asks for none.
            hosts: Other names of it, such as ``pals.example.org`` or ``tower.lan:8080``; one
                without a port is also a host with the listener's.
            origins: Sites whose pages may ask, such as ``https://app.example.org``.

        Raises:
            InvalidConfig: A host or an origin is malformed, or stands for several.
        """
        address = ipaddress.ip_address(host)
        return cls(
            hosts=_own_hosts(address, port) | _named_hosts(hosts, port),
            port=port if address.is_unspecified else None,
            origins=frozenset(_checked_origin(origin) for origin in origins),
            keys=keys,
        )

    def has_host(self, value: str, arrived_at: str) -> bool:
        """Return whether a `Host` is the listener's own.

        Args:
            value: The header, in lower case.
            arrived_at: Address literal at which the connection arrived.
        """
        if value in self.hosts:
            return True
        return self.port is not None and value in _arrival_hosts(arrived_at, self.port)


def _own_hosts(address: _Address, port: int) -> frozenset[str]:
    names = [] if address.is_unspecified else [_bracketed(address)]
    if address.is_loopback:
        names += ["127.0.0.1", "localhost", "[::1]"]
    else:
        names.append(socket.gethostname().lower())
    return _with_port(names, port)


def _arrival_hosts(literal: str, port: int) -> frozenset[str]:
    try:
        address = ipaddress.ip_address(literal.partition("%")[0])
    except ValueError:
        return frozenset()
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    names = [_bracketed(address), *(["localhost"] if address.is_loopback else [])]
    return _with_port(names, port)


def _with_port(names: Iterable[str], port: int) -> frozenset[str]:
    # A client leaves the port out where it is the scheme's own.
    bare = frozenset(names) if port == _HTTP_PORT else frozenset[str]()
    return bare | {f"{name}:{port}" for name in names}


def _named_hosts(names: Iterable[str], port: int) -> frozenset[str]:
    hosts: set[str] = set()
    for name in map(str.lower, names):
        if not _HOST.fullmatch(name):
            advice = "write a name or an address, and a port where there is one; no `*`"
            raise InvalidConfig(source=f"the host `{name}`", problem="it is none", advice=advice)
        has_port = name.rpartition(":")[2].isdecimal() and not name.endswith("]")
        hosts |= {name} if has_port else {name, f"{name}:{port}"}
    return frozenset(hosts)


def _checked_origin(text: str) -> str:
    origin = text.lower()
    if not _ORIGIN.fullmatch(origin):
        advice = "write the scheme, the host and the port of one site; no path and no `*`"
        raise InvalidConfig(source=f"the origin `{text}`", problem="it is none", advice=advice)
    return origin


def _bracketed(address: _Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
