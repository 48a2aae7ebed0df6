"""Control messages: they open, end and observe sessions; the control lane carries them sealed.

Encoded as MessagePack by msgspec, one tagged struct a frame.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from pals.errors import InvalidFrame
from pals.net.wire import TOP_LOGPROBS
from pals.types import (
    MAX_GRAMMAR_BYTES,
    Grammar,
    GrammarKind,
    PeerId,
    Sampling,
    SessionId,
)

MAX_HOPS = 256
MAX_ADDRESSES = 16
MAX_STOP_TOKENS = 64
MAX_CONTEXT = 1 << 20
NAME_BYTES = 16
MAX_NAMES_BYTES = NAME_BYTES * (MAX_CONTEXT // 64)
"""A name for each block of 64 tokens; see `pals.engine.prefix`."""
MAX_HISTORY_TOKENS = 1 << 17
MAX_LOGIT_BIAS = 300
MAX_DEADLINE_S = 1e6
MAX_SHOWN = 200
"""Characters of a refusal that may repeat what the peer sent."""

_Session = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Text = Annotated[str, msgspec.Meta(max_length=512)]
_Name = Annotated[str, msgspec.Meta(max_length=128)]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_CONTEXT)]
_Milliseconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
"""Bounded on both sides, which neither NaN nor infinity is within."""
_Layer = Annotated[int, msgspec.Meta(ge=0, le=65535)]
_Names = Annotated[bytes, msgspec.Meta(max_length=MAX_NAMES_BYTES)]
_History = Annotated[bytes, msgspec.Meta(max_length=4 * MAX_HISTORY_TOKENS)]
_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Source = Annotated[str, msgspec.Meta(max_length=MAX_GRAMMAR_BYTES)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
_Bias = Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)]


class Hop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One shard of a chain and where to dial it."""

    peer: _Name
    start: _Layer
    stop: _Layer
    addresses: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=MAX_ADDRESSES)] = ()


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an answer may consist of: `pals.types.Grammar` on the wire."""

    kind: GrammarKind
    source: _Source

    @classmethod
    def of(cls, grammar: Grammar) -> GrammarSpec:
        """Return what a tail is told of ``grammar``."""
        return cls(kind=grammar.kind, source=grammar.source)

    def to_grammar(self) -> Grammar:
        """Return it under its own type."""
        return Grammar(kind=self.kind, source=self.source)


class Sampler(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tail samples: `pals.types.Sampling` on the wire.

    A seed has 64 bits, which is also the most that MessagePack writes. ``history`` goes with
    penalties and grammars alone: for penalties the ids of the prompt, each once since nobody
    counts them, and then the ``answered`` ids of the answer so far, little-endian uint32.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] = 0.0
    top_k: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] = 1.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: Annotated[
        tuple[tuple[_TokenId, _Bias], ...], msgspec.Meta(max_length=MAX_LOGIT_BIAS)
    ] = ()
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=TOP_LOGPROBS)] | None = None
    pooling: bool = False
    grammar: GrammarSpec | None = None
    history: _History = b""
    answered: Annotated[int, msgspec.Meta(ge=0, le=MAX_HISTORY_TOKENS)] = 0

    @classmethod
    def of(cls, sampling: Sampling) -> Sampler:
        """Return what a tail is told of ``sampling``, without a history."""
        values = {name: getattr(sampling, name) for name in Sampling.__slots__}
        return cls(**values)

    def to_sampling(self) -> Sampling:
        """Return it under its own type."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.__slots__})


