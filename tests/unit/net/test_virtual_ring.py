"""What flows round a ring, and what waits, in virtual time."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from benchmarks.makespan import ideal_makespan_s
from pals.engine.batch import Step
from pals.errors import InvalidFrame
from pals.net.control import Failed
from pals.net.flow import SAMPLED_WINDOW_TOKENS, window_bytes
from pals.net.wire import Row, hidden_shape
from pals.types import EngineLimits, PeerId
from tests.unit.net.virtual_ring import VirtualDriver, VirtualRing, Wires

pytestmark = pytest.mark.trio

LIMITS = EngineLimits(max_sessions=4, max_context_tokens=8192, max_chunk_tokens=256)
HIDDEN_SIZE = 512
DELAY_S = 0.05
BYTES_PER_S = 12.5e6
DECODE_S = 0.010


def step_s(place: int, step: Step) -> float:
    """Later shards are slower, and later chunks too."""
    if step.chunk is None:
        return DECODE_S
    return (0.4 + 0.1 * place) * step.chunk.tokens / 256 + step.chunk.position * 1e-5


def make_ring(nursery: trio.Nursery, *, seconds=step_s, hidden_size: int = HIDDEN_SIZE):
    wires = Wires(nursery, delay_s=DELAY_S, bytes_per_s=BYTES_PER_S)
    return VirtualRing(
        nursery, wires, shards=3, step_s=seconds, limits=LIMITS, hidden_size=hidden_size
    )


@pytest.mark.parametrize("row_tokens", [512, 256])
async def test_a_chunk_computes_while_the_one_before_it_travels(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, row_tokens: int
) -> None:
    ring = make_ring(nursery)
    driver = VirtualDriver("driver", ring)
    await driver.open(2048, 1)
    started_s = trio.current_time()
    driver.send_prompt(row_tokens)
    await driver.finish()
    took_s = driver.arrivals_s[0] - started_s
    nursery.cancel_scope.cancel()

    starts = range(0, 2048, 256)
    compute_s = [
        [0.4 + 0.1 * place + start * 1e-5 for start in starts] for place in range(len(ring.peers))
    ]
    chunk_bytes = 256 * 4 * HIDDEN_SIZE
    ideal_s = ideal_makespan_s(compute_s, [chunk_bytes] * 8, bytes_per_s=BYTES_PER_S)
    ideal_s += 4 * DELAY_S
    assert ideal_s <= took_s <= ideal_s + 0.001
    assert took_s < 0.7 * sum(map(sum, compute_s))


async def test_decode_goes_round_in_steps_and_delays_alone(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    ring = make_ring(nursery)
    driver = VirtualDriver("driver", ring)
    await driver.open(16, 200)
    driver.send_prompt(16)
    await driver.finish()
    nursery.cancel_scope.cancel()

    turn_s = (driver.arrivals_s[-1] - driver.arrivals_s[0]) / 199
    assert turn_s == pytest.approx(3 * (DECODE_S + DELAY_S), rel=0.01)


async def test_a_driver_that_takes_nothing_stops_its_own_session_and_no_other(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    ring = make_ring(nursery)
    healthy = VirtualDriver("healthy", ring)
    stopped = VirtualDriver("stopped", ring, acknowledges=False)
    for driver in (stopped, healthy):
        await driver.open(16, 500)
        driver.send_prompt(16)
    await healthy.finish()
    came = len(stopped.arrivals_s)
    turn_s = (healthy.arrivals_s[-1] - healthy.arrivals_s[0]) / 499
    stopped.acknowledge()
    await trio.sleep(1.0)
    nursery.cancel_scope.cancel()

    assert came == SAMPLED_WINDOW_TOKENS + 2  # the window, the one held, and a prompt's first
    assert turn_s < 3 * (2 * DECODE_S + DELAY_S)
    assert len(stopped.arrivals_s) > came


async def test_a_session_that_is_closed_while_its_driver_lags_frees_its_room(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    ring = make_ring(nursery)
    stopped = VirtualDriver("stopped", ring, acknowledges=False)
    await stopped.open(16, 500)
    stopped.send_prompt(16)
    await trio.sleep(60.0)
    assert all(s.sessions == 1 for s in ring.services)
    stopped.close()
    await trio.sleep(1.0)
    stopped.acknowledge()
    await trio.sleep(1.0)
    nursery.cancel_scope.cancel()

    assert all(s.sessions == 0 for s in ring.services)
    assert all(s.free_tokens == LIMITS.max_sessions * 8192 for s in ring.services)


async def test_nobody_but_the_driver_says_what_it_has_taken(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    ring = make_ring(nursery)
    stopped = VirtualDriver("stopped", ring, acknowledges=False)
    await stopped.open(16, 500)
    stopped.send_prompt(16)
    await trio.sleep(60.0)
    came = len(stopped.arrivals_s)
    for other in (PeerId("stranger"), ring.peers[0], ring.peers[1]):
        stopped.acknowledge(other)
    await trio.sleep(1.0)
    nursery.cancel_scope.cancel()

    assert len(stopped.arrivals_s) == came


async def test_a_shard_that_ignores_the_window_ends_the_session_and_no_other(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    ring = make_ring(nursery, hidden_size=4096)
    flooded, healthy = VirtualDriver("flooded", ring), VirtualDriver("healthy", ring)
    for driver in (flooded, healthy):
        await driver.open(4096, 2)
    for start in range(0, 4096, 512):
        flooded.send_chunk(1, ring.peers[0], Row(flooded.session, start, 512))
    healthy.send_prompt(512)
    await healthy.finish()
    nursery.cancel_scope.cancel()

    (failed,) = (answer for answer in flooded.answers if isinstance(answer, Failed))
    assert failed.code == InvalidFrame.code
    assert "ahead" in failed.problem


async def test_a_prompt_keeps_no_more_than_a_window_before_a_slow_shard(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """The head would else compute all of it, and the slow shard hold it in memory."""

    def seconds(place: int, step: Step) -> float:
        return 2.0 if place == 1 and step.chunk is not None else DECODE_S

    ring = make_ring(nursery, seconds=seconds, hidden_size=4096)
    window = window_bytes(hidden_shape(ring.model.manifest, 1, "f32", 4096))
    driver = VirtualDriver("driver", ring)
    await driver.open(8192 - 4, 2)
    driver.send_prompt(512)
    await driver.finish()
    nursery.cancel_scope.cancel()

    assert 0 < ring.wires.most_bytes[ring.peers[0], ring.peers[1]] <= window
    assert ring.computes[1].most_queued_bytes <= window
    assert ring.computes[0].most_queued_bytes <= window // 4096


# --- a prompt right behind its session -----------------------------------------------


async def test_the_first_token_takes_no_round_trip_to_open_its_session(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    ring = make_ring(nursery)
    driver = VirtualDriver("driver", ring)
    started_s = trio.current_time()
    driver.ask(256, 1)
    driver.send_prompt(256)
    await driver.finish()
    took_s = driver.arrivals_s[0] - started_s
    nursery.cancel_scope.cancel()

    compute_s = sum(0.4 + 0.1 * place for place in range(3))
    wire_s = (4 * 256 + 2 * 256 * 4 * HIDDEN_SIZE) / BYTES_PER_S
    assert took_s == pytest.approx(4 * DELAY_S + compute_s + wire_s, abs=0.001)
