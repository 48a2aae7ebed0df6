from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import pytest
from litestar.types import HTTPReceiveMessage, Message, Receive, Scope, Send

from pals.api.admission import Admission, Admitting, Standing
from pals.api.clients import Client, note_client
from pals.api.waiting_line import LineLimits
from pals.errors import EndpointLeaving, RateLimitExceeded

ONE = LineLimits(running=1, waiting=1)
DEADLINE_S = 10


class Visit:
    """One request to an `Admitting` whose application answers when it is let go."""

    def __init__(self, path: str = "/v1/x", *, method: str = "POST", key: str = "a") -> None:
        self.scope = cast(
            "Scope", {"type": "http", "method": method, "path": path, "state": dict[str, Any]()}
        )
        note_client(self.scope, Client(key=key))
        self.works = asyncio.Event()
        self.may_end = asyncio.Event()
        self.gone = asyncio.Event()
        self.sent: list[Message] = []
        self.body = b""
        self._is_read = False

    async def receive(self) -> HTTPReceiveMessage:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": b"question", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return cast("dict[str, int]", self.sent[0])["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(cast("dict[str, Any]", self.sent[0])["headers"])


class House:
    """An endpoint, and the visits that it has had."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.visits: dict[int, Visit] = {}
        self._app = Admitting(self._work, admission)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = self.visits[id(scope)]
        visit.body = cast("dict[str, bytes]", await receive())["body"]
        visit.works.set()
        await visit.may_end.wait()
        if visit.body == b"fails":
            raise RuntimeError
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def begin(self, visit: Visit) -> asyncio.Task[None]:
        self.visits[id(visit.scope)] = visit
        return asyncio.ensure_future(
            cast("Awaitable[None]", self._app(visit.scope, visit.receive, visit.send))  # type: ignore[arg-type]
        )

    async def until(self, **standing: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.admission.standing() != Standing(**standing):  # noqa: ASYNC110 # no event
                await asyncio.sleep(0)


def play(scene: Callable[[House], Awaitable[None]], admission: Admission) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scene(House(admission))
        assert admission.standing() == Standing(running=0, waiting=0)

    asyncio.run(main())


def test_a_request_waits_until_another_has_ended_and_keeps_its_body() -> None:
    async def scene(house: House) -> None:
        first, second = Visit(), Visit()
        running = house.begin(first)
        await first.works.wait()
        waiting = house.begin(second)
        await house.until(running=1, waiting=1)
        assert not second.works.is_set()

        first.may_end.set()
        second.may_end.set()
        await asyncio.gather(running, waiting)

        assert (first.status, second.status) == (200, 200)
        assert second.body == b"question"

    play(scene, Admission(ONE))


def test_one_too_many_is_told_when_to_come_again() -> None:
    async def scene(house: House) -> None:
        running, waiting, refused = Visit(), Visit(), Visit()
        tasks = [house.begin(running), house.begin(waiting)]
        await house.until(running=1, waiting=1)

        await house.begin(refused)

        assert refused.status == 429
        assert int(refused.headers[b"retry-after"]) >= 1
        error = msgspec.json.decode(cast("dict[str, bytes]", refused.sent[1])["body"])["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        running.may_end.set()
        waiting.may_end.set()
        await asyncio.gather(*tasks)

    play(scene, Admission(ONE))


def test_a_client_that_goes_away_while_it_waits_loses_its_place_unseen() -> None:
    async def scene(house: House) -> None:
        running, waiting = Visit(), Visit()
        first = house.begin(running)
        second = house.begin(waiting)
        await house.until(running=1, waiting=1)

        waiting.gone.set()
        await second

        await house.until(running=1, waiting=0)
        assert (waiting.sent, waiting.works.is_set()) == ([], False)
        running.may_end.set()
        await first

    play(scene, Admission(ONE))


@pytest.mark.parametrize("waits", [False, True])
def test_a_cancelled_request_gives_its_place_back(waits: bool) -> None:
    async def scene(house: House) -> None:
        running, waiting = Visit(), Visit()
        tasks = [house.begin(running), house.begin(waiting)]
        await house.until(running=1, waiting=1)
        running.may_end.set()
        waiting.may_end.set()

        tasks[waits].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

        assert (waiting if not waits else running).status == 200

    play(scene, Admission(ONE))


def test_a_failing_request_gives_its_place_back() -> None:
    async def scene(house: House) -> None:
        visit = Visit()
        task = house.begin(visit)
        await visit.works.wait()
        visit.body = b"fails"
        visit.may_end.set()
        with pytest.raises(RuntimeError):
            await task

    play(scene, Admission(ONE))


def test_nobody_waits_longer_than_the_deadline() -> None:
    async def scene(house: House) -> None:
        running, waiting = Visit(), Visit()
        task = house.begin(running)
        await running.works.wait()

        await house.begin(waiting)

        assert waiting.status == 429
        running.may_end.set()
        await task

    play(scene, Admission(ONE, wait_s=0.01))


def test_a_hog_loses_its_newest_place_to_another_client() -> None:
    async def scene(house: House) -> None:
        hog = [Visit(key="hog") for _ in range(3)]
        other = Visit(key="other")
        tasks = [house.begin(visit) for visit in hog]
        await house.until(running=1, waiting=2)

        tasks.append(house.begin(other))
        await tasks[2]
        assert hog[2].status == 429
        hog[0].may_end.set()
        await other.works.wait()

        assert not hog[1].works.is_set()
        for visit in (hog[1], other):
            visit.may_end.set()
        await asyncio.gather(*tasks)

    play(scene, Admission(LineLimits(running=1, waiting=2)))


def test_leaving_refuses_who_waits_and_who_comes_and_lets_the_rest_end() -> None:
    async def scene(house: House) -> None:
        running, waiting, late = Visit(), Visit(), Visit()
        tasks = [house.begin(running), house.begin(waiting)]
        await house.until(running=1, waiting=1)

        house.admission.leave()
        await tasks[1]
        await house.begin(late)

        assert (waiting.status, late.status) == (503, 503)
        assert b"retry-after" in late.headers
        running.may_end.set()
        await tasks[0]
        assert running.status == 200

    play(scene, Admission(ONE))


@pytest.mark.parametrize("path", ["//v1/x", "/%2fv1/x", "/V1/x", "/v1", "/health"])
def test_no_spelling_of_a_path_gets_a_post_past_the_line(path: str) -> None:
    async def scene(house: House) -> None:
        running, refused = Visit(), Visit(path)
        task = house.begin(running)
        await running.works.wait()

        await house.begin(refused)

        assert refused.status == 429
        running.may_end.set()
        await task

    play(scene, Admission(LineLimits(running=1, waiting=0)))


def test_what_only_reads_needs_no_place() -> None:
    async def scene(house: House) -> None:
        running, other = Visit(), Visit("/v1/models", method="GET")
        tasks = [house.begin(running), house.begin(other)]
        async with asyncio.timeout(DEADLINE_S):
            await other.works.wait()
        assert house.admission.standing() == Standing(running=1, waiting=0)
        running.may_end.set()
        other.may_end.set()
        await asyncio.gather(*tasks)

    play(scene, Admission(LineLimits(running=1, waiting=0)))


def test_the_same_can_be_asked_of_an_admission_itself() -> None:
    async def main() -> None:
        admission = Admission(LineLimits(running=1, waiting=0))
        place = admission.start("a")
        assert place.runs
        with pytest.raises(RateLimitExceeded):
            admission.start("b")
        admission.end(place)
        admission.end(place)
        assert admission.start("b").runs
        admission.leave()
        with pytest.raises(EndpointLeaving):
            admission.start("c")

    asyncio.run(main())
