from __future__ import annotations

import threading
import time

from pals.engine.waking import Wake

WAIT_S = 10.0


def has_slept(wake: Wake, timeout_s: float = 0.01) -> bool:
    """Return whether a sleep lasts until its end."""
    started_s = time.perf_counter()
    wake.sleep(timeout_s)
    return time.perf_counter() - started_s >= timeout_s


def test_ring_after_prepare_ends_the_sleep_to_come() -> None:
    wake = Wake()
    wake.prepare()
    wake.ring()
    assert not has_slept(wake, WAIT_S)


def test_ring_before_prepare_wakes_nobody() -> None:
    wake = Wake()
    wake.ring()
    wake.prepare()
    assert has_slept(wake)


def test_ring_ends_a_sleep_without_end() -> None:
    wake = Wake()
    wake.prepare()
    thread = threading.Thread(target=wake.sleep, args=(float("inf"),), daemon=True)
    thread.start()
    wake.ring()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_ring_that_came_too_late_ends_no_later_sleep() -> None:
    wake = Wake()
    wake.prepare()
    assert has_slept(wake)
    wake.ring()
    wake.prepare()
    assert has_slept(wake)


def test_ring_after_one_that_came_too_late_wakes_as_ever() -> None:
    wake = Wake()
    wake.prepare()
    wake.ring()  # and nobody sleeps
    wake.prepare()
    wake.ring()
    assert not has_slept(wake, WAIT_S)
