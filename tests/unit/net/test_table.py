"""The table of who serves what: newer records replace older ones, the dead stay out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pals.net.announce import Announcement
from pals.net.table import MAX_PEERS, REMEMBERED_S, LiveTable
from pals.types import LayerRange, PeerId
from tests.announcements import make_announcement

NOW = 1_900_000_000.0
A, B = PeerId("a"), PeerId("b")


def announcement(peer: PeerId = A, **changes) -> Announcement:
    return make_announcement(peer, **{"expires_at": NOW + 180} | changes)


def take(table: LiveTable, said: Announcement, *, now: float = NOW) -> bool:
    return table.take(said, f"{said.peer} {said.seq}".encode(), now)


def numbers(table: LiveTable, *, now: float = NOW) -> dict[PeerId, int]:
    return {peer: a.seq for peer, a in table.announcements(now).items()}


def test_a_newer_record_replaces_an_older_one_and_no_other_does() -> None:
    table = LiveTable()
    assert take(table, announcement(seq=5))
    assert not take(table, announcement(seq=5, expires_at=NOW + 200))
    assert not take(table, announcement(seq=4))
    assert take(table, announcement(seq=6))
    assert numbers(table) == {A: 6}


def test_a_peer_has_one_record_whatever_layers_it_serves() -> None:
    table = LiveTable()
    take(table, announcement(seq=1))
    take(table, announcement(seq=2, layers="0:2"))
    assert [a.layers for a in table.announcements(NOW).values()] == [LayerRange(0, 2)]


def test_expired_records_are_not_listed_and_not_handed_on() -> None:
    table = LiveTable()
    take(table, announcement())
    assert numbers(table, now=NOW + 180) == {}
    assert table.get(A, NOW + 180) is None
    assert table.newer_than({}, NOW + 180) == []


def test_an_older_record_that_lives_longer_does_not_come_back_after_the_newer_one() -> None:
    table = LiveTable()
    take(table, announcement(seq=2, expires_at=NOW + 10))
    table.purge(NOW + 20)
    assert not take(table, announcement(seq=1, expires_at=NOW + 300), now=NOW + 20)
    table.purge(NOW + 10 + REMEMBERED_S)
    assert table.known() == {}


def test_who_leaves_is_not_listed_and_its_last_record_is_handed_on() -> None:
    table = LiveTable()
    take(table, announcement(seq=1))
    assert take(table, announcement(seq=2, state="leaving"))
    assert numbers(table) == {}
    assert table.newer_than({A: 1}, NOW) == [b"a 2"]
    assert not take(table, announcement(seq=1))


def test_who_drains_is_listed_as_such() -> None:
    table = LiveTable()
    take(table, announcement(state="draining"))
    assert table.announcements(NOW)[A].state == "draining"


def test_a_dropped_peer_comes_back_with_a_newer_record_alone() -> None:
    table = LiveTable()
    take(table, announcement(seq=3))
    assert table.drop(A, 3)
    assert numbers(table) == {}
    assert not take(table, announcement(seq=3))
    assert table.newer_than({}, NOW) == []
    assert table.known() == {A: 3}
    assert take(table, announcement(seq=4))
    assert numbers(table) == {A: 4}


def test_a_record_newer_than_the_one_in_doubt_is_not_dropped() -> None:
    table = LiveTable()
    take(table, announcement(seq=3))
    assert not table.drop(A, 2)
    assert not table.drop(B, 0)
    assert numbers(table) == {A: 3}


def test_a_dropped_peer_that_is_connected_again_is_listed_again() -> None:
    table = LiveTable()
    take(table, announcement())
    table.drop(A, 1)
    assert table.revive(A)
    assert not table.revive(A)
    assert not table.revive(B)
    assert numbers(table) == {A: 1}


def test_only_records_that_the_asker_lacks_are_handed_on() -> None:
    table = LiveTable()
    take(table, announcement(A, seq=3))
    take(table, announcement(B, seq=3))
    assert table.newer_than({A: 3, B: 2}, NOW) == [b"b 3"]
    assert table.newer_than({A: 9, B: 9}, NOW) == []


def test_a_full_table_takes_a_new_peer_only_in_place_of_one_that_is_not_listed() -> None:
    table = LiveTable()
    for n in range(MAX_PEERS):
        take(table, announcement(PeerId(str(n))))
    assert not take(table, announcement(A))
    assert table.drop(PeerId("7"), 1)
    assert take(table, announcement(A))
    assert len(table.known()) == MAX_PEERS
    assert PeerId("7") not in table.known()
    assert take(table, announcement(PeerId("8"), seq=2))


@given(st.permutations([1, 2, 3, 4, 5]), st.lists(st.integers(1, 5), max_size=6))
def test_the_order_in_which_records_come_does_not_matter(
    order: list[int], again: list[int]
) -> None:
    table = LiveTable()
    for seq in (*order, *again):
        take(table, announcement(seq=seq))
    assert numbers(table) == {A: 5}
