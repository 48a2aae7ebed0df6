"""How much one member may ask of another: rates, and what a relay gives. Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from pals.errors import RelayRefused
from pals.types import PeerId, short_id


@dataclass(slots=True)
class Allowance:
    """A token bucket: ``rate`` units a second, and ``burst`` units at once.

    Attributes:
        rate: Units that come back in a second.
        burst: Units held when nothing was taken for long.
        spent: Units taken and not yet back; more than ``burst`` after a large one.
        at_s: The time at which ``spent`` was right.
    """

    rate: float
    burst: float
    spent: float = 0.0
    at_s: float = 0.0

    def try_take(self, amount: float, now_s: float) -> bool:
        """Take ``amount`` if all of it is there."""
        self._refill(now_s)
        if self.spent + amount > self.burst:
            return False
        self.spent += amount
        return True

    def take(self, amount: float, now_s: float) -> float:
        """Take ``amount``, which may be more than there is.

        Returns:
            Seconds to wait until what was taken has come back.
        """
        self._refill(now_s)
        self.spent += amount
        return max(0.0, (self.spent - self.burst) / self.rate)

    def _refill(self, now_s: float) -> None:
        self.spent = max(0.0, self.spent - (now_s - self.at_s) * self.rate)
        self.at_s = now_s


class PeerAllowances:
    """One allowance for each peer that asked lately.

    Args:
        rate: Of each, a second.
        burst: Of each.
        most: Peers remembered; the one that asked longest ago is forgotten first. It is
            far above the members of a swarm, of whom alone requests come.
    """

    def __init__(self, *, rate: float, burst: float, most: int = 4096) -> None:
        self._rate, self._burst, self._most = rate, burst, most
        self._of: OrderedDict[PeerId, Allowance] = OrderedDict()

    def of(self, peer: PeerId, now_s: float) -> Allowance:
        if peer not in self._of:
            self._of[peer] = Allowance(self._rate, self._burst, at_s=now_s)
        self._of.move_to_end(peer)
        if len(self._of) > self._most:
            self._of.popitem(last=False)
        return self._of[peer]

    def try_take(self, peer: PeerId, now_s: float) -> bool:
        """Take one unit of ``peer``'s if it is there."""
        return self.of(peer, now_s).try_take(1.0, now_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What one relaying member gives to others.

    Attributes:
        max_circuits: Circuits at one time.
        max_circuits_per_peer: Of these, how many may begin or end at one peer.
        bytes_per_s: Bytes carried in a second, all circuits together.
        peer_bytes_per_s: Of these, the most that one peer may send.
        idle_s: Seconds without a byte after which a circuit ends; both ends send
            keepalives far more often.
        circuit_s: Seconds after which a circuit ends in any case.
    """

    max_circuits: int = 16
    max_circuits_per_peer: int = 4
    bytes_per_s: float = 16 << 20
    peer_bytes_per_s: float = 8 << 20
    idle_s: float = 180.0
    circuit_s: float = 6 * 3600.0


BURST_S = 0.25
"""A relay carries at once what it may carry in this time."""


@dataclass(slots=True, eq=False)
class Circuit:
    """One relayed connection: who opened it, and to whom.

    Attributes:
        carried_bytes: Bytes so far, both ways.
        last_byte_s: When the last of them came.
    """

    source: PeerId
    target: PeerId
    last_byte_s: float
    carried_bytes: int = 0


@dataclass(slots=True)
class CircuitBook:
    """The circuits of one relaying member, and what each may still carry."""

    limits: RelayLimits
    circuits: list[Circuit] = field(default_factory=list[Circuit])
    _all: Allowance = field(init=False)
    _peers: PeerAllowances = field(init=False)

    def __post_init__(self) -> None:
        total, each = self.limits.bytes_per_s, self.limits.peer_bytes_per_s
        self._all = Allowance(total, total * BURST_S)
        self._peers = PeerAllowances(rate=each, burst=each * BURST_S)

    def open(self, source: PeerId, target: PeerId, *, relay: PeerId, now_s: float) -> Circuit:
        """Count a new circuit.

        Raises:
            RelayRefused: One of the limits on circuits is reached.
        """
        used = Counter(peer for c in self.circuits for peer in (c.source, c.target))
        problem = ""
        if source == target:
            problem = "both ends are the same peer"
        elif len(self.circuits) >= self.limits.max_circuits:
            problem = f"it carries {len(self.circuits)} circuits, the most it may"
        for peer in (source, target):
            if used[peer] >= self.limits.max_circuits_per_peer:
                problem = f"peer {short_id(peer)} has {used[peer]} circuits, the most it may"
        if problem:
            raise RelayRefused(relay=relay, peer=target, problem=problem)
        circuit = Circuit(source, target, now_s)
        self.circuits.append(circuit)
        return circuit

    def close(self, circuit: Circuit) -> None:
        self.circuits.remove(circuit)

    def charge(self, circuit: Circuit, sender: PeerId, amount: int, now_s: float) -> float:
        """Count bytes that ``sender`` put in; return the seconds to hold them back."""
        circuit.carried_bytes += amount
        circuit.last_byte_s = now_s
        own = self._peers.of(sender, now_s).take(amount, now_s)
        return max(own, self._all.take(amount, now_s))
