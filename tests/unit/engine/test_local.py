"""A chain in one process: what it answers, what it keeps, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest

import numpy as np
import pytest

from pals.engine.batch import Step
from pals.engine.batcher import Batcher
from pals.engine.local import LocalChain
from pals.engine.work import Array, RowSampling, StepOutput
from pals.errors import AdmissionTimeout, InvalidConfig, InvalidStep, SessionTooLong, ShardBusy
from pals.types import LayerRange, Sampling
from tests.unit.engine.page_memory import next_token
from tests.unit.engine.page_runner import PageRunner
from tests.unit.engine.virtual_batch import LIMITS, make_batcher

PAGES = 16
PROMPT = list(range(1, 151))  # more than two chunks, and two blocks of 64 tokens


class FakeShard(PageRunner):
    """A runner of pages that is one of a chain.

    Attributes:
        steps: That it ran.
    """

    def __init__(self, layers: str, *, is_tail: bool, num_pages: int = PAGES) -> None:
        super().__init__(num_pages, is_tail=is_tail)
        self.layers = LayerRange.parse(layers)
        self.num_pages = num_pages
        self.steps: list[Step] = []

    def make_batcher(self, manifest: bytes) -> Batcher:
        assert len(manifest) == 32
        return make_batcher(self.num_pages)[0]

    def run(
        self, step: Step, inputs: Sequence[Array], samplings: Sequence[RowSampling | None]
    ) -> StepOutput:
        self.steps.append(step)
        flat = [part.reshape(-1).astype(np.int32) for part in inputs]
        return super().run(step, flat, samplings)

    @property
    def tokens(self) -> int:
        """How many it computed."""
        return sum(row.tokens for step in self.steps for row in step.all_rows)


def make_chain(num_pages: int = PAGES) -> tuple[LocalChain, list[FakeShard]]:
    shards = [
        FakeShard("0:2", is_tail=False, num_pages=num_pages),
        FakeShard("2:3", is_tail=True, num_pages=num_pages),
    ]
    return LocalChain(shards), shards


def expected(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    """Return what the two models make of a prompt, one after the other."""
    history, hidden = list(prompt), [next_token(prompt[:end]) for end in range(1, len(prompt) + 1)]
    for _ in range(count):
        history.append(next_token(hidden, seed))
        hidden.append(next_token(history))
    return history[len(prompt) :]


def test_an_answer_is_that_of_the_whole_model():
    chain, _ = make_chain()

    assert list(chain.generate(PROMPT, max_new_tokens=20)) == expected(PROMPT, 20)


def test_a_prompt_is_computed_in_chunks_that_there_are_programs_for():
    chain, shards = make_chain()

    list(chain.generate(PROMPT, max_new_tokens=1))

    for shard in shards:
        chunks = [step.chunk.tokens for step in shard.steps if step.chunk is not None]
        assert sum(chunks) == len(PROMPT)
        assert max(chunks) <= LIMITS.max_chunk_tokens


def test_the_sampling_reaches_the_tail():
    chain, _ = make_chain()

    answer = list(chain.generate(PROMPT, Sampling(seed=5), max_new_tokens=4))

    assert answer == expected(PROMPT, 4, seed=5)


def test_a_prompt_that_was_there_before_is_not_computed_again():
    chain, shards = make_chain()
    first = list(chain.generate(PROMPT, max_new_tokens=4))
    before = [shard.tokens for shard in shards]

    assert list(chain.generate(PROMPT, max_new_tokens=4)) == first

    again = [shard.tokens - so_far for shard, so_far in zip(shards, before, strict=True)]
    assert again == [len(PROMPT) - 128 + 3] * 2


def test_answers_in_turns_are_those_of_each_alone():
    chain, _ = make_chain(64)
    prompts = [PROMPT, PROMPT[:70], [7, 8, 9]]

    running = [chain.generate(prompt, max_new_tokens=6) for prompt in prompts]
    answers = zip(*zip_longest(*running), strict=True)

    assert [list(answer) for answer in answers] == [expected(p, 6) for p in prompts]


def test_an_answer_that_is_broken_off_gives_its_pages_back():
    chain, _ = make_chain(12)
    for _ in range(5):
        answer = chain.generate(PROMPT, max_new_tokens=30)
        assert list(islice(answer, 3)) == expected(PROMPT, 3)
        answer.close()

    assert list(chain.generate([1, *PROMPT], max_new_tokens=3)) == expected([1, *PROMPT], 3)


def test_an_answer_that_finds_no_room_is_refused_and_the_others_go_on():
    chain, _ = make_chain(12)
    first = chain.generate(PROMPT, max_new_tokens=30)
    begun = [next(first)]

    with pytest.raises(AdmissionTimeout):
        next(chain.generate([9, *PROMPT], max_new_tokens=30))

    assert begun + list(first) == expected(PROMPT, 30)


def test_an_answer_whose_pages_went_to_an_older_one_says_so():
    chain, _ = make_chain(12)
    older, younger = PROMPT[:80], PROMPT[1:81]
    first, second = (chain.generate(prompt, max_new_tokens=40) for prompt in (older, younger))
    begun = [next(first)]
    next(second)

    assert begun + list(first) == expected(older, 40)

    with pytest.raises(ShardBusy, match="went to another answer"):
        next(second)


def test_what_never_fits_is_refused():
    chain, _ = make_chain(4)

    with pytest.raises(SessionTooLong):
        next(chain.generate(PROMPT, max_new_tokens=30))


@pytest.mark.parametrize("prompt", [[10_001], [1 << 40]])
def test_a_prompt_that_is_none_is_refused(prompt: list[int]):
    chain, _ = make_chain()

    with pytest.raises(InvalidStep):
        next(chain.generate(prompt, max_new_tokens=3))


def test_no_tokens_are_no_answer():
    chain, _ = make_chain()

    with pytest.raises(InvalidStep):
        next(chain.generate(PROMPT, max_new_tokens=0))


def test_a_step_that_fails_leaves_a_chain_that_works():
    chain, shards = make_chain()
    shards[1].failure = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError):
        next(chain.generate(PROMPT, max_new_tokens=3))
    shards[1].failure = None

    assert list(chain.generate(PROMPT, max_new_tokens=3)) == expected(PROMPT, 3)


@pytest.mark.parametrize(
    "ranges", [[], ["0:2"], ["2:3"], ["0:1", "2:3"], ["2:3", "0:2"], ["0:2", "0:2", "2:3"]]
)
def test_shards_that_are_no_whole_model_are_refused(ranges: list[str]):
    shards = [FakeShard(layers, is_tail=layers == "2:3") for layers in ranges]

    with pytest.raises(InvalidConfig, match="layers are"):
        LocalChain(shards)
