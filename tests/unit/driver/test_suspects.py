from __future__ import annotations

from dataclasses import replace

from pals.driver.suspects import FAILED_FOR_S, MAX_FAILED_FOR_S, Suspects
from pals.net.announce import Announcement
from pals.types import PeerId
from tests.announcements import make_announcement

A, B = PeerId("a"), PeerId("b")
NOW = 50.0
LATER = NOW + MAX_FAILED_FOR_S + 1


def announcement(peer: PeerId = A, seq: int = 5) -> Announcement:
    return make_announcement(peer, seq=seq)


def test_nobody_is_suspected_without_a_reason() -> None:
    suspects = Suspects()
    suspects.mark_failed(A, seq=5, now=NOW)
    assert suspects.failures(announcement(B), NOW) == 0


def test_time_alone_clears_nobody() -> None:
    suspects = Suspects()
    suspects.mark_failed(A, seq=5, now=NOW)
    assert suspects.failures(announcement(seq=5), LATER) == 1


def test_a_newer_announcement_clears_a_peer_after_its_pause() -> None:
    suspects = Suspects()
    suspects.mark_failed(A, seq=5, now=NOW)
    assert suspects.failures(announcement(seq=6), NOW + FAILED_FOR_S - 1) == 1
    assert suspects.failures(announcement(seq=6), NOW + FAILED_FOR_S) == 0


def test_each_failure_makes_the_pause_longer_up_to_its_limit() -> None:
    suspects = Suspects()
    for count in range(1, 100):
        suspects.mark_failed(A, seq=5, now=NOW)
        pause_s = min(FAILED_FOR_S * 2.0 ** (count - 1), MAX_FAILED_FOR_S)
        assert suspects.failures(announcement(seq=6), NOW + pause_s - 0.1) == count
        assert suspects.failures(announcement(seq=6), NOW + pause_s) == 0


def test_an_answer_clears_a_peer_at_once() -> None:
    suspects = Suspects()
    suspects.mark_failed(A, seq=5, now=NOW)
    suspects.mark_failed(B, seq=5, now=NOW)
    suspects.mark_good({A})
    assert suspects.failures(announcement(A), NOW) == 0
    assert suspects.failures(announcement(B), NOW) == 1


def test_a_leaving_peer_is_back_with_its_next_announcement() -> None:
    suspects = Suspects()
    suspects.mark_leaving(A, seq=5)
    suspects.mark_good({A})
    assert suspects.is_leaving(announcement(seq=5))
    assert suspects.is_leaving(replace(announcement(), seq=4))
    assert not suspects.is_leaving(announcement(seq=6))
    assert not suspects.is_leaving(announcement(B))
