from __future__ import annotations

import pytest

from pals.backend import limiter
from pals.backend.limiter import WINDOW_S, AttemptLimiter, BackendLimiter, RateLimits
from pals.errors import TooManyAttempts
from pals.types import SwarmId


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


def test_address_is_one_whichever_way_it_is_written() -> None:
    attempts = AttemptLimiter(1)
    attempts.check("10.0.0.1", 0)
    with pytest.raises(TooManyAttempts):
        attempts.check("::ffff:10.0.0.1", 0)


def test_redemptions_are_counted_per_address_and_per_swarm() -> None:
    now = 0.0
    limiter = BackendLimiter(RateLimits(redeems=2, redeems_of_swarm=5), clock=lambda: now)
    home, other = SwarmId(b"h" * 32), SwarmId(b"o" * 32)
    for _ in range(2):
        limiter.redeem("10.0.0.1", home)
    for _ in range(10):
        with pytest.raises(TooManyAttempts):
            limiter.redeem("10.0.0.1", home)
    # Who is over the own limit took nothing of the swarm's three.
    for address in ("10.0.0.2", "10.0.0.3", "10.0.0.4"):
        limiter.redeem(address, home)
    with pytest.raises(TooManyAttempts):
        limiter.redeem("10.0.0.5", home)
    limiter.redeem("10.0.0.6", other)
    now = WINDOW_S
    limiter.redeem("10.0.0.1", home)


@pytest.mark.parametrize("kind", ["create_swarm", "write", "read"])
def test_each_kind_of_request_has_its_own_limit(kind: str) -> None:
    limiter = BackendLimiter(RateLimits(swarms=1, writes=1, reads=1), clock=lambda: 0)
    count = getattr(limiter, kind)
    count("10.0.0.1")
    count("10.0.0.2")
    with pytest.raises(TooManyAttempts):
        count("10.0.0.1")


def test_usual_limits_of_redemptions() -> None:
    limits = RateLimits()
    assert (limits.redeems, limits.redeems_of_swarm) == (10, 100)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter, "MAX_ADDRESSES", 10)
    attempts = AttemptLimiter(1)
    for i in range(1000):
        attempts.check(f"address {i}", 0)
    assert len(attempts._windows) == 10
