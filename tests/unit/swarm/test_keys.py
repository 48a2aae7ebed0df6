from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import FrameKeyExhausted, InvalidFrame
from pals.swarm import keys
from pals.swarm.identity import Identity
from pals.swarm.keys import FrameKey, epoch_prk, frame_key, key_confirmation, link_prk
from pals.types import PeerId, SwarmId

A, B, C = (Identity.from_seed(bytes([i]) * 32).peer_id for i in (1, 2, 3))
SWARM = SwarmId(bytes(32))
SECRET = bytes(range(32))
HEADER = bytes(range(100))


def prk(
    *,
    secret: bytes = SECRET,
    epoch: int = 0,
    swarm: SwarmId = SWARM,
    dh: bytes = b"d" * 32,
    shares: tuple[bytes, bytes] = (b"i" * 48, b"r" * 48),
    peers: tuple[PeerId, PeerId] = (A, B),
) -> bytes:
    return link_prk(epoch_prk(swarm, epoch, secret), dh, *shares, *peers)


def sender(lane: int = 0) -> FrameKey:
    return frame_key(prk(), A, B, lane)


receiver = sender


def seal(key: FrameKey, header: bytes, body: bytes) -> bytes:
    """Return what follows the header in the next frame."""
    frame = key.seal(header, body)
    assert frame[: len(header)] == header
    return bytes(frame[len(header) :])


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_frames_open_in_order(bodies: list[bytes]) -> None:
    tx, rx = sender(), receiver()
    for number, body in enumerate(bodies):
        assert rx.open(HEADER, memoryview(seal(tx, HEADER, body))) == body
        assert rx.counter == tx.counter == number + 1


def test_replayed_frame_is_refused() -> None:
    rx, sealed = receiver(), seal(sender(), HEADER, b"one")
    rx.open(HEADER, sealed)
    with pytest.raises(InvalidFrame):
        rx.open(HEADER, sealed)


def test_reordered_frame_is_refused_and_the_counter_stays() -> None:
    tx, rx = sender(), receiver()
    first, second = seal(tx, HEADER, b"one"), seal(tx, HEADER, b"two")
    with pytest.raises(InvalidFrame) as caught:
        rx.open(HEADER, second)
    assert caught.value.fields["peer"] == A
    assert rx.counter == 0
    assert [rx.open(HEADER, first), rx.open(HEADER, second)] == [b"one", b"two"]


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(frame_key(prk(), B, A, 0), id="reflected to its sender"),
        pytest.param(frame_key(prk(), A, C, 0), id="other receiver"),
        pytest.param(frame_key(prk(), A, B, 1), id="other lane"),
        pytest.param(frame_key(prk(peers=(B, A)), A, B, 0), id="roles swapped"),
        pytest.param(frame_key(prk(peers=(A, C)), A, B, 0), id="link to another peer"),
        pytest.param(frame_key(prk(shares=(b"x" * 48, b"r" * 48)), A, B, 0), id="other initiation"),
        pytest.param(frame_key(prk(shares=(b"i" * 48, b"x" * 48)), A, B, 0), id="other response"),
        pytest.param(frame_key(prk(dh=b"e" * 32), A, B, 0), id="member outside the pair"),
        pytest.param(frame_key(prk(epoch=1), A, B, 0), id="other epoch, same secret"),
        pytest.param(frame_key(prk(secret=bytes(32)), A, B, 0), id="other secret"),
        pytest.param(frame_key(prk(swarm=SwarmId(b"s" * 32)), A, B, 0), id="other swarm"),
    ],
)
def test_frame_spliced_from_elsewhere_is_refused(key: FrameKey) -> None:
    sealed = seal(sender(), HEADER, b"body")
    with pytest.raises(InvalidFrame):
        key.open(HEADER, sealed)


@pytest.mark.parametrize("position", range(len(HEADER)))
def test_changed_header_byte_is_refused(position: int) -> None:
    sealed = seal(sender(), HEADER, b"body")
    changed = bytearray(HEADER)
    changed[position] ^= 1
    with pytest.raises(InvalidFrame):
        receiver().open(bytes(changed), sealed)


@given(st.integers(0, 8 * (4 + 16) - 1))
def test_changed_bit_of_the_sealed_body_is_refused(bit: int) -> None:
    sealed = bytearray(seal(sender(), HEADER, b"body"))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(InvalidFrame):
        receiver().open(HEADER, bytes(sealed))


@given(st.integers(0, 4 + 16 - 1))
def test_truncated_frame_is_refused(length: int) -> None:
    with pytest.raises(InvalidFrame):
        receiver().open(HEADER, seal(sender(), HEADER, b"body")[:length])


def test_each_frame_has_its_own_key_stream() -> None:
    tx = sender()
    assert seal(tx, b"", bytes(32))[:32] != seal(tx, b"", bytes(32))[:32]


@pytest.mark.parametrize("use", ["seal", "open"])
def test_key_is_refused_at_its_limit(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "FRAME_LIMIT", 2)
    tx, rx = sender(), receiver()
    for _ in range(2):
        rx.open(HEADER, seal(tx, HEADER, b""))
    with pytest.raises(FrameKeyExhausted):
        getattr(tx if use == "seal" else rx, use)(HEADER, bytes(16))


def test_limit_is_that_of_sp_800_38d() -> None:
    assert keys.FRAME_LIMIT == 2**32


def test_confirmations_of_the_roles_differ() -> None:
    assert key_confirmation(prk(), "initiator") != key_confirmation(prk(), "responder")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_frame_key_is_not_duplicated(duplicate: Callable[[object], object]) -> None:
    with pytest.raises(TypeError):
        duplicate(sender())


def test_repr_shows_no_key() -> None:
    assert repr(sender()) == f"FrameKey(sender={A}, counter=0)"
