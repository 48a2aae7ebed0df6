from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import FrameKeyExhausted, InvalidFrame, LinkRefused, WireVersionMismatch
from pals.net.link import (
    CONFIRMATION_BYTES,
    NONCE_BYTES,
    PREFIX_BYTES,
    Handshake,
    LaneReceiver,
    LinkKeys,
    LinkSecrets,
    Status,
)
from pals.net.wire import (
    CONTROL_SHAPE,
    HEADER_BYTES,
    ROW_BYTES,
    TAG_BYTES,
    Frame,
    FrameShape,
    Lane,
    Row,
    hidden_shape,
    pack_header,
    pack_rows,
    tokens_shape,
)
from pals.swarm import keys as swarm_keys
from pals.swarm.identity import Identity
from pals.swarm.keys import (
    FrameKey,
    Role,
    epoch_prk,
    key_confirmation,
    link_id,
    link_prk,
)
from pals.types import PeerId, SessionId, SwarmId

A, B, C = (Identity.from_seed(bytes([i]) * 32).peer_id for i in (1, 2, 3))
SWARM = SwarmId(bytes(range(32)))
SECRET = bytes(range(32, 64))
EPOCH = 3
HELLO_BYTES = PREFIX_BYTES + 72
WELCOME_BYTES = HELLO_BYTES + CONFIRMATION_BYTES
MANIFEST = b"m" * 32
WIDTH = 4
HIDDEN = hidden_shape(MANIFEST, 10, "bf16", WIDTH)
TOKENS = tokens_shape(MANIFEST)
SESSION = SessionId(b"s" * 16)


def make_secrets(
    local: PeerId = A, *, swarm: SwarmId = SWARM, epoch: int = EPOCH, secret: bytes = SECRET
) -> LinkSecrets:
    return LinkSecrets(
        swarm_id=swarm, epoch=epoch, epoch_prk=epoch_prk(swarm, epoch, secret), local=local
    )


def make_side(
    role: Role,
    *,
    secrets: LinkSecrets | None = None,
    remote: PeerId | None = None,
    ephemeral: int | None = None,
    nonce: bytes | None = None,
) -> Handshake:
    """Return one side of a handshake in which A dials B, but for what is given."""
    is_initiator = role == "initiator"
    seed = ephemeral or (11 if is_initiator else 22)
    return Handshake(
        role,
        secrets or make_secrets(A if is_initiator else B),
        remote or (B if is_initiator else A),
        ephemeral=X25519PrivateKey.from_private_bytes(bytes([seed]) * 32),
        nonce=nonce or role[:1].encode() * NONCE_BYTES,
    )


Refusal = LinkRefused | WireVersionMismatch | None


@dataclass
class Outcome:
    """How a handshake ended: the error of each side, and all that each side wrote."""

    initiator_error: Refusal = None
    responder_error: Refusal = None
    initiator_wrote: bytes = b""
    responder_wrote: bytes = b""


def pump(side: Handshake, inbox: bytearray) -> Refusal:
    """Give a side what it wants from its inbox; return the error that ends it."""
    while side.keys is None and len(inbox) >= side.wanted:
        data = bytes(inbox[: side.wanted])
        del inbox[: len(data)]
        try:
            side.receive(data)
        except (LinkRefused, WireVersionMismatch) as error:
            return error
    return None


def shake_hands(
    initiator: Handshake, responder: Handshake, *, tamper: dict[str, bytes] | None = None
) -> Outcome:
    """Carry a whole handshake; ``tamper`` replaces the flight of that name on the way."""
    replaced = tamper or {}
    outcome = Outcome()
    to_responder, to_initiator = bytearray(), bytearray()
    hello = initiator.take_outgoing()
    to_responder += replaced.get("hello", hello)
    outcome.responder_error = pump(responder, to_responder)
    outcome.responder_wrote = responder.take_outgoing()
    to_initiator += replaced.get("welcome", outcome.responder_wrote)
    outcome.initiator_error = pump(initiator, to_initiator)
    confirmation = initiator.take_outgoing()
    outcome.initiator_wrote = hello + confirmation
    if outcome.responder_error is None:
        to_responder += replaced.get("confirmation", confirmation)
        outcome.responder_error = pump(responder, to_responder)
    return outcome


