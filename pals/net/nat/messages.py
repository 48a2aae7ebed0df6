"""What members say to each other about reaching each other. Pure.

Protocols, most of them one stream for one question:

- ``/pals/seen/1``: `Ask` -> `Seen`: from where you come to me, and whether I can dial you.
- ``/pals/meet/1``: dialler and meeting member: `Meet` -> `Here`, then `Offer` -> `Offer`,
  then `Go`. Between the meeting member and the other: ``/pals/met/1`` with `Met` -> `Offer`,
  then `Go`.
- ``/pals/relay/1``: dialler and relay: `Relay` -> `Taken`; between the relay and the other
  ``/pals/relayed/1``: `Relayed` -> `Taken`; what follows on these streams is the circuit.

On ``/pals/stay/1`` nothing is said: while such a stream is open, its connection is not
idle, and the NAT keeps its mapping. To any question the answer may be `Refused`. A
message is a length of 2 bytes, big-endian, and so many bytes of msgpack.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from pals.errors import InvalidFrame
from pals.types import PeerId

SEEN_PROTOCOL = "/pals/seen/1"
MEET_PROTOCOL = "/pals/meet/1"
MET_PROTOCOL = "/pals/met/1"
RELAY_PROTOCOL = "/pals/relay/1"
RELAYED_PROTOCOL = "/pals/relayed/1"
STAY_PROTOCOL = "/pals/stay/1"

MAX_MESSAGE_BYTES = 1024
MAX_PORTS = 3
MAX_OFFERED = 4
MAX_PROBLEM_CHARS = 200
MAX_SHOWN = 200
"""Characters of a refusal that may repeat what the peer sent."""
LENGTH = struct.Struct(">H")

_Peer = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Address = Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=r"^/[!-~]+\Z")]
_Addresses = Annotated[tuple[_Address, ...], msgspec.Meta(max_length=MAX_OFFERED)]
_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_Ports = Annotated[tuple[_Port, ...], msgspec.Meta(max_length=MAX_PORTS)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_PROBLEM_CHARS)]


class Message(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag_field="kind"
):
    """Base of all messages."""


class Ask(Message, frozen=True, tag="ask"):
    """From which endpoint do I come to you, and can you dial me at these ports of it?"""

    ports: _Ports = ()


class Seen(Message, frozen=True, tag="seen"):
    """The endpoint you come from, and the ports at which you answered."""

    observed: _Address
    reached: _Ports = ()


class Meet(Message, frozen=True, tag="meet"):
    """I want to meet this member."""

    target: _Peer


class Here(Message, frozen=True, tag="here"):
    """It is connected to me; the endpoints you come from, and whether I relay."""

    observed: _Addresses
    relays: bool


class Offer(Message, frozen=True, tag="offer"):
    """Endpoints to dial the sender at."""

    addresses: _Addresses


class Met(Message, frozen=True, tag="met"):
    """A member wants to meet you: its endpoints, and those you come from."""

    source: _Peer
    observed: _Addresses
    addresses: _Addresses


class Go(Message, frozen=True, tag="go"):
    """Dial now."""


class Relay(Message, frozen=True, tag="relay"):
    """Carry this stream to that member."""

    target: _Peer


class Relayed(Message, frozen=True, tag="relayed"):
    """This stream comes from that member, through me."""

    source: _Peer


class Taken(Message, frozen=True, tag="taken"):
    """Every further byte of this stream is the circuit's."""


class Refused(Message, frozen=True, tag="refused"):
    """No, and why."""

    problem: _Text


_Known = Ask | Seen | Meet | Here | Offer | Met | Go | Relay | Relayed | Taken | Refused

_decoder: msgspec.msgpack.Decoder[_Known] = msgspec.msgpack.Decoder(_Known)


def encode_message(message: Message) -> bytes:
    """Return the bytes of a message, its length first."""
    body = msgspec.msgpack.encode(message)
    assert len(body) <= MAX_MESSAGE_BYTES
    return LENGTH.pack(len(body)) + body


def decode_message(peer: PeerId, body: bytes) -> Message:
    """Read a message of ``peer``, without its length.

    Raises:
        InvalidFrame: It is none, or longer than `MAX_MESSAGE_BYTES`.
    """
    if len(body) > MAX_MESSAGE_BYTES:
        raise InvalidFrame(peer=peer, problem=f"a message of {len(body)} bytes")
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # The text quotes the peer, who must neither fill the log nor steer a terminal.
        shown = ascii(str(error)[:MAX_SHOWN])
        raise InvalidFrame(peer=peer, problem=f"message: {shown}") from None
