"""Notices that a member is gone: which are followed, and which are read at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidRecord
from pals.net.rates import RateLimit
from pals.net.suspicion import (
    MAX_NOTICE_BYTES,
    PAUSE_S,
    Notice,
    Suspicions,
    decode_notice,
    encode_notice,
)
from pals.types import PeerId

A, B = PeerId("a"), PeerId("b")


def test_a_notice_about_the_listed_record_is_followed() -> None:
    assert Suspicions().accept(A, 3, listed_seq=3, now=0.0)


@pytest.mark.parametrize("listed", [None, 2, 4])
def test_a_notice_about_no_listed_record_is_not(listed: int | None) -> None:
    assert not Suspicions().accept(A, 3, listed_seq=listed, now=0.0)


def test_a_peer_is_doubted_once_in_a_while_whatever_its_record() -> None:
    suspicions = Suspicions()
    assert suspicions.accept(A, 3, listed_seq=3, now=0.0)
    assert not suspicions.accept(A, 4, listed_seq=4, now=PAUSE_S - 0.1)
    assert suspicions.accept(B, 1, listed_seq=1, now=PAUSE_S - 0.1)
    assert suspicions.accept(A, 4, listed_seq=4, now=PAUSE_S)


def test_what_holds_nothing_back_any_more_is_forgotten() -> None:
    suspicions = Suspicions()
    suspicions.accept(A, 3, listed_seq=3, now=0.0)
    suspicions.purge(PAUSE_S - 0.1)
    assert not suspicions.accept(A, 3, listed_seq=3, now=PAUSE_S - 0.1)
    suspicions.purge(PAUSE_S)
    assert suspicions == Suspicions()


def test_a_notice_is_read_back() -> None:
    notice = Notice("12D3KooW" + "x" * 44, 1 << 53)
    assert decode_notice(encode_notice(notice)) == notice


@given(st.binary(max_size=2 * MAX_NOTICE_BYTES))
def test_arbitrary_bytes_are_no_notice_or_its_one_form(data: bytes) -> None:
    try:
        notice = decode_notice(data)
    except InvalidRecord:
        return
    assert encode_notice(notice) == data


def test_a_notice_too_long_is_refused() -> None:
    with pytest.raises(InvalidRecord, match="longer"):
        decode_notice(encode_notice(Notice("x" * MAX_NOTICE_BYTES, 1)))


def test_a_peer_may_do_so_much_at_once_and_so_much_a_second() -> None:
    limit = RateLimit(per_s=2.0, burst=3.0)
    assert [limit.allows(A, 0.0) for _ in range(4)] == [True, True, True, False]
    assert limit.allows(B, 0.0)
    assert not limit.allows(A, 0.4)
    assert limit.allows(A, 0.5)
    assert not limit.allows(A, 0.5)
    assert [limit.allows(A, 100.0) for _ in range(4)] == [True, True, True, False]


def test_full_buckets_are_forgotten_and_empty_ones_are_not() -> None:
    limit = RateLimit(per_s=1.0, burst=2.0)
    limit.allows(A, 0.0)
    limit.allows(B, 9.5)
    limit.purge(10.0)
    assert set(limit._buckets) == {B}