def link_keys(
    initiator: Handshake | None = None, responder: Handshake | None = None
) -> tuple[LinkKeys, LinkKeys]:
    """Return the keys of both ends of a link between these two sides."""
    initiator = initiator or make_side("initiator")
    responder = responder or make_side("responder")
    shake_hands(initiator, responder)
    assert initiator.keys is not None
    assert responder.keys is not None
    return initiator.keys, responder.keys


INITIATOR, RESPONDER = link_keys()
RECORDED = shake_hands(make_side("initiator"), make_side("responder"))
HELLO = RECORDED.initiator_wrote[:HELLO_BYTES]
CONFIRMATION = RECORDED.initiator_wrote[HELLO_BYTES:]
WELCOME = RECORDED.responder_wrote


# --- handshake -----------------------------------------------------------------------


def test_both_sides_end_with_the_same_link() -> None:
    assert INITIATOR.address == RESPONDER.address
    assert INITIATOR.prk == RESPONDER.prk
    assert (INITIATOR.local, INITIATOR.remote) == (A, B)
    assert (RESPONDER.local, RESPONDER.remote) == (B, A)
    assert INITIATOR.address.swarm == SWARM[:16]
    assert INITIATOR.address.epoch == EPOCH


def test_keys_are_those_of_the_documented_schedule() -> None:
    ours = X25519PrivateKey.from_private_bytes(bytes([11]) * 32)
    theirs = X25519PrivateKey.from_private_bytes(bytes([22]) * 32)
    shares = [
        nonce * NONCE_BYTES + key.public_key().public_bytes_raw()
        for nonce, key in ((b"i", ours), (b"r", theirs))
    ]
    proposal = SWARM[:16] + EPOCH.to_bytes(8, "big")
    assert b"PALS\x01\x00" + proposal + shares[0] == HELLO
    assert WELCOME[:HELLO_BYTES] == b"PALS\x01\x00" + proposal + shares[1]
    prk = link_prk(
        epoch_prk(SWARM, EPOCH, SECRET), ours.exchange(theirs.public_key()), *shares, A, B
    )
    assert INITIATOR.prk == prk
    assert WELCOME[HELLO_BYTES:] == key_confirmation(prk, "responder")
    assert key_confirmation(prk, "initiator") == CONFIRMATION
    assert INITIATOR.address.link == link_id(prk)


def test_flights_have_the_documented_sizes() -> None:
    assert (len(HELLO), len(WELCOME), len(CONFIRMATION)) == (78, 110, 32)


@pytest.mark.parametrize(
    ("initiator", "responder"),
    [
        pytest.param(make_side("initiator", nonce=b"n" * 16), None, id="initiator's nonce"),
        pytest.param(None, make_side("responder", nonce=b"n" * 16), id="responder's nonce"),
        pytest.param(make_side("initiator", ephemeral=33), None, id="initiator's key"),
        pytest.param(None, make_side("responder", ephemeral=33), id="responder's key"),
    ],
)
def test_anything_fresh_on_either_side_gives_another_link(
    initiator: Handshake | None, responder: Handshake | None
) -> None:
    other, _ = link_keys(initiator, responder)
    assert other.prk != INITIATOR.prk
    assert other.address.link != INITIATOR.address.link


def flips(flight: bytes) -> Iterator[bytes]:
    for position in range(len(flight)):
        for mask in (0x01, 0x80):
            changed = bytearray(flight)
            changed[position] ^= mask
            yield bytes(changed)


