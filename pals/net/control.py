"""Control messages: they open, end and observe sessions; the control lane carries them sealed.

Encoded as MessagePack by msgspec, one tagged struct a frame.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pals.errors import InvalidFrame
from pals.types import PeerId, SessionId

MAX_HOPS = 256
MAX_ADDRESSES = 16
MAX_STOP_TOKENS = 64
MAX_CONTEXT = 1 << 20
MAX_SHOWN = 200
"""Characters of a refusal that may repeat what the peer sent."""

_Session = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Text = Annotated[str, msgspec.Meta(max_length=512)]
_Name = Annotated[str, msgspec.Meta(max_length=128)]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_CONTEXT)]
_Milliseconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
"""Bounded on both sides, which neither NaN nor infinity is within."""
_Layer = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class Hop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One shard of a chain and where to dial it."""

    peer: _Name
    start: _Layer
    stop: _Layer
    addresses: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=MAX_ADDRESSES)] = ()


class Open(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Driver to every shard of the chain: keep a slot for this session.

    The sender is the session's driver. Only the tail uses the sampling fields.
    """

    session: _Session
    chain: Annotated[tuple[Hop, ...], msgspec.Meta(min_length=1, max_length=MAX_HOPS)]
    prompt_tokens: _Tokens
    max_new_tokens: _Tokens
    stop_token_ids: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_STOP_TOKENS)] = ()
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] = 0.0
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Shard to driver: the slot is kept and the next shard can be reached."""

    session: _Session


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Shard to driver: the session is not taken.

    ``peer`` is the hop that cannot be reached or is no member there, when that is why.
    """

    session: _Session
    code: _Name
    problem: _Text
    peer: _Name = ""


class Close(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Driver to every shard: the session is over, free its slot at once."""

    session: _Session


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Shard to driver: the session ended here, and why.

    ``peer`` is the neighbour that was lost, when that is why.
    """

    session: _Session
    code: _Name
    problem: _Text
    peer: _Name = ""


class Draining(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Shard to the drivers of its sessions: it is about to stop, so move them elsewhere.

    It serves them on for a while, and takes no new ones.
    """


class Ack(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Receiver of a session's rows to their sender: all before ``position`` is taken.

    A shard tells the one before it about the prompt, the driver the tail about its tokens;
    see `pals.net.flow`.
    """

    session: _Session
    position: _Tokens


class StatsRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Driver to shard: say how long your steps take."""


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Shard to driver: medians over the last decode steps, in milliseconds.

    ``queue_ms`` is how long a row waits for a step before its own, ``handover_ms`` the way
    between the network's thread and the step's and back, ``codec_ms`` opening and sealing,
    ``turn_ms`` from one decode row of a session to its next.
    """

    steps: Annotated[int, msgspec.Meta(ge=0)]
    step_ms: _Milliseconds
    queue_ms: _Milliseconds
    handover_ms: _Milliseconds
    codec_ms: _Milliseconds
    turn_ms: _Milliseconds


Control = Open | Opened | Refused | Close | Failed | Draining | Ack | StatsRequest | Stats

_decoder: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)


def encode_control(message: Control) -> bytes:
    """Return the body of a control frame."""
    return msgspec.msgpack.encode(message)


def decode_control(peer: PeerId, payload: memoryview) -> Control:
    """Read the body of a control frame.

    Raises:
        InvalidFrame: It is no message of this wire version.
    """
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # The text quotes the peer, who must neither fill the log nor steer a terminal.
        shown = ascii(str(error)[:MAX_SHOWN])
        raise InvalidFrame(peer=peer, problem=f"control message: {shown}") from None


def session_of(message: Open | Opened | Refused | Close | Failed | Ack) -> SessionId:
    """Return the message's session id under its own type."""
    return SessionId(message.session)
