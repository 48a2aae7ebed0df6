"""P5 to P8 and P15: frames that were recorded, moved, changed or made up open nothing."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from pals.errors import InvalidFrame, InvalidRecord
from pals.net.announce import open_announcement
from pals.net.link import REKEY_INTERVAL_S as HOUR
from pals.net.link import Link
from pals.net.wire import (
    HEADER_BYTES,
    Codec,
    FrameHead,
    Lane,
    Row,
    Rows,
    pack_header,
    pack_rows,
    parse_body,
)
from pals.swarm import keys as swarm_keys
from pals.swarm.keys import FrameKey
from pals.types import SessionId
from tests.unit.net.handshakes import A
from tests.unit.net.link_pairs import (
    HIDDEN,
    NAMES,
    Name,
    Pair,
    frame_of,
    frames_in,
    make_pair,
    mid_change,
    receive,
    shares_from,
)

CHILDREN = 3
RESTARTS, TURNS = 4, 5


def recorded(
    count: int = 2, *, seed: str = "", lane: Lane = Lane.DECODE
) -> tuple[Pair, list[bytes]]:
    """Return a link, and frames that its dialler sent and nobody has received."""
    pair = make_pair(seed)
    for _ in range(count):
        pair.send("dialler", lane)
    return pair, frames_in(pair.dialler.wires[lane])


def assert_dead(link: Link, lane: Lane, data: bytes, next_frame: bytes) -> None:
    """Assert that ``data`` is refused and that the link takes nothing after it."""
    with pytest.raises(InvalidFrame):
        receive(link, lane, data)
    with pytest.raises(InvalidFrame):
        receive(link, lane, next_frame)


# --- P5: replay, reorder, reflection, splice --------------------------------------------


def test_p5_a_replayed_frame_ends_the_link() -> None:
    pair, (first, second) = recorded()
    receive(pair.dialled.link, Lane.DECODE, first)
    assert_dead(pair.dialled.link, Lane.DECODE, first, second)


def test_p5_a_frame_replayed_under_the_next_header_ends_the_link() -> None:
    pair, (first, second) = recorded()
    receive(pair.dialled.link, Lane.DECODE, first)
    spliced = second[:HEADER_BYTES] + first[HEADER_BYTES:]
    assert_dead(pair.dialled.link, Lane.DECODE, spliced, second)


def test_p5_a_reordered_frame_ends_the_link() -> None:
    pair, (first, second) = recorded()
    assert_dead(pair.dialled.link, Lane.DECODE, second, first)


def test_p5_a_frame_reflected_to_its_sender_ends_the_link() -> None:
    pair, (first, second) = recorded()
    assert_dead(pair.dialler.link, Lane.DECODE, first, second)


@pytest.mark.parametrize("lane", [Lane.CONTROL, Lane.PREFILL])
def test_p5_a_frame_moved_to_another_lane_ends_the_link(lane: Lane) -> None:
    pair, (first, second) = recorded()
    assert_dead(pair.dialled.link, lane, first, second)
    moved = bytearray(first)
    moved[5] = lane
    assert_dead(make_pair().dialled.link, lane, bytes(moved), second)


def test_p5_a_frame_of_another_link_of_the_same_two_ends_the_link() -> None:
    _, (first, second) = recorded(seed="before")
    pair, (genuine, _) = recorded(seed="after")
    assert_dead(pair.dialled.link, Lane.DECODE, first, second)
    fresh, _ = recorded(seed="after")
    spliced = genuine[:HEADER_BYTES] + first[HEADER_BYTES:]
    assert_dead(fresh.dialled.link, Lane.DECODE, spliced, second)


# --- P6: every field of the header is bound ---------------------------------------------


def test_p6_a_flipped_bit_of_any_header_field_ends_the_link_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[bytes] = []
    genuine = FrameKey.open
    monkeypatch.setattr(
        FrameKey,
        "open",
        lambda key, header, data: opened.append(header) or genuine(key, header, data),
    )
    _, (first, second) = recorded()
    for bit in range(8 * HEADER_BYTES):
        changed = bytearray(first)
        changed[bit // 8] ^= 1 << bit % 8
        changed += bytes(5000)  # a longer claim has its bytes, which then do not open
        assert_dead(make_pair().dialled.link, Lane.DECODE, bytes(changed), second)
    sizes = {header[-4:] for header in opened}
    assert first[HEADER_BYTES - 4 : HEADER_BYTES] not in sizes  # only another size got so far


def test_p6_every_flipped_header_bit_of_the_first_frame_of_a_key_is_refused() -> None:
    for bit in range(8 * HEADER_BYTES):
        pair = mid_change()
        switch, first = frames_in(pair.dialler.wires[Lane.DECODE])
        receive(pair.dialled.link, Lane.DECODE, switch)
        changed = bytearray(first + bytes(5000))
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InvalidFrame):
            receive(pair.dialled.link, Lane.DECODE, bytes(changed))


# --- P7: no key meets a nonce twice -----------------------------------------------------


@pytest.mark.parametrize("restored", NAMES)
def test_p7_a_restored_snapshot_of_one_side_repeats_no_key(restored: Name) -> None:
    """A machine that comes back with its old random numbers meets fresh ones."""
    seen: list[bytes] = []
    for attempt in range(3):
        shares = {
            name: shares_from(name if name == restored else f"{name} {attempt}") for name in NAMES
        }
        pair = make_pair(shares=shares)
        seen.append(pair.dialler.link._keys.prk)
        pair.tick(HOUR, "dialler")
        pair.deliver_all()
        seen.append(pair.dialler.link._keys.prk)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("frames", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_p7_no_key_meets_a_nonce_twice_over_restarts_and_changes_of_keys(
    monkeypatch: pytest.MonkeyPatch, frames: int
) -> None:
    count = math.ceil(frames / (RESTARTS * TURNS * len(NAMES) * len(Lane)))
    used: Counter[tuple[bytes, bytes]] = Counter()
    genuine = swarm_keys.AESGCM

    class Recorder:
        def __init__(self, key: bytes) -> None:
            self._key, self._aead = key, genuine(key)

        def encrypt_into(self, nonce: bytes, *args: bytes | memoryview) -> int:
            used[self._key, nonce] += 1
            return self._aead.encrypt_into(nonce, *args)

        def decrypt(self, *args: bytes | memoryview) -> bytes:
            return self._aead.decrypt(*args)

    monkeypatch.setattr(swarm_keys, "AESGCM", Recorder)
    for restart in range(RESTARTS):
        pair = make_pair(f"{restart}")
        for turn in range(TURNS):
            pair.now = 1000.0 * (-1) ** turn  # a clock that jumps back changes nothing
            for name in NAMES:
                for lane in Lane:
                    send_many(pair, name, lane, count)
            for name in NAMES:
                pair.ends[name].link._keyed_at = pair.now - HOUR
            pair.tick(pair.now)
            pair.deliver_all()
    assert used.total() >= frames
    assert set(used.values()) == {1}


def send_many(pair: Pair, name: Name, lane: Lane, count: int) -> None:
    end, other = pair.ends[name], pair.other(name)
    outgoing = frame_of(lane, 1)
    data = b"".join(end.link.seal(lane, outgoing, pair.now) for _ in range(count))
    assert len(receive(other.link, lane, data, pair.now)) == count


def test_p7_processes_that_are_killed_and_started_again_repeat_nothing() -> None:
    seen: Counter[str] = Counter()
    for _ in range(CHILDREN):
        command = [sys.executable, "-m", "tests.attacks.nonce_child"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in (child.stdout.readline() for _ in range(5)):
                seen.update(line[i : i + 32] for i in range(0, len(line) - 1, 32))
            child.kill()
    assert len(seen) == CHILDREN * 5 * len(NAMES) * len(Lane)
    assert set(seen.values()) == {1}


# --- P8: sizes that are claimed cost nothing ---------------------------------------------


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize(("rows", "body"), [(65535, 2**32 - 1), (1, 2**32 - 1), (257, 1 << 20)])
def test_p8_a_kibibyte_that_claims_a_huge_frame_is_refused_and_costs_nothing(
    codec: Codec, rows: int, body: int
) -> None:
    link = make_pair(codec=codec).dialled.link
    shape = link.wire_shape(Lane.PREFILL, HIDDEN)
    header = pack_header(link._keys.address, Lane.PREFILL, 0, shape, rows, body)
    data = header + bytes(1024 - len(header))
    refuse = partial(receive, link, Lane.PREFILL, data)
    assert peak_of(refuse) < 100_000


def peak_of(refuse: Callable[[], object]) -> int:
    """Return the most bytes that a refusal took."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFrame):
            refuse()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_p8_a_body_whose_rows_claim_2_to_the_40_elements_is_refused_and_costs_nothing() -> None:
    rows = Rows.of(*(Row(SessionId(bytes([n]) * 16), 0, 65535) for n in range(40)))
    table = pack_rows(rows)
    body = table + bytes(1024 - len(table))
    head = FrameHead(HIDDEN, len(rows), len(body))
    assert peak_of(partial(parse_body, A, Lane.PREFILL, head, body)) < 1 << 20