@pytest.mark.parametrize(
    ("flight", "sent"), [("hello", HELLO), ("welcome", WELCOME), ("confirmation", CONFIRMATION)]
)
def test_flight_with_any_byte_changed_gives_the_responder_no_link(flight: str, sent: bytes) -> None:
    for changed in flips(sent):
        initiator, responder = make_side("initiator"), make_side("responder")
        outcome = shake_hands(initiator, responder, tamper={flight: changed})
        assert outcome.initiator_error or outcome.responder_error
        assert responder.keys is None
        # After its own confirmation the initiator has a link; that nobody answers on it is
        # for the lanes to find out.
        assert initiator.keys is None or flight == "confirmation"


def test_responder_of_another_version_is_told_apart_on_both_sides() -> None:
    responder = make_side("responder")
    outcome = shake_hands(
        make_side("initiator"), responder, tamper={"hello": HELLO[:4] + b"\x09" + HELLO[5:]}
    )
    assert isinstance(outcome.responder_error, WireVersionMismatch)
    assert outcome.responder_error.fields == {"peer": A, "theirs": 9, "ours": 1}
    assert outcome.responder_wrote == b"PALS" + bytes([1, Status.WRONG_VERSION])

    initiator = make_side("initiator")
    answer = b"PALS" + bytes([9, Status.WRONG_VERSION])
    outcome = shake_hands(initiator, make_side("responder"), tamper={"welcome": answer})
    assert isinstance(outcome.initiator_error, WireVersionMismatch)
    assert outcome.initiator_error.fields == {"peer": B, "theirs": 9, "ours": 1}
    assert outcome.initiator_wrote == HELLO


@pytest.mark.parametrize(
    ("secrets", "problem"),
    [
        (make_secrets(B, swarm=SwarmId(b"o" * 32)), "it belongs to another swarm"),
        (make_secrets(B, epoch=EPOCH + 1), "it is in another epoch of the swarm secret"),
    ],
)
def test_other_swarm_or_epoch_is_told_to_both_sides(secrets: LinkSecrets, problem: str) -> None:
    initiator, responder = make_side("initiator"), make_side("responder", secrets=secrets)
    outcome = shake_hands(initiator, responder)
    for error, peer in ((outcome.initiator_error, B), (outcome.responder_error, A)):
        assert isinstance(error, LinkRefused)
        assert error.fields == {"peer": peer, "problem": problem}
    assert len(outcome.responder_wrote) == PREFIX_BYTES
    assert initiator.keys is responder.keys is None


def test_responder_that_says_ok_for_another_epoch_is_refused() -> None:
    changed = bytearray(WELCOME)
    changed[PREFIX_BYTES + 16 + 7] ^= 1
    outcome = shake_hands(
        make_side("initiator"), make_side("responder"), tamper={"welcome": bytes(changed)}
    )
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert outcome.initiator_wrote == HELLO


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(
            make_side("responder", secrets=make_secrets(B, secret=b"x" * 32)), id="other secret"
        ),
        pytest.param(make_side("responder", secrets=make_secrets(C)), id="responder is another"),
        pytest.param(make_side("responder", remote=C), id="initiator is another"),
    ],
)
def test_side_without_the_same_secret_and_names_gets_no_confirmation(other: Handshake) -> None:
    initiator = make_side("initiator")
    outcome = shake_hands(initiator, other)
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert outcome.initiator_error.fields["problem"] == "the swarm secrets differ"
    assert outcome.initiator_wrote == HELLO
    assert initiator.keys is other.keys is None


def test_confirmation_of_the_own_role_is_refused() -> None:
    responder = make_side("responder")
    reflected = WELCOME[-CONFIRMATION_BYTES:]
    outcome = shake_hands(make_side("initiator"), responder, tamper={"confirmation": reflected})
    assert isinstance(outcome.responder_error, LinkRefused)
    assert responder.keys is None


def test_own_hello_reflected_is_refused() -> None:
    mirrored = HELLO + CONFIRMATION
    initiator = make_side("initiator", remote=A)
    outcome = shake_hands(initiator, make_side("responder"), tamper={"welcome": mirrored})
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert initiator.keys is None


