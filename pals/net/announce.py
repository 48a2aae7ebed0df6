"""What a shard tells the swarm about itself: one record, signed by its identity.

Pure: bytes in, values out, the time is an argument. A record is the 64-byte Ed25519
signature followed by the signed body, a msgpack array in one canonical form.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from pals.errors import InvalidLayerRange, InvalidRecord
from pals.swarm.identity import SIGNATURE_BYTES, Identity, public_key_of, verify
from pals.types import Dtype, LayerRange, PeerId

MAX_RECORD_BYTES = 8192
MAX_LIFETIME_S = 300.0
CLOCK_SKEW_S = 300.0
MAX_ADDRESSES = 16
BRIDGES = ipaddress.ip_network("172.16.0.0/12")
MAX_TEXT_CHARS = 256
MAX_LAYERS = 10_000
MAX_SEQ = 1 << 53
MANIFEST_BYTES = 32
LAYER_HASH_BYTES = 16
_DOMAIN = b"pals/1 announcement\x00"

ShardState = Literal["serving", "draining", "leaving"]
"""What a shard does: take sessions, finish those it has, or nothing any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """One member serves ``layers`` of one model until ``expires_at``.

    Attributes:
        peer: The member that serves, and signs.
        model_id: Name of the model, for people.
        manifest: SHA-256 that names the model's files; shards of a chain agree on it.
        layers: The layers this shard holds.
        num_layers: Layers of the whole model.
        layer_hashes: Of each layer held, the first `LAYER_HASH_BYTES` of the SHA-256 of its
            source bytes: the manifest names whole files, of which a shard reads a part.
        dtype: In what the weights are kept, which decides the activations on the wire.
        free_tokens: Tokens of KV cache that sessions to come find room for.
        max_context_tokens: Tokens one session may reach.
        step_ms: Time of one decode step over its layers.
        addresses: Multiaddrs at which it listens, most useful first.
        seq: Grows with every record of this peer; a lower one is older.
        expires_at: Unix time in seconds, at most 5 minutes ahead.
        state: Whether it takes sessions. A shard that leaves says so in one last record,
            which is kept until it expires so that no older one comes back.
    """

    peer: PeerId
    model_id: str
    manifest: bytes
    layers: LayerRange
    num_layers: int
    layer_hashes: tuple[bytes, ...]
    dtype: Dtype
    free_tokens: int
    max_context_tokens: int
    step_ms: float
    addresses: tuple[str, ...]
    seq: int
    expires_at: float
    state: ShardState = "serving"