def test_p8_an_announcement_of_a_billion_layers_is_refused_and_costs_nothing() -> None:
    body = b"\x9f\xa4peer\xa5model\xc4\x20" + bytes(32) + b"\x00\xce\x3b\x9a\xca\x00" + bytes(100)

    def refuse() -> None:
        try:
            open_announcement(bytes(64) + body, now_unix=0.0, is_member=lambda _: True)
        except InvalidRecord as error:
            raise InvalidFrame(peer=A, problem=str(error)) from error

    assert peak_of(refuse) < 1 << 20


# --- P15: one key is tried --------------------------------------------------------------


def test_p15_one_key_is_tried_for_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[FrameKey] = []
    genuine = FrameKey.open

    def count(key: FrameKey, header: bytes, sealed: bytes | memoryview) -> bytes:
        tried.append(key)
        return genuine(key, header, sealed)

    monkeypatch.setattr(FrameKey, "open", count)
    pair = mid_change()
    switch, first = frames_in(pair.dialler.wires[Lane.DECODE])
    tried.clear()
    receive(pair.dialled.link, Lane.DECODE, switch + first)
    assert len(tried) == 2
    tried.clear()
    body = bytearray(frames_in(pair.dialler.wires[Lane.PREFILL])[0])
    body[-1] ^= 1
    with pytest.raises(InvalidFrame):
        receive(pair.dialled.link, Lane.PREFILL, bytes(body))
    assert len(tried) == 1
    tried.clear()
    epoch = bytearray(make_frame_of_dialler())
    epoch[32] ^= 1
    with pytest.raises(InvalidFrame):
        receive(make_pair().dialled.link, Lane.DECODE, bytes(epoch))
    assert tried == []


def make_frame_of_dialler() -> bytes:
    pair = make_pair()
    pair.send("dialler")
    return bytes(pair.dialler.wires[Lane.DECODE])