def test_recorded_handshake_replayed_to_a_new_responder_is_refused() -> None:
    responder = make_side("responder", ephemeral=44, nonce=b"f" * 16)
    outcome = shake_hands(
        make_side("initiator"), responder, tamper={"hello": HELLO, "confirmation": CONFIRMATION}
    )
    assert isinstance(outcome.responder_error, LinkRefused)
    assert responder.keys is None


P = 2**255 - 19
LOW_ORDER = [
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    P - 1,
    P,
    P + 1,
]
"""The u coordinates of X25519 whose shared secret is zero whatever the other key is."""


@pytest.mark.parametrize("point", LOW_ORDER)
def test_degenerate_ephemeral_key_is_refused(point: int) -> None:
    degenerate = point.to_bytes(32, "little")
    responder = make_side("responder")
    outcome = shake_hands(
        make_side("initiator"), responder, tamper={"hello": HELLO[:-32] + degenerate}
    )
    assert isinstance(outcome.responder_error, LinkRefused)
    assert outcome.responder_error.fields["problem"] == "its ephemeral key is degenerate"
    assert outcome.responder_wrote == b""

    welcome = WELCOME[: HELLO_BYTES - 32] + degenerate + WELCOME[HELLO_BYTES:]
    outcome = shake_hands(
        make_side("initiator"), make_side("responder"), tamper={"welcome": welcome}
    )
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert outcome.initiator_error.fields["problem"] == "its ephemeral key is degenerate"


def test_unknown_status_is_refused() -> None:
    outcome = shake_hands(
        make_side("initiator"), make_side("responder"), tamper={"welcome": b"PALS\x01\x63"}
    )
    assert isinstance(outcome.initiator_error, LinkRefused)
    assert "status 99" in str(outcome.initiator_error)


def test_only_a_responder_answers_a_refusal() -> None:
    for data in (b"GET / ", b"PALS\x09\x00", b"PALS\x01\x02"):
        initiator = make_side("initiator")
        initiator.take_outgoing()
        assert pump(initiator, bytearray(data)) is not None
        assert initiator.take_outgoing() == b""


@given(st.sampled_from(["initiator", "responder"]), st.binary(max_size=150), st.integers(0, 110))
def test_arbitrary_bytes_end_a_handshake_with_a_typed_error(
    role: Role, noise: bytes, genuine: int
) -> None:
    side = make_side(role)
    prefix = (HELLO if role == "responder" else WELCOME)[:genuine]
    pump(side, bytearray(prefix + noise))
    if side.keys is not None:
        assert (prefix + noise)[: len(WELCOME)] == WELCOME


def test_reprs_show_no_key() -> None:
    secrets = make_secrets()
    assert repr(secrets) == f"LinkSecrets(swarm={SWARM.hex()[:8]}, epoch={EPOCH})"
    shown = repr(INITIATOR)
    assert shown == f"LinkKeys(link={INITIATOR.address.link.hex()[:8]}, remote={B[-8:]})"


# --- lanes ---------------------------------------------------------------------------


def make_body(tokens: Sequence[int] = (1,), *, shape: FrameShape = HIDDEN) -> tuple[int, bytes]:
    """Return the row count and the body of a frame with a row of each length."""
    rows = [Row(SessionId(bytes([i]) * 16), 0, n) for i, n in enumerate(tokens)]
    payload = bytes(i % 251 for i in range(sum(tokens) * shape.token_bytes))
    return len(rows), pack_rows(rows) + payload


def seal(keys: LinkKeys = INITIATOR, lane: Lane = Lane.DECODE, count: int = 1) -> list[bytes]:
    """Return the first frames that one end of a link writes on a lane."""
    sender = keys.sender(lane)
    return [sender.seal(HIDDEN, *make_body((1 + i % 3,))) for i in range(count)]


