from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from pals.driver.interface import Completion, Delta
from pals.driver.merged import AT_ONCE, start_all
from pals.errors import NoChain
from tests.fakes import FakeCompletion
from tests.unit.driver.local_world import run, text_of


class Starts:
    """Starts completions, each of which gives its number as its text."""

    def __init__(self, count: int, *, n: int = 1, failing: int = -1) -> None:
        self.made: list[FakeCompletion] = []
        self.running = self.most = 0
        self._failing = failing
        self.all = [self._start(index, n) for index in range(count)]

    def _start(self, index: int, n: int) -> Callable[[], asyncio.Future[Completion]]:
        async def start() -> Completion:
            if index == self._failing:
                raise NoChain(model="m", missing="0:2")
            self.running += 1
            self.most = max(self.most, self.running)
            completion = FakeCompletion([str(index)], n=n, end="stop", on_close=lambda: None)
            self.made.append(completion)
            return Counted(completion, self)

        return start


class Counted:
    """A completion that says when it is over."""

    def __init__(self, inner: FakeCompletion, starts: Starts) -> None:
        self._inner = inner
        self._starts = starts

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def __aiter__(self):
        async for delta in self._inner:
            await asyncio.sleep(0)
            yield delta
        self._starts.running -= 1


def test_answers_to_all_prompts_have_choices_of_their_own() -> None:
    starts = Starts(3, n=2)
    deltas: list[Delta] = []

    async def main() -> None:
        merged = await start_all(starts.all, n=2)
        deltas.extend([delta async for delta in merged])
        assert merged.prompt_tokens == 3 * 7
        assert merged.cached_tokens == 3 * 4
        assert merged.completion_tokens == 3
        assert merged.reasoning_tokens == 0
        assert merged.route == starts.made[0].route
        assert merged.timings() == starts.made[0].timings()

    run(main)
    texts = {(d.choice, text_of(d)) for d in deltas if d.pieces}
    assert texts == {(0, "0"), (1, "0"), (2, "1"), (3, "1"), (4, "2"), (5, "2")}
    assert sorted(d.choice for d in deltas if d.finish_reason) == [0, 1, 2, 3, 4, 5]
    assert all(completion.closed.is_set() for completion in starts.made)


def test_few_prompts_are_answered_at_one_time() -> None:
    starts = Starts(3 * AT_ONCE)

    async def main() -> None:
        assert len([d async for d in await start_all(starts.all, n=1) if d.finish_reason]) == 24

    run(main)
    assert starts.most == AT_ONCE


def test_a_prompt_that_fails_ends_all_and_closes_them() -> None:
    starts = Starts(5, failing=2)

    async def main() -> None:
        with pytest.raises(NoChain):
            [delta async for delta in await start_all(starts.all, n=1)]

    run(main)
    assert len(starts.made) == 4
    assert all(completion.closed.is_set() for completion in starts.made)


def test_a_first_prompt_that_fails_is_no_answer_at_all() -> None:
    async def main() -> None:
        with pytest.raises(NoChain):
            await start_all(Starts(2, failing=0).all, n=1)

    run(main)


def test_one_that_is_never_read_is_closed() -> None:
    starts = Starts(3)

    async def main() -> None:
        await (await start_all(starts.all, n=1)).aclose()

    run(main)
    assert [completion.closed.is_set() for completion in starts.made] == [True]
