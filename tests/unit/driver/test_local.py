from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from pals.driver.interface import Delta, GenerateParams, HopReport, MadeCall, Message
from pals.driver.state import SampledToken, SessionRequest
from pals.errors import InvalidFrame, InvalidGrammar, InvalidRequest, NoChain, ShardLost
from pals.text.answers.families import HERMES
from pals.text.answers.format import AnswerFormat
from pals.text.answers.pieces import Content
from pals.text.answers.tools import ToolSpec, ToolUse
from pals.text.grammar import GrammarChecker
from pals.text.tokenizer import Tokenizer
from pals.types import Grammar, Sampling
from tests.unit.driver.local_world import (
    MODEL,
    VOCAB,
    Bench,
    collect,
    eos_of,
    ids_of,
    run,
    text_of,
)
from tests.unit.text.tokenizers_for_tests import save_byte_level


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = save_byte_level(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.load(folder)


@pytest.fixture
def bench(tokenizer: Tokenizer) -> Bench:
    return Bench(tokenizer)


def test_request_says_what_the_caller_asked_for(bench: Bench, tokenizer: Tokenizer) -> None:
    async def main() -> None:
        completion = await bench.chat(
            "hey",
            max_tokens=5,
            temperature=0.5,
            top_p=0.9,
            top_k=4,
            min_p=0.1,
            repetition_penalty=1.5,
            presence_penalty=0.25,
            frequency_penalty=-0.25,
            logit_bias=((5, -1.0),),
            logprobs=3,
            seed=2**64 + 7,
            grammar=Grammar(kind="json_object"),
        )
        assert completion.prompt_tokens == 3
        assert completion.route == ("abcdefgh[1:2]", "abcdefgh[2:3]")

    run(main)
    assert bench.client.requests == [
        SessionRequest(
            prompt=tuple(ids_of(tokenizer, "hey")),
            max_new_tokens=5,
            stop_token_ids=tuple(sorted([3, eos_of(tokenizer)])),
            sampling=Sampling(
                temperature=0.5,
                top_p=0.9,
                top_k=4,
                min_p=0.1,
                repetition_penalty=1.5,
                presence_penalty=0.25,
                frequency_penalty=-0.25,
                logit_bias=((5, -1.0),),
                logprobs=3,
                seed=7,
            ),
            grammar=Grammar(kind="json_object"),
        )
    ]


def test_driver_says_what_it_serves_and_since_when(bench: Bench) -> None:
    driver = bench.driver

    assert (driver.model_id, driver.context_tokens, driver.vocab_size) == ("test/tiny", 64, VOCAB)
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
    assert bench.client.closed == bench.client.sessions


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
    assert bench.client.closed == bench.client.sessions


def test_cancelled_wait_closes_the_session(bench: Bench) -> None:
    async def main() -> None:
        task = asyncio.create_task(collect(await bench.chat()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert bench.client.closed == bench.client.sessions


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


# --- conversations -------------------------------------------------------------------


def test_messages_reach_the_template_as_their_family_wants_them(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, AnswerFormat(family=HERMES, template_reads_tools=True))
    call = MadeCall(id="call_1", name="f", arguments='{"a": 1}')
    messages = [
        Message(role="user", content="x", name="bob"),
        Message(role="assistant", content=None, tool_calls=(call,), reasoning_content="hm"),
        Message(role="tool", content="4", tool_call_id="call_1"),
    ]

    async def main() -> None:
        await bench.driver.chat(messages, GenerateParams(reasoning_effort="low"))

    run(main)
    function = {"name": "f", "arguments": {"a": 1}}
    assert bench.template.turns[1]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": function}
    ]
    assert bench.template.turns[2]["tool_call_id"] == "call_1"
    assert bench.template.asked["reasoning_effort"] == "low"


def test_a_tool_that_has_to_be_called_is_a_grammar(bench: Bench) -> None:
    use = ToolUse(tools=(ToolSpec(name="f"),), choice="required")

    async def main() -> None:
        await bench.chat(tools=use)

    run(main)
    [request] = bench.client.requests
    assert request.grammar is not None
    assert request.grammar.kind == "lark"


class FakeChecker:
    """Refuses the schemas that hold ``bad``."""

    def __init__(self) -> None:
        self.checked: list[Grammar] = []

    def knows(self, grammar: Grammar) -> bool:
        return grammar in self.checked

    def check(self, grammar: Grammar) -> None:
        if "bad" in grammar.source:
            raise InvalidGrammar(problem="Unimplemented keys: bad")
        self.checked.append(grammar)


def test_a_schema_that_cannot_be_enforced_is_refused_before_a_session_opens(
    tokenizer: Tokenizer,
) -> None:
    checker = FakeChecker()
    bench = Bench(tokenizer, grammars=cast("GrammarChecker", checker))
    good, bad = (Grammar(kind="json_schema", source=f'{{"{k}": 1}}') for k in ("good", "bad"))

    async def main() -> None:
        for _ in range(2):
            await bench.chat(grammar=good)
        with pytest.raises(InvalidGrammar, match="bad") as caught:
            await bench.chat(grammar=bad)
        assert caught.value.fields["param"] == "response_format"

    run(main)
    assert [request.grammar for request in bench.client.requests] == [good, good]
    assert checker.checked == [good]


# --- several answers -----------------------------------------------------------------


def test_other_answers_fork_from_the_first_once_it_has_a_token(
    bench: Bench, tokenizer: Tokenizer
) -> None:
    a, b, c = ids_of(tokenizer, "abc")
    shown: list[Delta] = []

    async def main() -> None:
        completion = await bench.chat(n=3, seed=10)
        assert bench.client.forks == []
        bench.say(a)
        deltas = aiter(completion)
        shown.append(await anext(deltas))
        for _ in range(3):
            await bench.client.opened.get()
        bench.say(b, last=True, choice=2)
        bench.say(a, eos_of(tokenizer), choice=0)
        bench.say(c, last=True, choice=1)
        shown.extend([delta async for delta in deltas])
        assert completion.completion_tokens == 5

    run(main)
    parents = [parent for parent, _ in bench.client.forks]
    assert parents == [bench.client.sessions[0]] * 2
    assert bench.client.requests[0].sampling.seed == 10
    assert [sampling.seed for _, sampling in bench.client.forks] == [11, 12]
    assert [(d.choice, text_of(d), d.finish_reason) for d in shown] == [
        (0, "a", None),
        (2, "b", "length"),
        (0, "a", None),
        (0, "", "stop"),
        (1, "c", "length"),
    ]
    assert sorted(map(id, bench.client.closed)) == sorted(map(id, bench.client.sessions))


def test_a_fork_that_is_refused_ends_the_completion(bench: Bench, tokenizer: Tokenizer) -> None:
    bench.client.fork_refusal = NoChain(model="m", missing="0:2")

    async def main() -> None:
        completion = await bench.chat(n=2)
        bench.say(*ids_of(tokenizer, "ab"))
        with pytest.raises(NoChain):
            await collect(completion)

    run(main)
    assert bench.client.closed == bench.client.sessions


def test_the_likeliest_of_several_answers_are_given(bench: Bench, tokenizer: Tokenizer) -> None:
    shown: list[Delta] = []

    async def main() -> None:
        completion = await bench.complete(n=1, best_of=3)
        bench.say(*ids_of(tokenizer, "a"), logprob=-2.0)
        task = asyncio.create_task(collect(completion, shown))
        for _ in range(3):
            await bench.client.opened.get()
        bench.say(*ids_of(tokenizer, "a"), last=True, choice=0, logprob=-2.0)
        bench.say(*ids_of(tokenizer, "bbb"), last=True, choice=1, logprob=-1.0)
        bench.say(*ids_of(tokenizer, "c"), last=True, choice=2, logprob=-1.5)
        assert await task == ("bbb", "length")
        assert completion.completion_tokens == 6

    run(main)
    assert {delta.choice for delta in shown} == {0}
    assert not any(delta.scores for delta in shown)


# --- prompts -------------------------------------------------------------------------


def test_token_ids_are_taken_as_they_are(bench: Bench) -> None:
    async def main() -> None:
        assert (await bench.complete((5, 6, 7))).prompt_tokens == 3

    run(main)
    assert bench.client.requests[0].prompt == (5, 6, 7)


def test_a_prompt_without_tokens_is_refused_by_name(bench: Bench) -> None:
    async def main() -> None:
        with pytest.raises(InvalidRequest) as caught:
            await bench.complete("")
        assert caught.value.fields["param"] == "prompt"
        with pytest.raises(InvalidRequest) as caught:
            await bench.driver.embed([""])
        assert caught.value.fields["param"] == "input"

    run(main)


def test_an_echo_comes_before_the_answer(bench: Bench, tokenizer: Tokenizer) -> None:
    async def main() -> None:
        completion = await bench.complete("hey", echo=True)
        bench.say(*ids_of(tokenizer, " you"), last=True)
        assert await collect(completion) == ("hey you", "length")

    run(main)


def test_an_echo_alone_needs_no_session(bench: Bench, tokenizer: Tokenizer) -> None:
    shown: list[Delta] = []

    async def main() -> None:
        completion = await bench.complete(
            tuple(ids_of(tokenizer, "hey")), echo=True, n=2, max_tokens=0
        )
        await collect(completion, shown)
        assert (completion.prompt_tokens, completion.completion_tokens) == (3, 0)

    run(main)
    assert shown == [
        Delta(choice=i, pieces=(Content("hey"),), finish_reason="length") for i in (0, 1)
    ]
    assert bench.client.requests == []


def test_no_tokens_of_an_answer_are_none(bench: Bench) -> None:
    async def main() -> None:
        assert await collect(await bench.complete(max_tokens=0)) == ("", "length")

    run(main)


def test_a_prompt_is_scored_as_the_answer_to_its_first_token(
    bench: Bench, tokenizer: Tokenizer
) -> None:
    prompt = ids_of(tokenizer, "hey")
    shown: list[Delta] = []
    bench.client.answer = lambda request: [
        SampledToken(token, False, -1.0 * token, ((token, -1.0 * token),))
        for token in (prompt[1:] if request.grammar else ())
    ]

    async def main() -> None:
        await collect(await bench.complete("hey", echo=True, logprobs=1, max_tokens=0), shown)

    run(main)
    [request] = bench.client.requests
    assert (request.prompt, request.max_new_tokens) == ((prompt[0],), 2)
    assert request.grammar == Grammar(kind="tokens", source=f"[{prompt[1]},{prompt[2]}]")
    assert request.sampling.logprobs == 1
    assert [(s.raw, s.scored, s.logprob) for s in shown[0].scores] == [
        (b"h", False, 0.0),
        (b"e", True, -prompt[1]),
        (b"y", True, -prompt[2]),
    ]
    assert bench.client.closed == bench.client.sessions


def test_a_tail_that_does_not_score_what_it_was_told_to_is_found_out(
    bench: Bench, tokenizer: Tokenizer
) -> None:
    [other] = ids_of(tokenizer, "x")
    bench.client.answer = lambda _: [SampledToken(other, False, -1.0)]

    async def main() -> None:
        with pytest.raises(InvalidFrame):
            await bench.complete("hey", echo=True, logprobs=0)

    run(main)
    assert bench.client.closed == bench.client.sessions


def test_a_prompt_too_long_to_be_scored_is_refused_by_name(bench: Bench) -> None:
    async def main() -> None:
        with pytest.raises(InvalidRequest) as caught:
            await bench.complete((200,) * 20_000, echo=True, logprobs=0)
        assert caught.value.fields["param"] == "echo"

    run(main)


# --- embeddings and times ------------------------------------------------------------


def test_embeddings_come_in_order_with_their_tokens(bench: Bench) -> None:
    async def main() -> None:
        found = await bench.driver.embed(["hey", (1, 2), "h"])
        assert [each.tokens for each in found] == [3, 2, 1]
        assert [each.vector.tolist() for each in found] == [[n] * 4 for n in (3.0, 2.0, 1.0)]
        assert all(each.vector.dtype == np.float32 for each in found)

    run(main)


def test_embeddings_are_as_wide_as_the_model(bench: Bench) -> None:
    assert bench.driver.embedding_size == MODEL.hidden_size


def test_an_embedding_that_fails_ends_them_all(bench: Bench) -> None:
    bench.client.refusal = NoChain(model="m", missing="0:2")

    async def main() -> None:
        with pytest.raises(NoChain):
            await bench.driver.embed(["hey"] * 20)

    run(main)


def test_times_of_shards_are_asked_for_beside_the_answer(
    bench: Bench, tokenizer: Tokenizer
) -> None:
    bench.client.reports = [
        HopReport(
            peer="peer-2-abcdefgh",
            layers="2:3",
            steps=1,
            step_ms=2.0,
            queue_ms=0.5,
            handover_ms=0.25,
            codec_ms=0.25,
            wire_ms=9.0,
        )
    ]

    async def main() -> None:
        completion = await bench.chat()
        assert completion.timings().first_token_ms is None
        assert completion.cached_tokens == 2
        bench.say(*ids_of(tokenizer, "a"), last=True)
        await collect(completion)
        timings = completion.timings()
        assert timings.open_ms >= 0
        assert timings.first_token_ms is not None
        assert timings.shards == (("abcdefgh[2:3]", 3.0),)

    run(main)