FRAME = seal()[0]


def opened(receiver: LaneReceiver, data: bytes) -> list[Frame]:
    return receiver.receive(data, (HIDDEN,))


def receiver_of(keys: LinkKeys = RESPONDER, lane: Lane = Lane.DECODE) -> LaneReceiver:
    return keys.receiver(lane)


@pytest.mark.parametrize("lane", list(Lane))
@pytest.mark.parametrize("forward", [True, False])
def test_frames_open_in_order_in_both_directions(lane: Lane, forward: bool) -> None:
    ends = (INITIATOR, RESPONDER) if forward else (RESPONDER, INITIATOR)
    sender, receiver = ends[0].sender(lane), ends[1].receiver(lane)
    for tokens in ((1,), (2, 1), (5,)):
        row_count, body = make_body(tokens)
        [frame] = opened(receiver, sender.seal(HIDDEN, row_count, body))
        assert frame.lane is lane
        assert [row.num_tokens for row in frame.rows] == list(tokens)
        assert bytes(frame.payload) == body[row_count * ROW_BYTES :]


def test_control_frames_open() -> None:
    sealed = INITIATOR.sender(Lane.CONTROL).seal(CONTROL_SHAPE, 0, b"message")
    [frame] = RESPONDER.receiver(Lane.CONTROL).receive(sealed, (CONTROL_SHAPE,))
    assert bytes(frame.payload) == b"message"


def test_frame_shows_nothing_of_its_body() -> None:
    row_count, body = make_body((4,))
    sealed = INITIATOR.sender(Lane.DECODE).seal(HIDDEN, row_count, body)
    assert len(sealed) == HEADER_BYTES + len(body) + TAG_BYTES
    assert body[ROW_BYTES:] not in sealed
    assert bytes(16) not in sealed[HEADER_BYTES:]


@given(st.lists(st.integers(1, 400), max_size=30), st.integers(1, 5))
def test_bytes_cut_anywhere_give_the_same_frames(cuts: list[int], count: int) -> None:
    stream = b"".join(seal(count=count))
    whole = opened(receiver_of(), stream)
    receiver, pieces, start = receiver_of(), [], 0
    for cut in [*cuts, len(stream)]:
        pieces += opened(receiver, stream[start : start + cut])
        start += cut
    assert len(pieces) == count
    assert [(f.rows, bytes(f.payload)) for f in pieces] == [
        (f.rows, bytes(f.payload)) for f in whole
    ]


def test_single_bytes_give_each_frame_as_soon_as_it_is_whole() -> None:
    frames = seal(count=3)
    receiver = receiver_of()
    ends = []
    for number, byte in enumerate(b"".join(frames), start=1):
        if opened(receiver, bytes([byte])):
            ends.append(number)
    assert ends == [sum(map(len, frames[: i + 1])) for i in range(3)]


# --- attacks on lanes ----------------------------------------------------------------


def sender_keys(
    local: PeerId = A,
    *,
    nonce: bytes | None = None,
    swarm: SwarmId = SWARM,
    epoch: int = EPOCH,
    secret: bytes = SECRET,
) -> LinkKeys:
    """Return the initiator's keys of a link to B that differs from the usual one."""
    ours, theirs = (make_secrets(p, swarm=swarm, epoch=epoch, secret=secret) for p in (local, B))
    initiator = make_side("initiator", secrets=ours, nonce=nonce)
    return link_keys(initiator, make_side("responder", secrets=theirs, remote=local))[0]


