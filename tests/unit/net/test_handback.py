from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import trio

from pals.engine.batch import Preempted
from pals.engine.work import Delivery, OwnedEvent
from pals.net.handback import Deliveries
from pals.types import SessionId

pytestmark = pytest.mark.trio

COUNT = 20_000
"""More than the wakes that a socket holds unread."""


def make_delivery(number: int) -> Delivery:
    event = OwnedEvent(number, Preempted(SessionId(bytes(16))))
    return Delivery(events=(event,), result=None)


def number_of(delivery: Delivery) -> int:
    (event,) = delivery.events
    assert isinstance(event.owner, int)
    return event.owner


@pytest.fixture
def deliveries() -> Iterator[Deliveries]:
    made = Deliveries()
    yield made
    made.close()


async def test_deliveries_of_another_thread_come_in_order_and_none_is_left(
    deliveries: Deliveries,
) -> None:
    taken: list[int] = []
    done = trio.Event()

    def take(delivery: Delivery) -> None:
        taken.append(number_of(delivery))
        if len(taken) == COUNT:
            done.set()

    def deliver_all() -> None:
        for number in range(COUNT):
            deliveries.deliver(make_delivery(number))

    thread = threading.Thread(target=deliver_all)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deliveries.run, take)
            thread.start()
            await done.wait()
            nursery.cancel_scope.cancel()
    thread.join()
    assert taken == list(range(COUNT))


async def test_deliveries_that_wait_before_anybody_takes_them_all_come(
    deliveries: Deliveries,
) -> None:
    for number in range(COUNT):
        deliveries.deliver(make_delivery(number))
    taken: list[int] = []
    with trio.move_on_after(0.2):
        await deliveries.run(lambda delivery: taken.append(number_of(delivery)))
    assert taken == list(range(COUNT))


async def test_a_delivery_that_comes_after_the_end_goes_nowhere(deliveries: Deliveries) -> None:
    deliveries.close()
    deliveries.deliver(make_delivery(1))
