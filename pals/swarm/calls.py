"""What is asked of a backend over libp2p, and answered: msgpack, one message each way.

Members' calls are those of `pals.swarm.messages` over HTTP; whoever answers is a member as
well. A stranger may only redeem an invite, and is told everything that it then needs.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from pals.errors import InvalidRecord
from pals.swarm.freshness import MAX_FRESHNESS_BYTES
from pals.swarm.identity import Identity
from pals.swarm.messages import Auth, EntryBytes, HintBytes, RecordBytes, RecordMessage
from pals.swarm.records import Hash, Key
from pals.swarm.requests import MAX_PROOF_CHARS, sign_request
from pals.swarm.roster import MAX_ENTRIES, MAX_MEMBERS
from pals.types import SwarmId

MAX_CALL_BYTES = 8 << 10
MAX_ANSWER_BYTES = 12 << 20

Entries = Annotated[tuple[EntryBytes, ...], Meta(max_length=MAX_ENTRIES)]
Hints = Annotated[tuple[HintBytes, ...], Meta(max_length=MAX_MEMBERS)]
FreshnessBytes = Annotated[bytes, Meta(max_length=MAX_FRESHNESS_BYTES)]
Tag = Annotated[str, Meta(max_length=64)]
Proof = Annotated[str, Meta(max_length=MAX_PROOF_CHARS)]


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """One call or answer, told from the others by the name of its class."""


class KeyCall(_Message, frozen=True):
    """Ask which key the backend signs freshness with."""


class AppendCall(_Message, frozen=True):
    """Store a record; ``proof`` is an administrator's, and empty for a member that leaves."""

    swarm_id: Hash
    record: RecordBytes
    proof: Proof = ""


class RecordsCall(_Message, frozen=True):
    """Ask for the chain, unless it is still that of ``etag``."""

    swarm_id: Hash
    etag: Tag = ""


class PutHintCall(_Message, frozen=True):
    """Leave the caller's address hint."""

    swarm_id: Hash
    hint: HintBytes


class HintsCall(_Message, frozen=True):
    """Ask for the members' address hints."""

    swarm_id: Hash


class KeyAnswer(_Message, frozen=True):
    """The backend's freshness key."""

    key: Key


class EntryAnswer(_Message, frozen=True):
    """The entry that a record became."""

    entry: EntryBytes


class RecordsAnswer(_Message, frozen=True):
    """The chain, or None when the caller has it, and the backend's word on how new it is."""

    etag: Tag
    freshness: FreshnessBytes
    entries: Entries | None = None


class HintsAnswer(_Message, frozen=True):
    """The address hints of live members."""

    hints: Hints


class Done(_Message, frozen=True):
    """It was done."""


class Failed(_Message, frozen=True):
    """It was not done; the three parts are those of the same answer over HTTP."""

    status: Annotated[int, Meta(ge=400, le=599)]
    code: Annotated[str, Meta(max_length=64)]
    problem: Annotated[str, Meta(max_length=500)]


class RedeemCall(_Message, frozen=True):
    """A join, and what proves the right to use its invite."""

    swarm_id: Hash
    auth: Auth
    join: RecordBytes


class Joined(_Message, frozen=True):
    """What a joiner needs: its entry, the whole chain, and where members were last."""

    entry: EntryBytes
    entries: Entries
    freshness: FreshnessBytes
    hints: Hints


class NotJoined(_Message, frozen=True):
    """Why nobody joined, as far as a stranger is told.

    ``refused`` is everything that is wrong with an invite or with the call. ``busy`` is worth
    another try, and ``full`` is said to holders of a good invite only.
    """

    reason: Literal["refused", "busy", "full"]


Call = KeyCall | AppendCall | RecordsCall | PutHintCall | HintsCall
Answer = KeyAnswer | EntryAnswer | RecordsAnswer | HintsAnswer | Done | Failed

_T = TypeVar("_T")
_calls = msgspec.msgpack.Decoder(Call)
_answers = msgspec.msgpack.Decoder(Answer)
_redeem_calls = msgspec.msgpack.Decoder(RedeemCall)
_redeem_answers = msgspec.msgpack.Decoder(Joined | NotJoined)


def encode_message(message: Call | Answer | RedeemCall | Joined | NotJoined) -> bytes:
    """Return the bytes of a call or an answer."""
    return msgspec.msgpack.encode(message)


def decode_call(data: bytes) -> Call:
    """Read a member's call; raises `InvalidRecord` when it is none."""
    return _decode(_calls, data, MAX_CALL_BYTES)


def decode_answer(data: bytes) -> Answer:
    """Read the answer to a member's call; raises `InvalidRecord` when it is none."""
    return _decode(_answers, data, MAX_ANSWER_BYTES)


def decode_redeem_call(data: bytes) -> RedeemCall:
    """Read a stranger's call; raises `InvalidRecord` when it is none."""
    return _decode(_redeem_calls, data, MAX_CALL_BYTES)


def decode_redeem_answer(data: bytes) -> Joined | NotJoined:
    """Read the answer to a stranger's call; raises `InvalidRecord` when it is none."""
    return _decode(_redeem_answers, data, MAX_ANSWER_BYTES)


def append_request(swarm_id: SwarmId, record: bytes) -> tuple[str, str, bytes]:
    """Return method, path and body of the HTTP request that an `AppendCall` is proven as."""
    path = f"/v1/swarms/{swarm_id.hex()}/records"
    return "POST", path, msgspec.json.encode(RecordMessage(record))


def append_proof(signer: Identity | None, swarm_id: SwarmId, record: bytes, *, at: int) -> str:
    """Return an administrator's proof of an `AppendCall` at ``at``, in Unix seconds.

    It is empty for a member that leaves, whose record proves itself.
    """
    if signer is None:
        return ""
    method, path, body = append_request(swarm_id, record)
    return sign_request(signer, method=method, path=path, body=body, at=at)


def _decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes, max_bytes: int) -> _T:
    if len(data) > max_bytes:
        raise InvalidRecord(kind="message", problem=f"longer than {max_bytes} bytes")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        # Without msgspec's text, which may quote what proves the right to join.
        raise InvalidRecord(kind="message", problem="it is not one of this protocol") from None