FOREIGN = {
    "replayed by the receiver to its sender": (INITIATOR, seal(INITIATOR)[0]),
    "written by the receiver itself": (RESPONDER, seal(RESPONDER)[0]),
    "of another lane": (RESPONDER, seal(INITIATOR, Lane.PREFILL)[0]),
    "ahead of its turn": (RESPONDER, seal(count=2)[1]),
    "of another link of the same peers": (RESPONDER, seal(sender_keys(nonce=b"n" * 16))[0]),
    "of another epoch with the same secret": (RESPONDER, seal(sender_keys(epoch=EPOCH + 1))[0]),
    "of another secret": (RESPONDER, seal(sender_keys(secret=b"x" * 32))[0]),
    "of another swarm": (RESPONDER, seal(sender_keys(swarm=SwarmId(b"o" * 32)))[0]),
    "of another peer": (RESPONDER, seal(sender_keys(C))[0]),
}
"""Who receives it, and a genuine frame that is not the next one of its lane."""


def expected_header(keys: LinkKeys, frame: bytes, counter: int = 0) -> bytes:
    """Return the header that the receiver expects, with the sizes of ``frame``."""
    body = len(frame) - HEADER_BYTES - TAG_BYTES
    return pack_header(keys.address, Lane.DECODE, counter, HIDDEN, 1, body)


@pytest.mark.parametrize("origin", FOREIGN)
def test_frame_from_elsewhere_is_refused(origin: str) -> None:
    keys, frame = FOREIGN[origin]
    with pytest.raises(InvalidFrame):
        opened(receiver_of(keys), frame)


@pytest.mark.parametrize("origin", FOREIGN)
def test_body_from_elsewhere_under_the_expected_header_is_refused(origin: str) -> None:
    keys, frame = FOREIGN[origin]
    with pytest.raises(InvalidFrame) as caught:
        opened(receiver_of(keys), expected_header(keys, frame) + frame[HEADER_BYTES:])
    assert caught.value.fields == {"peer": keys.remote, "problem": "frame 0 does not open"}


def test_replay_is_refused() -> None:
    for again in (FRAME, expected_header(RESPONDER, FRAME, 1) + FRAME[HEADER_BYTES:]):
        receiver = receiver_of()
        assert len(opened(receiver, FRAME)) == 1
        with pytest.raises(InvalidFrame):
            opened(receiver, again)


def test_reordered_frames_are_refused() -> None:
    first, second, third = seal(count=3)
    receiver = receiver_of()
    opened(receiver, first)
    with pytest.raises(InvalidFrame):
        opened(receiver, third + second)


def test_every_flipped_header_bit_is_refused() -> None:
    following = seal(count=2)[1]
    for bit in range(8 * HEADER_BYTES):
        changed = bytearray(FRAME)
        changed[bit // 8] ^= 1 << bit % 8
        receiver = receiver_of()
        # A longer claim waits for more bytes, which then do not open.
        with pytest.raises(InvalidFrame):
            opened(receiver, bytes(changed) + following * 200)


@pytest.mark.parametrize("position", range(HEADER_BYTES - 6))
def test_field_that_is_not_expected_is_refused_from_the_header_alone(
    position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decrypt(self: FrameKey, header: bytes, sealed: bytes) -> bytes:
        raise AssertionError("a key was tried")

    monkeypatch.setattr(FrameKey, "open", decrypt)
    changed = bytearray(FRAME[:HEADER_BYTES])
    changed[position] ^= 1
    with pytest.raises(InvalidFrame):
        opened(receiver_of(), bytes(changed))
    with pytest.raises(InvalidFrame):
        opened(receiver_of(), bytes(changed) + FRAME[HEADER_BYTES:])


def test_every_flipped_bit_of_the_sealed_body_is_refused() -> None:
    for bit in range(8 * HEADER_BYTES, 8 * len(FRAME)):
        changed = bytearray(FRAME)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidFrame):
            opened(receiver_of(), bytes(changed))


@pytest.mark.parametrize("missing", [1, TAG_BYTES, len(FRAME) - HEADER_BYTES, len(FRAME) - 1])
def test_truncated_frame_is_never_given_out(missing: int) -> None:
    receiver = receiver_of()
    assert opened(receiver, FRAME[:-missing]) == []
    with pytest.raises(InvalidFrame):
        opened(receiver, seal(count=2)[1])


@pytest.mark.parametrize(
    ("rows", "body"), [(1, 2**32 - 1), (65535, 2**32 - 1), (65535, 65535 * 32), (0, 0)]
)
def test_claim_of_a_huge_frame_is_refused_from_the_header_alone(rows: int, body: int) -> None:
    header = pack_header(RESPONDER.address, Lane.DECODE, 0, HIDDEN, rows, body)
    receivers = [receiver_of(), receiver_of()]
    with pytest.raises(InvalidFrame):
        opened(receivers[0], header)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFrame):
            opened(receivers[1], header)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(hidden_shape(b"n" * 32, 10, "bf16", WIDTH), id="manifest"),
        pytest.param(hidden_shape(MANIFEST, 11, "bf16", WIDTH), id="boundary"),
        pytest.param(hidden_shape(MANIFEST, 10, "f32", WIDTH), id="dtype"),
        pytest.param(TOKENS, id="kind"),
        pytest.param(CONTROL_SHAPE, id="control on a data lane"),
    ],
)
def test_member_that_sends_what_is_not_served_is_refused(shape: FrameShape) -> None:
    row_count, body = (0, b"x") if shape is CONTROL_SHAPE else make_body((1,), shape=shape)
    sealed = INITIATOR.sender(Lane.DECODE).seal(shape, row_count, body)
    with pytest.raises(InvalidFrame):
        opened(receiver_of(), sealed)


