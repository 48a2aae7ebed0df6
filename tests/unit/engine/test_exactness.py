"""However sessions are batched, chunked, paged, cached, preempted or forked: the same tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.config import CACHE_DIR_VARIABLE
from pals.engine.batch import BatchRules
from pals.engine.pages import PageFormat
from pals.engine.shard import Shard
from pals.models.configs import FAMILIES
from pals.models.snapshot import Snapshot
from pals.types import EngineLimits, LayerRange, Sampling
from tests.checkpoints import make_llama_checkpoint
from tests.random_checkpoints import make_random_checkpoint
from tests.unit.engine.chains import counting_compilations, generate
from tests.unit.engine.schedules import Ask, Schedule
from tests.unit.models.published import PUBLISHED, shrink

PAGES = 9
LIMITS = EngineLimits(
    max_sessions=8,
    max_rows=4,
    max_context_tokens=256,
    max_chunk_tokens=32,
    verify_tokens=3,
    page_tokens=16,
)
HOT = Sampling(temperature=1.3, top_p=0.9, seed=7)
TEXT = [256, *b"In the beginning there was a small random model, which said what it liked to."]
SMALLEST = {
    one.config["model_type"]: one
    for one in reversed(PUBLISHED.values())
    if one.config["model_type"] in FAMILIES
}


def load(snapshot: Snapshot) -> Shard:
    """Load the whole model, with so few pages that sessions have to give way."""
    layers = LayerRange(0, snapshot.config.num_layers)
    shard = Shard.load(snapshot, layers, dtype="f32", limits=LIMITS)
    page: PageFormat = shard.page_format
    limits = replace(LIMITS, kv_bytes=(1 + PAGES) * page.page_bytes)
    return Shard.load(snapshot, layers, dtype="f32", limits=limits)


@pytest.fixture(scope="module")
def shard(tmp_path_factory, shared_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_DIR_VARIABLE, str(shared_cache))
        folder = make_llama_checkpoint(tmp_path_factory.mktemp("model"), num_layers=2)
        yield load(Snapshot.open(folder, "test/model"))


def alone(shard: Shard, ask: Ask) -> list[int]:
    """Return the answer of a session that has the shard for itself."""
    shard.reset()
    return generate([shard], ask.prompt, count=ask.count, chunk=32, sampling=ask.sampling)


def check(shard: Shard, asks: list[Ask], rules: BatchRules | None = None) -> Schedule:
    everybody = [*asks, *(fork for ask in asks for fork in ask.forks)]
    expected = [alone(shard, ask) for ask in everybody]
    schedule = Schedule(shard, rules)
    answers = {id(ask): answer for ask, answer in zip(everybody, expected, strict=True)}
    # every second guess is right
    schedule.guess = lambda ask: [
        token if place % 2 == 0 else 5
        for place, token in enumerate(answers[id(ask)][len(ask.tokens) :])
    ]
    schedule.run(asks)
    assert [ask.tokens for ask in everybody] == expected
    return schedule


@st.composite
def asks(draw: st.DrawFn) -> list[Ask]:
    """Draw answers whose prompts often begin alike."""
    made: list[Ask] = []
    for _ in range(draw(st.integers(2, 5))):
        length = draw(st.integers(1, len(TEXT)))
        prompt = TEXT[:length] if draw(st.booleans()) else [7, *TEXT[:length]]
        made.append(
            Ask(
                prompt=prompt,
                count=draw(st.integers(1, 12)),
                sampling=draw(st.sampled_from([Sampling(), HOT])),
                arrives=draw(st.integers(0, 12)),
                draft=draw(st.sampled_from([1, 1, 3])),
            )
        )
    for ask in made[:1]:
        ask.forks = [replace(ask, forks=[], tokens=[], sampling=replace(HOT, seed=9), draft=1)]
    return made


@pytest.mark.timeout(300)
@settings(max_examples=8)
@given(asks())
def test_any_schedule_gives_each_session_what_it_gets_alone(shard: Shard, asks: list[Ask]) -> None:
    check(shard, asks, BatchRules(admission_wait_s=100.0))


def test_preempted_sessions_go_on_where_they_were(shard: Shard) -> None:
    many = [Ask(prompt=[n, *TEXT[:30]], count=40, arrives=n) for n in range(4)]

    check(shard, many, BatchRules(admission_wait_s=100.0, decoding_s=0.001))

    assert sum(ask.preemptions for ask in many) > 0


def test_cached_prefix_is_not_computed_again(shard: Shard) -> None:
    first = Ask(prompt=TEXT[:64], count=4)
    again = Ask(prompt=[*TEXT[:64], 9, 9], count=4, arrives=30)

    schedule = check(shard, [first, again])

    chunks = [step.chunk.tokens for step in schedule.steps if step.chunk is not None]
    assert again.held == 64
    assert sum(chunks) == 64 + 2


def test_fork_shares_the_prompt_and_goes_its_own_way(shard: Shard) -> None:
    ask = Ask(prompt=TEXT[:37], count=10)
    ask.forks = [Ask(prompt=ask.prompt, count=10, sampling=replace(HOT, seed=n)) for n in range(3)]

    schedule = check(shard, [ask])

    assert sum(step.chunk.tokens for step in schedule.steps if step.chunk is not None) == 37


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", sorted(SMALLEST))
def test_any_family_gives_each_session_what_it_gets_alone(family: str, tmp_path, shared_cache):
    folder = make_random_checkpoint(tmp_path / "model", shrink(SMALLEST[family].config))
    shard = load(Snapshot.open(folder, "test/model"))
    random = np.random.default_rng(3)
    vocabulary = shard.config.vocab_size
    prompts = [random.integers(0, vocabulary, size).tolist() for size in (40, 17, 3, 33)]
    many = [
        Ask(prompt=prompt, count=12, arrives=2 * number, draft=1 + 2 * (number % 2))
        for number, prompt in enumerate(prompts)
    ]

    check(shard, many, BatchRules(admission_wait_s=100.0))


@pytest.mark.timeout(300)
def test_nothing_is_compiled_while_two_hundred_sessions_come_and_go(shard: Shard) -> None:
    shard.warmup()
    random = np.random.default_rng(5)
    many = [
        Ask(
            prompt=TEXT[: random.integers(1, 60)],
            count=int(random.integers(1, 5)),
            sampling=replace(HOT, seed=number) if number % 3 else Sampling(),
            arrives=number,
            draft=3 if number % 5 == 0 else 1,
        )
        for number in range(200)
    ]
    schedule = Schedule(shard, BatchRules(admission_wait_s=100.0))
    schedule.guess = lambda _: [5, 6]

    with counting_compilations() as compilations:
        schedule.run(many)

    assert compilations == []
    assert {step.program.kind for step in schedule.steps} == {"decode", "verify", "chunk", "mixed"}
