"""Address hints: where a member was last reachable, signed by itself.

A hint only helps to find a first peer; a wrong one costs a failed dial, because whoever
answers must still prove the peer id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from pals.errors import InvalidRecord
from pals.swarm.encoding import decode_strict
from pals.swarm.identity import Identity, peer_id_of, verify
from pals.swarm.kdf import VERSION
from pals.swarm.records import Hash, Key, Signature, UnixSeconds
from pals.types import PeerId, SwarmId

MAX_HINT_BYTES = 2048
MAX_ADDRESSES = 8
MAX_CLOCK_SKEW_S = 300

_LABEL = VERSION + b"hint\0"

Address = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^/[!-~]+\Z")]


class AddressHint(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """Where one member listens.

    Attributes:
        swarm_id: Swarm it is for.
        key: Ed25519 identity of the member.
        addresses: Multiaddrs, most useful first.
        issued_at: Unix seconds, by the member's clock; the newest hint wins.
        signature: By ``key``.
    """

    swarm_id: Hash
    key: Key
    addresses: Annotated[tuple[Address, ...], Meta(max_length=MAX_ADDRESSES)]
    issued_at: UnixSeconds
    signature: Signature = b""

    @property
    def peer(self) -> PeerId:
        return peer_id_of(self.key)


def sign_hint(
    identity: Identity, *, swarm_id: SwarmId, addresses: tuple[str, ...], issued_at: int
) -> bytes:
    """Return the signed bytes of this machine's hint; addresses past the cap are left out."""
    hint = AddressHint(
        swarm_id=swarm_id,
        key=identity.public_key,
        addresses=addresses[:MAX_ADDRESSES],
        issued_at=issued_at,
    )
    return msgspec.msgpack.encode(replace(hint, signature=identity.sign(_signed_part(hint))))


def open_hint(
    data: bytes, *, swarm_id: SwarmId, now_unix: float, max_skew_s: float = MAX_CLOCK_SKEW_S
) -> AddressHint:
    """Read a hint and check its signature.

    Args:
        data: The hint, from anybody.
        swarm_id: The swarm that it has to be for.
        now_unix: Unix time in seconds.
        max_skew_s: Seconds by which its writer's clock may be ahead.

    Raises:
        InvalidRecord: Too long, malformed, for another swarm, from the future, or not
            signed by the member it names.
    """
    hint = decode_strict(_DECODER, data, kind="hint", max_bytes=MAX_HINT_BYTES)
    if hint.swarm_id != swarm_id:
        raise InvalidRecord(kind="hint", problem="it is for another swarm")
    if hint.issued_at > now_unix + max_skew_s:
        raise InvalidRecord(kind="hint", problem="its time lies in the future")
    if not verify(hint.key, hint.signature, _signed_part(hint)):
        raise InvalidRecord(kind="hint", problem="not signed by the peer itself")
    return hint


def open_usable_hints(
    hints: Iterable[bytes], *, swarm_id: SwarmId, now_unix: float
) -> list[AddressHint]:
    """Return those hints of a backend's list that verify; a bad one hides no other.

    The backend took each within `MAX_CLOCK_SKEW_S` of its own clock, from which this
    machine's may differ by as much again.
    """
    opened: list[AddressHint] = []
    for data in hints:
        with suppress(InvalidRecord):
            skew_s = 2 * MAX_CLOCK_SKEW_S
            opened.append(open_hint(data, swarm_id=swarm_id, now_unix=now_unix, max_skew_s=skew_s))
    return opened


class Contacts:
    """Whom to try for a connection: those not found dead first, then the newest hints.

    Args:
        named: Peers and their addresses from the user, which go before every hint.
    """

    def __init__(self, named: Mapping[PeerId, tuple[str, ...]]) -> None:
        self._named = named
        self._hints: dict[PeerId, AddressHint] = {}
        self._remembered: dict[PeerId, tuple[int, tuple[str, ...]]] = {}
        self._failures: Counter[PeerId] = Counter()

    def learn(self, hint: AddressHint) -> None:
        """Take a hint; new addresses make up for failures at the old ones."""
        held = self._hints.get(hint.peer)
        if held is not None and held.addresses != hint.addresses:
            del self._failures[hint.peer]
        self._hints[hint.peer] = hint

    def remember(self, peer: PeerId, addresses: tuple[str, ...], *, at: int) -> None:
        """Take addresses at which a peer was at ``at``, in Unix seconds, by no word of its own."""
        since, known = self._remembered.get(peer, (0, ()))
        if at < since:
            return
        if set(addresses) - set(known):
            del self._failures[peer]
        self._remembered[peer] = (at, addresses)

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Return the addresses to try: the user's, then those of the latest source first."""
        hint = self._hints.get(peer)
        hinted = (0, ()) if hint is None else (hint.issued_at, hint.addresses)
        remembered = self._remembered.get(peer, (0, ()))
        newest, other = max(hinted, remembered), min(hinted, remembered)
        return tuple(dict.fromkeys((*self._named.get(peer, ()), *newest[1], *other[1])))

    def failed(self, peer: PeerId) -> None:
        """Put a peer behind all that failed less often."""
        self._failures[peer] += 1

    def reached(self, peer: PeerId) -> None:
        del self._failures[peer]

    def choose(self, wanted: Set[PeerId], count: int) -> list[PeerId]:
        """Return the ``count`` of ``wanted`` to try now, most hopeful first."""
        known = (self._named.keys() | self._hints.keys() | self._remembered.keys()) & wanted
        return sorted(known, key=self._rank)[:count]

    def _rank(self, peer: PeerId) -> tuple[int, bool, int, str]:
        issued_at = self._hints[peer].issued_at if peer in self._hints else 0
        latest = max(issued_at, self._remembered.get(peer, (0, ()))[0])
        return self._failures[peer], peer not in self._named, -latest, peer


_DECODER = msgspec.msgpack.Decoder(AddressHint)


def _signed_part(hint: AddressHint) -> bytes:
    return _LABEL + msgspec.msgpack.encode(replace(hint, signature=b""))
