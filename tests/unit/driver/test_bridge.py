from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import trio

from pals.driver import bridge
from pals.driver.bridge import TrioThread, post_to
from pals.errors import NoChain, PeerUnreachable, PortInUse

WAIT_S = 10.0


class Resource:
    """What the trio thread opens here; a test may hold its opening and its closing up."""

    def __init__(self) -> None:
        self.opening, self.closing, self.closed = (threading.Event() for _ in range(3))
        self.may_open, self.may_close = threading.Event(), threading.Event()
        self.may_open.set()
        self.may_close.set()
        self.refusal: Exception | None = None
        self.nursery: trio.Nursery | None = None

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncGenerator[Resource]:
        self.opening.set()
        await trio.to_thread.run_sync(self.may_open.wait, abandon_on_cancel=True)
        if self.refusal is not None:
            raise self.refusal
        try:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                yield self
        finally:
            self.closing.set()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.may_close.wait)
            self.closed.set()

    async def fail(self) -> None:
        await trio.lowlevel.checkpoint()
        raise PortInUse(host="h", port=1, problem="crashed")


class Bench:
    """A trio thread on a `Resource`."""

    def __init__(self) -> None:
        self.resource = Resource()
        self.crashed = threading.Event()
        self.network = TrioThread(self.resource.open, on_crash=self.crashed.set)

    def crash(self) -> None:
        assert self.resource.nursery is not None
        self.network.post(partial(self.resource.nursery.start_soon, self.resource.fail))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.resource.may_open.set()
    made.resource.may_close.set()
    made.network.stop()


@pytest.fixture
def network(bench: Bench) -> TrioThread[Resource]:
    bench.network.start()
    return bench.network


def within_deadline(main: Callable[[], Awaitable[None]]) -> None:
    """Run an async test body on an asyncio loop of its own."""

    async def bounded() -> None:
        async with asyncio.timeout(WAIT_S):
            await main()

    asyncio.run(bounded())


async def occurs(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_S)


# --- start and stop ------------------------------------------------------------------


def test_start_gives_the_open_resource_and_stop_closes_it(bench: Bench) -> None:
    before = set(threading.enumerate())
    assert bench.network.start() is bench.resource
    names = {thread.name for thread in set(threading.enumerate()) - before}
    assert "pals-trio" in names
    bench.network.stop()
    assert bench.resource.closed.is_set()
    assert "pals-trio" not in {t.name for t in set(threading.enumerate()) - before}
    assert bench.network.error is None
    assert not bench.crashed.is_set()


def test_refusal_to_open_is_raised_by_start_as_a_single_error(bench: Bench) -> None:
    refusal = PortInUse(host="h", port=1, problem="taken")
    bench.resource.refusal = ExceptionGroup("outer", [ExceptionGroup("inner", [refusal])])
    with pytest.raises(PortInUse) as caught:
        bench.network.start()
    assert caught.value is refusal
    assert not bench.crashed.is_set()


def test_stop_ends_a_start_that_waits(bench: Bench) -> None:
    bench.resource.may_open.clear()
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(bench.network.start)
        assert bench.resource.opening.wait(WAIT_S)
        bench.network.stop()
        with pytest.raises(PeerUnreachable):
            starting.result(WAIT_S)
    bench.resource.may_open.set()


def test_stop_gives_a_stuck_resource_up_at_its_deadline(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridge, "STOP_DEADLINE_S", 0.01)
    bench.network.start()
    bench.resource.may_close.clear()
    bench.network.stop()
    assert not bench.resource.closed.is_set()
    assert "did not stop within 0.01 s" in caplog.text
    bench.resource.may_close.set()
    assert bench.resource.closed.wait(WAIT_S)


def test_deadline_of_stop_is_short() -> None:
    assert bridge.STOP_DEADLINE_S <= 5


# --- calls ---------------------------------------------------------------------------


def test_call_runs_on_the_trio_thread_and_gives_its_result(network: TrioThread[Resource]) -> None:
    async def where() -> str:
        await trio.lowlevel.checkpoint()
        return threading.current_thread().name

    async def main() -> None:
        assert await network.call(where) == "pals-trio"

    within_deadline(main)


def test_error_of_a_call_reaches_its_caller_alone_and_unwrapped(
    network: TrioThread[Resource],
) -> None:
    error = NoChain(model="m", missing="0:2")

    async def fail() -> None:
        raise ExceptionGroup("outer", [ExceptionGroup("inner", [error])])

    async def main() -> None:
        with pytest.raises(NoChain) as caught:
            await network.call(fail)
        assert caught.value is error
        await network.call(trio.lowlevel.checkpoint)

    within_deadline(main)


def test_several_errors_of_a_call_stay_together(network: TrioThread[Resource]) -> None:
    both = ExceptionGroup("both", [ValueError("a"), ValueError("b")])

    async def fail() -> None:
        raise ExceptionGroup("outer", [both])

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await network.call(fail)
        assert caught.value is both

    within_deadline(main)


