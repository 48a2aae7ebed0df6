from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import trio
import trio.testing

from pals.cli.interrupt import exiting_on_termination, raise_interrupt, run_until_signal
from pals.net.serving import Drain

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


async def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        await trio.testing.wait_all_tasks_blocked()
        signal.raise_signal(number)


async def run_with_signals(
    body: Callable[[], object], *numbers: signal.Signals, drain: Drain | None = None
) -> signal.Signals | None:
    received = []

    async def run() -> None:
        options = {} if drain is None else {"on_signal": drain.request}
        received.append(await run_until_signal(body, **options))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await send(*numbers)
    return received[0]


@pytest.mark.trio
@pytest.mark.parametrize("number", SIGNALS)
async def test_a_signal_cancels_what_cannot_leave_in_order(number: signal.Signals) -> None:
    assert await run_with_signals(trio.sleep_forever, number) is number


@pytest.mark.trio
@pytest.mark.parametrize("number", SIGNALS)
async def test_a_server_is_left_to_leave_in_order(number: signal.Signals) -> None:
    sessions: list[int] = []
    drain = Drain(on_leave=sessions.append)

    async def serve() -> None:
        await drain.wait()
        drain.on_leave(3)

    assert await run_with_signals(serve, number, drain=drain) is number
    assert sessions == [3]


@pytest.mark.trio
async def test_a_second_signal_ends_a_server_that_takes_long_to_leave() -> None:
    drain = Drain()
    left: list[str] = []

    async def serve() -> None:
        await drain.wait()
        left.append("begun")
        await trio.sleep_forever()

    received = await run_with_signals(serve, signal.SIGTERM, signal.SIGINT, drain=drain)
    assert received is signal.SIGTERM
    assert left == ["begun"]


@pytest.mark.trio
async def test_a_server_that_serves_nothing_yet_ends_at_once() -> None:
    drain = Drain()
    assert await run_with_signals(trio.sleep_forever, signal.SIGTERM, drain=drain)
    assert not drain.request()


def test_only_ctrl_c_is_an_interrupt() -> None:
    raise_interrupt(signal.SIGTERM)
    raise_interrupt(None)
    with pytest.raises(KeyboardInterrupt):
        raise_interrupt(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("options", "status"), [((), 0), ((143,), 143)])
def test_a_termination_unwinds_and_exits_with_the_status_of_the_command(
    number: signal.Signals, options: tuple[int, ...], status: int
) -> None:
    before = signal.getsignal(number)

    with pytest.raises(SystemExit) as left, exiting_on_termination(*options):
        signal.raise_signal(number)

    assert left.value.code == status
    assert signal.getsignal(number) is before
