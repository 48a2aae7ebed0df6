"""Prompts that overtake the messages which open their sessions, in any way."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.net.control import Opened, Refused
from pals.net.wire import Lane
from pals.types import EngineLimits
from tests.unit.net.virtual_ring import VirtualDriver, VirtualRing, Wires

LIMITS = EngineLimits(max_sessions=4, max_context_tokens=8192, max_chunk_tokens=256)
DELAYS = st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0])


@settings(max_examples=40)
@given(
    opens=st.tuples(DELAYS, DELAYS, DELAYS),
    prompts=st.tuples(DELAYS, DELAYS, DELAYS),
    refusing=st.sampled_from([None, None, 0, 1, 2]),
    tokens=st.integers(1, 1100),
)
def test_a_prompt_that_overtakes_its_session_anywhere_is_answered_or_refused_and_leaves_nothing(
    opens: tuple[float, ...], prompts: tuple[float, ...], refusing: int | None, tokens: int
) -> None:
    """Whichever shard is told of the session before or after its rows are there."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            ring = VirtualRing(
                nursery,
                Wires(nursery, delay_s=0.05, bytes_per_s=12.5e6),
                shards=3,
                step_s=lambda *_: 0.01,
                limits=LIMITS,
                hidden_size=64,
            )
            driver = VirtualDriver("driver", ring)
            senders = [driver.peer, *ring.peers]
            for place, peer in enumerate(ring.peers):
                ring.wires.delays_s[driver.peer, peer, Lane.CONTROL] = opens[place]
                ring.wires.delays_s[senders[place], peer, Lane.PREFILL] = prompts[place]
            if refusing is not None:
                nursery.start_soon(ring.services[refusing].drain)
                await trio.testing.wait_all_tasks_blocked()
            driver.ask(tokens, 5)
            driver.send_prompt(400)
            await trio.sleep(60.0)
            answers = [type(answer) for answer in driver.answers]
            assert answers.count(Refused) == (refusing is not None)
            assert answers.count(Opened) == 3 - answers.count(Refused)
            assert len(driver.arrivals_s) == (5 if refusing is None else 0)
            driver.close()
            await trio.sleep(5.0)
            assert [len(service._early) for service in ring.services] == [0, 0, 0]
            assert [service.sessions for service in ring.services] == [0, 0, 0]
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
