from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.driver.answers import AnswerReader, Reading
from pals.driver.interface import Completion, Delta, GenerateParams, HopReport, Message
from pals.driver.local import LocalDriver
from pals.driver.routes import ServedModel
from pals.driver.state import SampledToken, SessionRequest, Sink
from pals.errors import NoChain, ShardLost
from pals.text.answers.format import PlainParser
from pals.text.answers.pieces import Content
from pals.text.tokenizer import Tokenizer
from pals.types import Sampling
from tests.unit.text.tokenizers_for_tests import save_byte_level

WAIT_S = 10.0
MODEL = ServedModel(
    model_id="test/tiny",
    manifest=bytes(32),
    num_layers=4,
    max_position_embeddings=64,
    hidden_size=8,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = save_byte_level(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.load(folder)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def eos_of(tokenizer: Tokenizer) -> int:
    [eos] = tokenizer.eos_token_ids
    return eos


# --- text of a stream ----------------------------------------------------------------


def play(
    tokenizer: Tokenizer, tokens: Sequence[int], *stops: str, last: int | None = None
) -> list[Delta]:
    """Push tokens until a delta is the last one; ``last`` is where the tail stops itself."""
    reading = Reading(tokenizer=tokenizer, end_tokens=frozenset([eos_of(tokenizer)]), stop=stops)
    reader = AnswerReader(0, reading, PlainParser())
    deltas: list[Delta] = []
    for index, token in enumerate(tokens):
        deltas.append(reader.push(SampledToken(token, index == last)))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def text_of(delta: Delta) -> str:
    return "".join(piece.text for piece in delta.pieces if isinstance(piece, Content))


def joined(deltas: Sequence[Delta]) -> tuple[str, str | None]:
    return "".join(map(text_of, deltas)), deltas[-1].finish_reason


def test_each_token_gives_its_text_at_once(tokenizer: Tokenizer) -> None:
    tokens = ids_of(tokenizer, "hey")
    assert play(tokenizer, tokens) == [
        Delta(pieces=(Content("h"),)),
        Delta(pieces=(Content("e"),)),
        Delta(pieces=(Content("y"),)),
    ]


def test_end_token_ends_the_text_and_is_not_shown(tokenizer: Tokenizer) -> None:
    tokens = [*ids_of(tokenizer, "hey"), eos_of(tokenizer)]
    for last in (None, 3):
        deltas = play(tokenizer, tokens, last=last)
        assert joined(deltas) == ("hey", "stop")
        assert text_of(deltas[-1]) == ""


def test_last_token_of_another_kind_ends_the_text_by_length(tokenizer: Tokenizer) -> None:
    assert joined(play(tokenizer, ids_of(tokenizer, "hey"), last=2)) == ("hey", "length")


def test_stop_string_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    tokens = ids_of(tokenizer, "so END more")
    deltas = play(tokenizer, tokens, "END")
    assert joined(deltas) == ("so ", "stop")
    assert len(deltas) == 6


def test_stop_string_on_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    assert joined(play(tokenizer, ids_of(tokenizer, "so END"), "END", last=5)) == ("so ", "stop")


@pytest.mark.parametrize("ends_by", ["length", "stop"])
def test_beginning_of_a_stop_string_at_the_end_is_shown(tokenizer: Tokenizer, ends_by: str) -> None:
    tokens = ids_of(tokenizer, "so EN")
    if ends_by == "stop":
        tokens.append(eos_of(tokenizer))
    assert joined(play(tokenizer, tokens, "END", last=len(tokens) - 1)) == ("so EN", ends_by)


def test_character_that_the_end_cuts_is_shown_as_a_replacement(tokenizer: Tokenizer) -> None:
    tokens = ids_of(tokenizer, "a€")[:-1]
    assert joined(play(tokenizer, tokens, last=len(tokens) - 1)) == ("a\ufffd", "length")
    assert joined(play(tokenizer, tokens, "\ufffd", last=len(tokens) - 1)) == ("a", "stop")
    assert joined(play(tokenizer, [*tokens, eos_of(tokenizer)], "\ufffd")) == ("a", "stop")


@given(st.data())
def test_text_is_that_of_all_tokens_up_to_the_first_stop(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    letters = ids_of(tokenizer, "ab€")
    tokens = data.draw(st.lists(st.sampled_from(letters), min_size=1, max_size=12))
    stops = data.draw(st.lists(st.text("ab€\ufffd", min_size=1, max_size=3), max_size=2))
    ends_by_token = data.draw(st.booleans())
    text, reason = tokenizer.decode(tokens), "stop" if ends_by_token else "length"
    for end in range(1, len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            text, reason = text[: end - max(map(len, ending))], "stop"
            break
    stream = [*tokens, eos_of(tokenizer)] if ends_by_token else tokens
    deltas = play(tokenizer, stream, *stops, last=len(stream) - 1)
    assert joined(deltas) == (text, reason)
    assert all(delta.finish_reason is None for delta in deltas[:-1])


# --- completions ---------------------------------------------------------------------


class FakeNetwork:
    """Runs on the asyncio loop what would run on the trio thread."""

    def post(self, function: Callable[[], object]) -> None:
        function()

    async def call(
        self, function: Callable[[], Awaitable[Any]], *, on_lost: Callable[[Any], object] = id
    ) -> Any:
        del on_lost
        return await function()


class FakeClient:
    """Opens sessions that say what a test puts into their sinks."""

    def __init__(self) -> None:
        self.requests: list[SessionRequest] = []
        self.sinks: list[Sink] = []
        self.closed: list[object] = []
        self.refusal: Exception | None = None
        hops = [SimpleNamespace(peer=f"peer-{i}-abcdefgh", layers=f"{i}:{i + 1}") for i in (1, 2)]
        self.session = SimpleNamespace(
            chain=SimpleNamespace(hops=hops), attempt=SimpleNamespace(start=2)
        )

    async def open(self, request: SessionRequest, sink: Sink) -> object:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        self.sinks.append(sink)
        return self.session

    def close(self, session: object) -> None:
        self.closed.append(session)

    async def report(self) -> list[HopReport]:
        return []


class FakeTemplate:
    """Joins the contents of the messages."""

    def render(self, messages: Sequence[dict[str, str]], *, tools: object) -> str:
        del tools
        return "".join(message["content"] for message in messages)


class Bench:
    """A driver on a fake network."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.client = FakeClient()

    def driver(self) -> LocalDriver:
        network: Any = FakeNetwork()
        client: Any = self.client
        template: Any = FakeTemplate()
        return LocalDriver(
            network,
            client,
            MODEL,
            self.tokenizer,
            template,
            eos_token_ids=[eos_of(self.tokenizer), 3],
        )

    async def chat(self, text: str = "hey", **params: Any) -> Completion:
        messages = [Message(role="user", content=text)]
        return await self.driver().chat(messages, GenerateParams(**params))

    def say(self, *tokens: int, last: bool = False) -> None:
        """Let the tail sample tokens; with ``last`` it stops after them."""
        for index, token in enumerate(tokens, start=1):
            self.client.sinks[-1](SampledToken(token, last and index == len(tokens)))


@pytest.fixture
def bench(tokenizer: Tokenizer) -> Bench:
    return Bench(tokenizer)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(WAIT_S):
            await main()

    asyncio.run(bounded())


async def collect(
    completion: Completion, shown: list[Delta] | None = None
) -> tuple[str, str | None]:
    """Read a completion to its end; ``shown`` also has what came before an error."""
    deltas = [] if shown is None else shown
    async for delta in completion:
        deltas.append(delta)  # a comprehension would lose what came before an error
    return joined(deltas)


def test_request_says_what_the_caller_asked_for(bench: Bench, tokenizer: Tokenizer) -> None:
    async def main() -> None:
        completion = await bench.chat(
            "hey", max_tokens=5, temperature=0.5, top_p=0.9, seed=2**64 + 7
        )
        assert completion.prompt_tokens == 3
        assert completion.route == ("abcdefgh[1:2]", "abcdefgh[2:3]")

    run(main)
    assert bench.client.requests == [
        SessionRequest(
            prompt=tuple(ids_of(tokenizer, "hey")),
            max_new_tokens=5,
            stop_token_ids=tuple(sorted([3, eos_of(tokenizer)])),
            sampling=Sampling(temperature=0.5, top_p=0.9, seed=7),
        )
    ]


def test_driver_says_what_it_serves_and_since_when(bench: Bench) -> None:
    driver = bench.driver()
    assert driver.model_id == "test/tiny"
    assert abs(driver.created - time.time()) < 60


def test_seed_that_is_not_given_is_drawn_each_time(bench: Bench) -> None:
    async def main() -> None:
        for _ in range(3):
            await bench.chat()

    run(main)
    seeds = {request.sampling.seed for request in bench.client.requests}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_refusal_to_open_reaches_the_caller(bench: Bench) -> None:
    bench.client.refusal = NoChain(model="m", missing="0:2")

    async def main() -> None:
        with pytest.raises(NoChain):
            await bench.chat()

    run(main)


def test_completion_gives_text_counts_tokens_and_closes_its_session(
    bench: Bench, tokenizer: Tokenizer
) -> None:
    async def main() -> None:
        completion = await bench.chat(stop=("END",))
        assert completion.completion_tokens == 0
        bench.say(*ids_of(tokenizer, "ok END never"))
        assert await collect(completion) == ("ok ", "stop")
        assert completion.completion_tokens == 6

    run(main)
    assert bench.client.closed == [bench.client.session]


@pytest.mark.parametrize(("end", "reason"), [(3, "stop"), (None, "length")])
def test_completion_ends_where_the_tail_stops(
    bench: Bench, tokenizer: Tokenizer, end: int | None, reason: str
) -> None:
    async def main() -> None:
        completion = await bench.chat()
        bench.say(*ids_of(tokenizer, "ok"), *([] if end is None else [end]), last=True)
        assert await collect(completion) == ("ok", reason)

    run(main)


def test_failure_on_the_way_is_raised_after_the_text_and_closes_the_session(
    bench: Bench, tokenizer: Tokenizer
) -> None:
    lost = ShardLost(peer="p", layers="0:2", problem="gone")
    shown: list[Delta] = []

    async def main() -> None:
        completion = await bench.chat()
        bench.say(*ids_of(tokenizer, "ok"))
        bench.client.sinks[-1](lost)
        with pytest.raises(ShardLost) as caught:
            await collect(completion, shown)
        assert caught.value is lost

    run(main)
    assert [text_of(delta) for delta in shown] == ["o", "k"]
    assert bench.client.closed == [bench.client.session]


def test_cancelled_wait_closes_the_session(bench: Bench) -> None:
    async def main() -> None:
        task = asyncio.create_task(collect(await bench.chat()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert bench.client.closed == [bench.client.session]


def test_tokens_from_another_thread_reach_the_completion(
    bench: Bench, tokenizer: Tokenizer
) -> None:
    async def main() -> None:
        completion = await bench.chat()
        say = partial(bench.say, *ids_of(tokenizer, "ok"), last=True)
        task = asyncio.create_task(collect(completion))
        await asyncio.to_thread(say)
        assert await task == ("ok", "length")

    run(main)
