"""Two ends of one live link, with the bytes of every lane in the hands of the test."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pals.net.handshake import Handshake, KeyShare, LinkSecrets
from pals.net.link import REKEY_INTERVAL_S, Link, LinkEvent, Rekeyed
from pals.net.wire import (
    CONTROL_SHAPE,
    HEADER_BYTES,
    NO_ROWS,
    Codec,
    Frame,
    FrameShape,
    Kind,
    Lane,
    Outgoing,
    Row,
    Rows,
    hidden_shape,
)
from pals.swarm.keys import TAG_BYTES, epoch_prk
from pals.types import PeerId, SessionId
from tests.unit.net.handshakes import EPOCH, SWARM, A, B, make_secrets, shake_hands

Name = Literal["dialler", "dialled"]
NAMES: tuple[Name, Name] = ("dialler", "dialled")
MANIFEST = b"m" * 32
HIDDEN = hidden_shape(MANIFEST, 10, "bf16", 4)
SESSION = SessionId(b"s" * 16)


def shares_from(seed: str) -> Callable[[], KeyShare]:
    """Return a source of key shares that are never alike, and the same for one seed."""
    numbers = iter(range(1 << 30))

    def make() -> KeyShare:
        digest = hashlib.sha512(f"{seed} {next(numbers)}".encode()).digest()
        return KeyShare(X25519PrivateKey.from_private_bytes(digest[:32]), digest[32:48])

    return make


def later(secrets: LinkSecrets, epoch: int) -> LinkSecrets:
    """Return the secrets of another epoch, which both ends learn from the same swarm."""
    secret = hashlib.sha256(b"secret of %d" % epoch).digest()
    return replace(secrets, epoch=epoch, epoch_prk=epoch_prk(SWARM, epoch, secret))


def frame_of(lane: Lane, number: int) -> Outgoing:
    """Return a frame that names its number."""
    text = number.to_bytes(8, "big")
    if lane is Lane.CONTROL:
        return Outgoing(CONTROL_SHAPE, NO_ROWS, (text,))
    return Outgoing(HIDDEN, Rows.of(Row(SESSION, number, 1)), (text,))


def number_in(frame: Frame) -> int:
    return int.from_bytes(frame.payload, "big")


@dataclass(slots=True)
class End:
    """One end, what it wrote on each lane, and what it made of the other's bytes."""

    link: Link
    secrets: LinkSecrets
    wires: dict[Lane, bytearray] = field(
        default_factory=lambda: {lane: bytearray() for lane in Lane}
    )
    sent: dict[Lane, list[int]] = field(default_factory=lambda: {lane: [] for lane in Lane})
    taken: dict[Lane, list[int]] = field(default_factory=lambda: {lane: [] for lane in Lane})
    rekeyed: list[int] = field(default_factory=list)

    def collect(self) -> None:
        for lane in self.link.waiting_lanes:
            self.wires[lane] += self.link.take_outgoing(lane)

    def take(self, lane: Lane, events: Iterable[LinkEvent]) -> None:
        for event in events:
            if isinstance(event, Rekeyed):
                self.rekeyed.append(event.epoch)
            else:
                self.taken[lane].append(number_in(event))


