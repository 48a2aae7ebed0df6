from hypothesis import given
from hypothesis import strategies as st

from pals.engine.budget import AMPLE_TOKENS, PLANNED_TOKENS, choose_kv_bytes
from pals.engine.pages import PageFormat
from pals.types import EngineLimits

PAGE = PageFormat(page_tokens=64, token_bytes=1000)
GIB = 1 << 30


def tokens_of(size_bytes: int) -> int:
    return (size_bytes // PAGE.page_bytes - 1) * PAGE.page_tokens


def test_named_bytes_are_taken_as_they_are():
    limits = EngineLimits(kv_bytes=12345)
    assert choose_kv_bytes(limits, PAGE, left_bytes=GIB, is_host=True) == 12345


def test_large_machine_has_room_for_an_ample_cache_and_no_more():
    chosen = choose_kv_bytes(EngineLimits(), PAGE, left_bytes=1000 * GIB, is_host=True)
    assert tokens_of(chosen) == AMPLE_TOKENS


def test_longest_context_of_the_limits_fits_where_there_is_room():
    limits = EngineLimits(max_context_tokens=1 << 20)
    chosen = choose_kv_bytes(limits, PAGE, left_bytes=1000 * GIB, is_host=False)
    assert tokens_of(chosen) == 1 << 20


def test_small_machine_has_what_was_planned():
    chosen = choose_kv_bytes(EngineLimits(), PAGE, left_bytes=-5, is_host=True)
    assert tokens_of(chosen) == PLANNED_TOKENS


def test_few_short_sessions_take_no_more_than_they_can_use():
    limits = EngineLimits(max_sessions=3, max_context_tokens=300)
    for left in (0, GIB, 1000 * GIB):
        assert tokens_of(choose_kv_bytes(limits, PAGE, left_bytes=left, is_host=True)) == 3 * 320


@given(left=st.integers(0, 200 * GIB), is_host=st.booleans())
def test_more_room_never_gives_less_and_what_is_left_is_never_passed(left, is_host):
    limits = EngineLimits()
    chosen = choose_kv_bytes(limits, PAGE, left_bytes=left, is_host=is_host)
    planned = choose_kv_bytes(limits, PAGE, left_bytes=0, is_host=is_host)

    assert planned <= chosen <= max(planned, left)
    assert chosen <= choose_kv_bytes(limits, PAGE, left_bytes=left + GIB, is_host=is_host)