class _Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The signed fields in their order on the wire."""

    peer: str
    model_id: str
    manifest: bytes
    start: int
    stop: int
    num_layers: int
    layer_hashes: tuple[bytes, ...]
    dtype: Dtype
    free_tokens: int
    max_context_tokens: int
    step_ms: float
    addresses: tuple[str, ...]
    seq: int
    expires_at: float
    state: ShardState


_decoder = msgspec.msgpack.Decoder(_Body)


def sign_announcement(identity: Identity, announcement: Announcement) -> bytes:
    """Return the record of an announcement, signed by the peer it is about.

    Raises:
        InvalidRecord: ``announcement`` names another peer or breaks a limit that its
            readers enforce.
    """
    if announcement.peer != identity.peer_id:
        raise _refused(f"it is about {announcement.peer}, the signer is {identity.peer_id}")
    _check_limits(announcement)
    body = _encode(announcement)
    record = identity.sign(_DOMAIN + body) + body
    if len(record) > MAX_RECORD_BYTES:
        raise _refused(f"{len(record)} bytes, more than {MAX_RECORD_BYTES}")
    return record


def open_announcement(
    data: bytes, *, now_unix: float, is_member: Callable[[PeerId], bool]
) -> Announcement:
    """Verify a record and return what it says.

    Args:
        data: The record, from anybody.
        now_unix: Unix time in seconds.
        is_member: Says whether a peer is a live member.

    Raises:
        InvalidRecord: It is malformed, not signed by the peer it is about, not about a
            member, out of its time, or breaks a limit.
    """
    if not SIGNATURE_BYTES < len(data) <= MAX_RECORD_BYTES:
        raise _refused(f"{len(data)} bytes, not {SIGNATURE_BYTES} to {MAX_RECORD_BYTES}")
    signature, body = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
    announcement = _decode(body)
    _check_limits(announcement)
    if not is_member(announcement.peer):
        raise _refused(f"{announcement.peer} is not a live member")
    if not verify(public_key_of(announcement.peer), signature, _DOMAIN + body):
        raise _refused(f"not signed by {announcement.peer}")
    _check_time(announcement, now_unix)
    return announcement


def newest(announcements: list[Announcement]) -> int:
    """Return the index of the record that replaces the others of the same peer."""
    return max(
        range(len(announcements)),
        key=lambda i: (announcements[i].seq, announcements[i].expires_at),
    )


def useful_first(addresses: Sequence[str]) -> tuple[str, ...]:
    """Return multiaddrs in the order in which a cut list should keep them.

    Global and private ones go before those that seldom lead here from another machine
    (link-local ones, and 172.16.0.0/12, where container engines put their bridges), and
    loopback goes last; the order of the host is kept within each.
    """
    return tuple(sorted(addresses, key=_remoteness))


def _remoteness(address: str) -> int:
    protocol, _, rest = address.removeprefix("/").partition("/")
    try:
        ip = ipaddress.ip_address(rest.partition("/")[0])
    except ValueError:
        return 0  # a name, which somebody gave it for others to use
    if ip.is_loopback:
        return 2
    return int(ip.is_link_local or (protocol == "ip4" and ip in BRIDGES))


def _encode(a: Announcement) -> bytes:
    return msgspec.msgpack.encode(
        _Body(
            peer=a.peer,
            model_id=a.model_id,
            manifest=a.manifest,
            start=a.layers.start,
            stop=a.layers.stop,
            num_layers=a.num_layers,
            layer_hashes=a.layer_hashes,
            dtype=a.dtype,
            free_tokens=a.free_tokens,
            max_context_tokens=a.max_context_tokens,
            step_ms=float(a.step_ms),
            addresses=a.addresses,
            seq=a.seq,
            expires_at=float(a.expires_at),
            state=a.state,
        )
    )


def _decode(data: bytes) -> Announcement:
    try:
        body = _decoder.decode(data)
        layers = LayerRange(body.start, body.stop)
    except (msgspec.MsgspecError, UnicodeDecodeError, InvalidLayerRange) as error:
        raise _refused(str(error)) from error
    announcement = Announcement(
        peer=PeerId(body.peer),
        model_id=body.model_id,
        manifest=body.manifest,
        layers=layers,
        num_layers=body.num_layers,
        layer_hashes=body.layer_hashes,
        dtype=body.dtype,
        free_tokens=body.free_tokens,
        max_context_tokens=body.max_context_tokens,
        step_ms=body.step_ms,
        addresses=body.addresses,
        seq=body.seq,
        expires_at=body.expires_at,
        state=body.state,
    )
    if _encode(announcement) != data:
        raise _refused("not in canonical form")
    return announcement


def _check_limits(a: Announcement) -> None:
    if len(a.manifest) != MANIFEST_BYTES:
        raise _refused(f"a manifest of {len(a.manifest)} bytes")
    if not a.layers.stop <= a.num_layers <= MAX_LAYERS:
        raise _refused(f"layers {a.layers} of {a.num_layers}")
    if len(a.layer_hashes) != len(a.layers) or any(
        len(layer_hash) != LAYER_HASH_BYTES for layer_hash in a.layer_hashes
    ):
        raise _refused(f"{len(a.layer_hashes)} hashes of {len(a.layers)} layers, or of other sizes")
    if len(a.addresses) > MAX_ADDRESSES:
        raise _refused(f"{len(a.addresses)} addresses, more than {MAX_ADDRESSES}")
    if not all(_is_plain(text) for text in (a.model_id, *a.addresses)):
        raise _refused(f"text that is empty, unprintable or over {MAX_TEXT_CHARS} characters")
    if min(a.free_tokens, a.max_context_tokens, a.seq) < 0:
        raise _refused("a negative count")
    if a.seq > MAX_SEQ:
        raise _refused(f"number {a.seq}, more than {MAX_SEQ}")
    if not (math.isfinite(a.step_ms) and a.step_ms >= 0):
        raise _refused(f"a step of {a.step_ms} ms")


def _check_time(a: Announcement, now_unix: float) -> None:
    if not now_unix < a.expires_at <= now_unix + MAX_LIFETIME_S + CLOCK_SKEW_S:
        raise _refused(f"it expires {a.expires_at - now_unix:.0f} s from now")


def _is_plain(text: str) -> bool:
    return 0 < len(text) <= MAX_TEXT_CHARS and text.isprintable()


def _refused(problem: str) -> InvalidRecord:
    return InvalidRecord(kind="announcement", problem=problem)
