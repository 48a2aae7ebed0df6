"""Sessions whose tokens so far change what their tail samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pals.config import CACHE_DIR_VARIABLE
from pals.engine.bank import pack_bits
from pals.engine.bank_slots import DEFAULT_BANK_SLOTS
from pals.engine.sampling_rows import RowSampling
from pals.engine.shard import Shard
from pals.engine.work import PenaltyHistory, Sampled
from pals.errors import InvalidStep, PenaltySlotsTaken
from pals.models.snapshot import Snapshot
from pals.types import Sampling
from tests.checkpoints import make_llama_checkpoint
from tests.unit.engine.chains import LIMITS, load_chain, make_row, make_step

PROMPT = [256, *b"The quick brown fox jumps over the lazy dog, twice."][:30]
PENALISED = Sampling(
    temperature=0.8, frequency_penalty=1.5, repetition_penalty=1.3, seed=5, logprobs=2
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[list[Shard]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_DIR_VARIABLE, str(shared_cache))
        folder = make_llama_checkpoint(tmp_path_factory.mktemp("model"), num_layers=3)
        limits = replace(LIMITS, verify_tokens=4)
        yield load_chain(Snapshot.open(folder, "test/model"), [0], limits=limits)


@pytest.fixture
def shard(loaded: list[Shard]) -> Shard:
    loaded[0].reset()
    return loaded[0]


def remember(prompt: Sequence[int], answer: Sequence[int] = ()) -> PenaltyHistory:
    return PenaltyHistory(np.array([*prompt, *answer], np.int32), len(answer))


def run(shard: Shard, position: int, tokens: Sequence[int], row_sampling: RowSampling) -> Sampled:
    """Run a prompt at position 0, else one token or a draft."""
    kind = "prefill" if not position else ("decode" if len(tokens) == 1 else "verify")
    row = make_row(shard, 0, kind, position, len(tokens))
    step = make_step(shard, [], row) if kind == "prefill" else make_step(shard, [row])
    sampled = shard.run(step, [np.array(tokens, np.int32)], [row_sampling]).sampled
    assert sampled is not None
    return sampled


def generate(
    shard: Shard, row_sampling: RowSampling, count: int, answer: Sequence[int] = ()
) -> list[int]:
    """Return the tokens after prompt and answer."""
    tokens = [int(run(shard, 0, [*PROMPT, *answer], row_sampling).ids[0])]
    for position in range(len(PROMPT) + len(answer), len(PROMPT) + len(answer) + count - 1):
        tokens.append(int(run(shard, position, tokens[-1:], row_sampling).ids[0]))
    return tokens


def test_a_replay_with_its_history_goes_on_as_before(shard: Shard) -> None:
    answer = generate(shard, shard.open_sampling(PENALISED, remember(PROMPT)), 12)
    unpenalised = Sampling(temperature=0.8, seed=5)

    shard.reset()
    again = shard.open_sampling(PENALISED, remember(PROMPT, answer[:2]))

    assert generate(shard, again, 10, answer[:2]) == answer[2:]
    assert generate(shard, shard.open_sampling(unpenalised, None), 12) != answer


def test_a_bias_needs_no_history(shard: Shard) -> None:
    biased = shard.open_sampling(Sampling(logit_bias=((77, 100.0),)), None)

    assert generate(shard, biased, 3) == [77] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_only_what_is_allowed_is_sampled_until_something_else_is(
    shard: Shard, temperature: float
) -> None:
    masked = PenaltyHistory(np.zeros(0, np.int32), 0, is_masked=True)
    row_sampling = shard.open_sampling(Sampling(temperature=temperature), masked)
    few = np.isin(np.arange(shard.config.vocab_size), [3, 200])

    shard.set_allowed(row_sampling, pack_bits(few))
    some = generate(shard, row_sampling, 6)
    shard.set_allowed(row_sampling, pack_bits(np.arange(len(few)) == 258))

    assert set(some) <= {3, 200}
    assert generate(shard, row_sampling, 2) == [258, 258]


def test_tokens_of_a_draft_count_when_they_are_accepted(shard: Shard) -> None:
    row_sampling = shard.open_sampling(PENALISED, remember(PROMPT))
    first = generate(shard, row_sampling, 1)
    draft = [*first, 5, 6]

    verified = run(shard, len(PROMPT), draft, row_sampling).ids
    same = run(shard, len(PROMPT), draft, row_sampling).ids
    shard.count_accepted(row_sampling, [int(verified[0])] * 3)
    counted = run(shard, len(PROMPT), draft, row_sampling).logprobs

    history = remember(PROMPT, [*first, *[int(verified[0])] * 3])
    replayed = shard.open_sampling(PENALISED, history)
    assert same.tolist() == verified.tolist()
    assert run(shard, len(PROMPT), draft, replayed).logprobs.tolist() == counted.tolist()


def test_log_probabilities_come_for_those_who_ask(shard: Shard) -> None:
    asked = run(shard, 0, PROMPT, shard.open_sampling(Sampling(logprobs=2), None))
    unasked = run(shard, 0, PROMPT, shard.open_sampling(Sampling(), None))

    assert asked.ids.tolist() == unasked.ids.tolist() == asked.top_ids[:, 0].tolist()
    assert asked.logprobs.tolist() == asked.top_logprobs[:, 0].tolist()
    assert (asked.top_logprobs[0, :2] < 0).all()
    assert (unasked.logprobs.tolist(), unasked.top_ids.tolist()) == ([0], [[-1] * 20])


def test_a_full_bank_refuses_until_a_session_ends(shard: Shard) -> None:
    held = [shard.open_sampling(PENALISED, None) for _ in range(DEFAULT_BANK_SLOTS - 1)]

    with pytest.raises(PenaltySlotsTaken, match="64 sessions"):
        shard.open_sampling(PENALISED, None)
    assert shard.open_sampling(Sampling(temperature=1.0), None).slot == 0
    shard.close_sampling(held[7])

    assert shard.open_sampling(PENALISED, None).slot == held[7].slot


@pytest.mark.parametrize("tokens", [[-1], [1 << 30]])
def test_a_history_of_unknown_tokens_is_refused_and_takes_no_slot(
    shard: Shard, tokens: list[int]
) -> None:
    with pytest.raises(InvalidStep, match="token id"):
        shard.open_sampling(PENALISED, remember(tokens))

    assert shard.open_sampling(PENALISED, None).slot == 1


def test_a_sampling_beyond_the_vocabulary_is_refused(shard: Shard) -> None:
    with pytest.raises(InvalidStep, match="top_k"):
        shard.open_sampling(Sampling(top_k=shard.config.vocab_size + 1), None)