class Open(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Driver to every shard of the chain: make room for this session.

    The sender is the session's driver. ``names`` are those of the blocks of the prompt, 16
    bytes each, by which a shard finds what it holds of it. ``replaces`` is a session of the
    same driver, or empty, which ended without being done and goes on in this one.
    ``deadline_s`` is how long somebody waits for the answer; 0 for as long as it takes. Only
    the tail is told of the sampler.
    """

    session: _Session
    chain: Annotated[tuple[Hop, ...], msgspec.Meta(min_length=1, max_length=MAX_HOPS)]
    prompt_tokens: _Tokens
    max_new_tokens: _Tokens
    stop_token_ids: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_STOP_TOKENS)] = ()
    names: _Names = b""
    replaces: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    deadline_s: Annotated[float, msgspec.Meta(ge=0.0, le=MAX_DEADLINE_S)] = 0.0
    sampler: Sampler | None = None


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Shard to driver: there is room, and the next shard can be reached.

    The shard holds the first ``held`` tokens of the prompt already.
    """

    session: _Session
    held: Annotated[int, msgspec.Meta(ge=0, le=MAX_CONTEXT)] = 0


class Preempted(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Shard to driver: others need the session's room; it holds nothing here any more.

    Nobody is at fault: the driver closes it everywhere, and plays it again in its place.
    """

    session: _Session


class Fork(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Driver to every shard: begin a session with the first tokens of another of its own.

    Answered as `Open` is. ``position`` is at most where tokens have come back from the tail,
    and the child's first row stands there.
    """

    session: _Session
    child: _Session
    position: _Tokens
    sampler: Sampler | None = None


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Shard to driver: the session is not taken.

    ``peer`` is the hop that cannot be reached or is no member there, when that is why.
    """

    session: _Session
    code: _Name
    problem: _Text
    peer: _Name = ""


class Close(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Driver to every shard: the session is over, free its room at once.

    ``names`` are those of the blocks of prompt and answer, but for the last token, which
    nobody has computed with: under them the session's pages may be found later.
    """

    session: _Session
    names: _Names = b""


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


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Member to member: answer at once."""

    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """The answer to the `Ping` of the same number."""

    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]


Control = (
    Open
    | Opened
    | Refused
    | Preempted
    | Fork
    | Close
    | Failed
    | Draining
    | Ack
    | StatsRequest
    | Stats
    | Ping
    | Pong
)

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
        message = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # The text quotes the peer, who must neither fill the log nor steer a terminal.
        shown = ascii(str(error)[:MAX_SHOWN])
        raise InvalidFrame(peer=peer, problem=f"control message: {shown}") from None
    if problem := _find_uneven(message):
        raise InvalidFrame(peer=peer, problem=f"control message: {problem}")
    return message


def _find_uneven(message: Control) -> str:
    """Return which bytes of a message are no whole number of what they hold, if any."""
    if isinstance(message, Open | Close) and len(message.names) % NAME_BYTES:
        return f"{len(message.names)} bytes of names"
    if isinstance(message, Open) and len(message.replaces) not in (0, 16):
        return f"a session id of {len(message.replaces)} bytes"
    sampler = message.sampler if isinstance(message, Open | Fork) else None
    if sampler is None:
        return ""
    return _find_unfit(sampler)


def _find_unfit(sampler: Sampler) -> str:
    tokens, rest = divmod(len(sampler.history), 4)
    if rest or sampler.answered > tokens:
        return f"{sampler.answered} of {tokens} ids answered"
    size = 0 if sampler.grammar is None else len(sampler.grammar.source.encode())
    return f"a grammar of {size} bytes" if size > MAX_GRAMMAR_BYTES else ""


def session_of(
    message: Open | Opened | Refused | Preempted | Close | Failed | Ack,
) -> SessionId:
    """Return the message's session id under its own type."""
    return SessionId(message.session)


def split_names(names: bytes) -> tuple[bytes, ...]:
    """Return the names of blocks one by one."""
    return tuple(names[start : start + NAME_BYTES] for start in range(0, len(names), NAME_BYTES))


def answer_of(sampler: Sampler) -> list[int]:
    """Return the ids of the answer so far, where the sampler's history has them."""
    ids = np.frombuffer(sampler.history, "<u4")
    return ids[len(ids) - sampler.answered :].tolist()


def history_of(sampler: Sampler) -> npt.NDArray[np.int32]:
    """Return the ids of a sampler's history, ``int32[n]``; those that are none are negative."""
    return np.frombuffer(sampler.history, "<u4").astype(np.int32)
