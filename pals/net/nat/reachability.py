"""What is known of how others reach this machine, and which addresses follow from it. Pure.

Members are asked from which endpoint they see this machine come and at which of its ports
they can dial it. Anyone may lie or be wrong, so an IP address counts only when no other is
named by more of them, and a port only with such an address.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pals.net.nat.addresses import (
    MAX_MEETING_PEERS,
    Endpoint,
    is_inside,
    meeting_address,
    port_of,
)
from pals.net.nat.messages import MAX_PORTS
from pals.types import PeerId

Reach = Literal["unknown", "public", "private"]
"""Whether members can dial this machine: nobody said, some can, or none of those asked."""

REPORT_LIFETIME_S = 1800.0


@dataclass(frozen=True, slots=True)
class Report:
    """What one member said.

    Attributes:
        observed: The endpoint that this machine comes from, as that member sees it.
        asked: Ports of that address that the member was asked to dial.
        reached: Those at which this machine answered it.
        at_s: When it said so.
    """

    observed: Endpoint
    asked: frozenset[int]
    reached: frozenset[int]
    at_s: float


@dataclass(slots=True, kw_only=True)
class Reachability:
    """This machine's view of its own addresses.

    Attributes:
        local: This peer.
        listening: Endpoints of this machine's interfaces at which it listens.
        announced: Addresses that the user gave; always told, and told first.
        mapped: The endpoint that the router forwards, as it says.
    """

    local: PeerId
    listening: tuple[Endpoint, ...]
    announced: tuple[str, ...] = ()
    mapped: Endpoint | None = None
    _reports: dict[PeerId, Report] = field(default_factory=dict[PeerId, Report])

    def record(self, member: PeerId, report: Report) -> None:
        """Take a member's report, and forget those that are old."""
        self._reports[member] = report
        oldest_s = report.at_s - REPORT_LIFETIME_S
        self._reports = {m: r for m, r in self._reports.items() if r.at_s > oldest_s}

    def ports_to_try(self) -> tuple[int, ...]:
        """Return the ports that members are asked to dial, the likeliest first."""
        wanted = list(map(port_of, self.announced))
        wanted += [self.mapped.port] if self.mapped is not None else []
        wanted += [e.port for e in self.listening]
        return tuple(dict.fromkeys(wanted))[:MAX_PORTS]

    @property
    def reach(self) -> Reach:
        """Whether members can dial this machine from outside its network.

        A member in the same network says nothing of that, so it is not counted.
        """
        outside = [r for r in self._reports.values() if not is_inside(r.observed.ip)]
        if any(report.reached for report in outside):
            return "public"
        return "private" if any(report.asked for report in outside) else "unknown"

    @property
    def public_ip(self) -> str | None:
        """The address that most members outside this network see this machine come from."""
        votes = Counter(
            r.observed.ip for r in self._reports.values() if not is_inside(r.observed.ip)
        )
        return votes.most_common(1)[0][0] if votes else None

    def verified(self) -> tuple[Endpoint, ...]:
        """Return the endpoints at which a member outside did dial this machine."""
        ip = self.public_ip
        if ip is None:
            return ()
        ports = {
            port: None
            for report in self._reports.values()
            if report.observed.ip == ip
            for port in sorted(report.reached)
        }
        return tuple(Endpoint(ip, port) for port in ports)

    def addresses(self, meeting: Iterable[PeerId]) -> tuple[str, ...]:
        """Return what to tell others, most useful first.

        Args:
            meeting: Members that this machine is directly connected to; they are named
                as places to meet unless this machine can be dialled.
        """
        told = dict.fromkeys(self.announced)
        told |= dict.fromkeys(map(str, self.verified()))
        if self.mapped is not None and not self._refuted(self.mapped):
            told[str(self.mapped)] = None
        told |= dict.fromkeys(str(endpoint) for endpoint in self.listening)
        if self.reach == "private":
            places = [m for m in meeting if m != self.local][:MAX_MEETING_PEERS]
            told |= dict.fromkeys(meeting_address(m, self.local) for m in places)
        return tuple(told)

    def punching_endpoints(self, observed: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
        """Return where a peer may find this machine while it dials that peer.

        A router that keeps ports shows the listening port at the observed address; one
        that does not shows it as it did for a connection that left by that port.

        Args:
            observed: The endpoints that the meeting member sees this machine come from.
        """
        seen = tuple(observed)
        found = dict.fromkeys(self.verified())
        for endpoint in seen:
            ports = [e.port for e in self.listening if e.is_ipv6 == endpoint.is_ipv6]
            found |= dict.fromkeys(Endpoint(endpoint.ip, port) for port in ports)
        return tuple(found | dict.fromkeys(seen))

    def _refuted(self, endpoint: Endpoint) -> bool:
        """Return whether members tried an endpoint, and none of them got through."""
        tried = [
            r
            for r in self._reports.values()
            if r.observed.ip == endpoint.ip and endpoint.port in r.asked
        ]
        return bool(tried) and not any(endpoint.port in r.reached for r in tried)
