from __future__ import annotations

import pytest

from pals.backend import limiter
from pals.backend.limiter import WINDOW_S, AttemptLimiter
from pals.errors import TooManyAttempts


def test_attempts_are_counted_per_address_and_minute() -> None:
    attempts = AttemptLimiter(2)
    for address in ("10.0.0.1", "10.0.0.2"):
        attempts.check(address, 0)
        attempts.check(address, 1)
        with pytest.raises(TooManyAttempts) as caught:
            attempts.check(address, WINDOW_S - 1)
        assert caught.value.fields["limit"] == 2
        attempts.check(address, WINDOW_S)


def test_addresses_of_one_ipv6_network_count_together() -> None:
    attempts = AttemptLimiter(1)
    attempts.check("2001:db8::1", 0)
    with pytest.raises(TooManyAttempts):
        attempts.check("2001:db8::ffff:2", 0)
    attempts.check("2001:db8:0:1::1", 0)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter, "MAX_ADDRESSES", 10)
    attempts = AttemptLimiter(1)
    for i in range(1000):
        attempts.check(f"address {i}", 0)
    assert len(attempts._windows) == 10