def test_cancelled_call_cancels_its_function_and_nothing_else(
    network: TrioThread[Resource],
) -> None:
    entered, cancelled = threading.Event(), threading.Event()

    async def wait() -> None:
        entered.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.set()
            raise

    async def main() -> None:
        call = asyncio.create_task(network.call(wait))
        other = asyncio.create_task(network.call(trio.sleep_forever))
        await occurs(entered)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await occurs(cancelled)
        await network.call(trio.lowlevel.checkpoint)
        assert not other.done()
        other.cancel()

    within_deadline(main)


def test_waiting_call_holds_neither_loop_up(network: TrioThread[Resource]) -> None:
    async def main() -> None:
        waiting = asyncio.create_task(network.call(trio.sleep_forever))
        for _ in range(3):
            await network.call(trio.lowlevel.checkpoint)
        assert not waiting.done()
        waiting.cancel()

    within_deadline(main)


def test_result_that_comes_too_late_is_given_back(network: TrioThread[Resource]) -> None:
    """A cancellation meets the result in every order; none of the results may be lost."""
    kept: list[int] = []
    given_back: list[int] = []

    async def one(number: int) -> None:
        loop, cancel = asyncio.get_running_loop(), asyncio.Event()

        async def finish() -> int:
            loop.call_soon_threadsafe(cancel.set)
            return number

        task = asyncio.ensure_future(network.call(finish, on_lost=given_back.append))
        await cancel.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            kept.append(await task)

    async def main() -> None:
        for number in range(200):
            await one(number)
        # The first comes back behind the last result, the second behind its giving back.
        for _ in range(2):
            await network.call(trio.lowlevel.checkpoint)

    asyncio.run(main())
    assert sorted(kept + given_back) == list(range(200))
    assert given_back


def test_call_that_outlives_its_asyncio_loop_harms_nobody(
    network: TrioThread[Resource], bench: Bench
) -> None:
    entered, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    async def finish_late() -> None:
        entered.set()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(may_end.wait)
        ended.set()

    async def abandon() -> None:
        task = asyncio.create_task(network.call(finish_late))
        await occurs(entered)
        task.cancel()

    async def main() -> None:
        await network.call(trio.lowlevel.checkpoint)

    within_deadline(abandon)
    may_end.set()
    assert ended.wait(WAIT_S)
    within_deadline(main)
    assert not bench.crashed.is_set()


# --- calls against an end ------------------------------------------------------------


def test_running_call_is_told_when_the_network_stops(network: TrioThread[Resource]) -> None:
    entered = threading.Event()

    async def wait() -> None:
        entered.set()
        await trio.sleep_forever()

    async def main() -> None:
        call = asyncio.create_task(network.call(wait))
        await occurs(entered)
        await asyncio.to_thread(network.stop)
        with pytest.raises(PeerUnreachable):
            await call

    within_deadline(main)


def test_running_call_is_told_when_the_network_crashes(
    bench: Bench, network: TrioThread[Resource], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        call = asyncio.create_task(network.call(trio.sleep_forever))
        await network.call(trio.lowlevel.checkpoint)
        bench.crash()
        with pytest.raises(PeerUnreachable):
            await call
        await occurs(bench.crashed)

    within_deadline(main)
    assert isinstance(network.error, BaseException)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_call_while_the_network_closes_is_refused_and_does_not_disturb_it(
    bench: Bench, network: TrioThread[Resource]
) -> None:
    bench.resource.may_close.clear()

    async def main() -> None:
        stopping = asyncio.create_task(asyncio.to_thread(network.stop))
        await occurs(bench.resource.closing)
        with pytest.raises(PeerUnreachable):
            await network.call(trio.lowlevel.checkpoint)
        bench.resource.may_close.set()
        await stopping

    within_deadline(main)
    assert bench.resource.closed.is_set()
    assert network.error is None


def test_call_and_post_after_the_end(network: TrioThread[Resource]) -> None:
    network.stop()

    async def main() -> None:
        with pytest.raises(PeerUnreachable):
            await network.call(trio.lowlevel.checkpoint)

    within_deadline(main)
    posted: list[int] = []
    network.post(lambda: posted.append(1))
    assert posted == []


def test_call_before_the_start_is_refused(bench: Bench) -> None:
    async def main() -> None:
        with pytest.raises(PeerUnreachable):
            await bench.network.call(trio.lowlevel.checkpoint)

    within_deadline(main)
    bench.network.start()


# --- posting -------------------------------------------------------------------------


def test_posted_functions_run_in_order_on_the_trio_thread(network: TrioThread[Resource]) -> None:
    ran: list[tuple[int, str]] = []
    for number in range(3):
        network.post(lambda n=number: ran.append((n, threading.current_thread().name)))

    async def main() -> None:
        await network.call(trio.lowlevel.checkpoint)

    within_deadline(main)
    assert ran == [(0, "pals-trio"), (1, "pals-trio"), (2, "pals-trio")]


def test_post_to_a_closed_loop_is_dropped() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    posted: list[int] = []
    post_to(loop, lambda: posted.append(1))
    assert posted == []