@dataclass(slots=True)
class Pair:
    """A link between A, who dialled, and B."""

    ends: dict[Name, End]
    now: float = 0.0

    @property
    def dialler(self) -> End:
        return self.ends["dialler"]

    @property
    def dialled(self) -> End:
        return self.ends["dialled"]

    def other(self, name: Name) -> End:
        return self.dialled if name == "dialler" else self.dialler

    def send(self, name: Name, lane: Lane = Lane.DECODE) -> None:
        """Let one end send the next frame of a lane."""
        end = self.ends[name]
        number = len(end.sent[lane])
        end.wires[lane] += end.link.seal(lane, frame_of(lane, number), self.now)
        end.sent[lane].append(number)
        end.collect()

    def deliver(self, name: Name, lane: Lane, size: int | None = None) -> None:
        """Carry bytes that one end wrote on a lane to the other."""
        wire, target = self.ends[name].wires[lane], self.other(name)
        data = bytes(wire[:size])
        del wire[: len(data)]
        target.take(lane, receive(target.link, lane, data, self.now))
        target.collect()

    def deliver_all(self) -> None:
        """Carry bytes until neither end has anything to say."""
        for end in self.ends.values():
            end.collect()
        while waiting := [(n, lane) for n in NAMES for lane in Lane if self.ends[n].wires[lane]]:
            for name, lane in waiting:
                self.deliver(name, lane)

    def tick(self, now: float, *names: Name) -> None:
        """Let time pass for these ends, or for both."""
        self.now = now
        for name in names or NAMES:
            self.ends[name].link.tick(now)
            self.ends[name].collect()

    def learn(self, epoch: int, *names: Name) -> None:
        """Let these ends, or both, learn the secret of a later epoch."""
        for name in names or NAMES:
            end = self.ends[name]
            end.secrets = later(end.secrets, epoch)
            end.link.rekey(end.secrets, self.now)
            end.collect()

    def all_is_taken(self) -> bool:
        pairs = ((self.ends[name].sent, self.other(name).taken) for name in NAMES)
        return all(sent == taken for sent, taken in pairs)


def receive(link: Link, lane: Lane, data: bytes, now: float = 0.0) -> list[LinkEvent]:
    shapes: tuple[FrameShape, ...] = (CONTROL_SHAPE,) if lane is Lane.CONTROL else (HIDDEN,)
    return link.receive(lane, data, shapes, now)


def make_pair(
    seed: str = "",
    *,
    shares: dict[Name, Callable[[], KeyShare]] | None = None,
    newest: dict[Name, int] | None = None,
    codec: Codec = Codec.RAW,
) -> Pair:
    """Return a fresh link.

    Args:
        seed: Names the random numbers of both ends.
        shares: Other sources of them.
        newest: The epoch that an end knows by now, if another than the handshake's.
        codec: What both ends propose for prefill.
    """
    sources = shares or {name: shares_from(seed + name) for name in NAMES}
    peers: dict[Name, PeerId] = {"dialler": A, "dialled": B}
    secrets = {name: make_secrets(peer, codec=codec) for name, peer in peers.items()}
    sides = (
        Handshake("initiator", secrets["dialler"], B, share=sources["dialler"]()),
        Handshake("responder", secrets["dialled"], A, share=sources["dialled"]()),
    )
    shake_hands(*sides)
    ends: dict[Name, End] = {}
    for name, side in zip(NAMES, sides, strict=True):
        epoch = (newest or {}).get(name, EPOCH)
        known = secrets[name] if epoch == EPOCH else later(secrets[name], epoch)
        assert side.keys is not None
        link = Link(side.keys, known, now=0.0, make_share=sources[name])
        ends[name] = End(link, known)
        ends[name].collect()
    return Pair(ends)


def split_frames(data: bytes, header_bytes: int, tag_bytes: int) -> Iterator[bytes]:
    """Cut the bytes of a lane into whole frames."""
    while data:
        end = (
            header_bytes + int.from_bytes(data[header_bytes - 4 : header_bytes], "big") + tag_bytes
        )
        yield data[:end]
        data = data[end:]


def frames_in(data: bytes | bytearray) -> list[bytes]:
    """Cut the bytes of a lane into whole frames."""
    return list(split_frames(bytes(data), HEADER_BYTES, TAG_BYTES))


def kinds(data: bytes | bytearray) -> list[int]:
    """Return the kind of each frame."""
    return [frame[6] for frame in frames_in(data)]


def mid_change() -> Pair:
    """Return a link whose dialler has sent its switches, none of which has arrived."""
    pair = make_pair()
    pair.send("dialler")
    pair.deliver_all()
    pair.tick(REKEY_INTERVAL_S, "dialler")
    pair.deliver("dialler", Lane.CONTROL)
    pair.deliver("dialled", Lane.CONTROL)
    pair.send("dialler")
    assert kinds(pair.dialler.wires[Lane.DECODE]) == [Kind.KEY, Kind.HIDDEN]
    return pair