SAME_SESSION = pack_rows([Row(SESSION, 0, 1), Row(SESSION, 1, 1)]) + bytes(2 * HIDDEN.token_bytes)
WRONG_WIDTH = pack_rows([Row(SESSION, 0, 1)]) + bytes(HIDDEN.token_bytes + 1)


@pytest.mark.parametrize(("row_count", "body"), [(2, SAME_SESSION), (1, WRONG_WIDTH)])
def test_member_that_seals_an_impossible_body_is_refused(row_count: int, body: bytes) -> None:
    with pytest.raises(InvalidFrame):
        opened(receiver_of(), INITIATOR.sender(Lane.DECODE).seal(HIDDEN, row_count, body))


@pytest.mark.parametrize("fault", ["header", "body", "rows"])
def test_lane_is_dead_after_the_first_invalid_frame(fault: str) -> None:
    sender = INITIATOR.sender(Lane.DECODE)
    row_count, body = (2, SAME_SESSION) if fault == "rows" else make_body()
    first, second = (
        bytearray(sender.seal(HIDDEN, row_count, body)),
        sender.seal(HIDDEN, *make_body()),
    )
    if fault != "rows":
        first[0 if fault == "header" else -1] ^= 1
    receiver = receiver_of()
    with pytest.raises(InvalidFrame):
        opened(receiver, bytes(first))
    for data in (b"", FRAME, second):
        with pytest.raises(InvalidFrame):
            opened(receiver, data)


def test_no_nonce_repeats_within_a_lane() -> None:
    sender = INITIATOR.sender(Lane.DECODE)
    sealed = [sender.seal(HIDDEN, *make_body())[HEADER_BYTES:] for _ in range(50)]
    assert len(set(sealed)) == 50


def test_sender_stops_at_the_limit_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm_keys, "FRAME_LIMIT", 2)
    sender = INITIATOR.sender(Lane.DECODE)
    for _ in range(2):
        sender.seal(HIDDEN, *make_body())
    with pytest.raises(FrameKeyExhausted):
        sender.seal(HIDDEN, *make_body())


@given(st.integers(0, len(FRAME)), st.binary(min_size=1, max_size=300))
def test_arbitrary_bytes_raise_nothing_but_invalid_frame(genuine: int, noise: bytes) -> None:
    data = FRAME[:genuine] + noise
    try:
        frames = opened(receiver_of(), data)
    except InvalidFrame:
        frames = []
    assert len(frames) == 0 or data.startswith(FRAME)
